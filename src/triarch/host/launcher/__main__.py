"""`python -I -m triarch.host.launcher RUN_DIR SOCKET_FD`: started by `launcher.client`, ends with its socket."""

from __future__ import annotations

import os
import signal
import socket
import sys


def main() -> None:
    run_dir, socket_fd = sys.argv[1], int(sys.argv[2])
    # A Ctrl-C in the daemon's terminal is the daemon's to handle.
    os.setsid()
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    connection = socket.socket(fileno=socket_fd)
    connection.set_inheritable(False)

    from triarch.host.launcher.server import Server

    Server(run_dir, connection).serve()


if __name__ == "__main__":
    main()
