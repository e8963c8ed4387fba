"""conmon, the process beside each container that keeps its output and its exit code whatever happens to the daemon.

Its command line, the socket on which it passes the console on, and its controls: conmon(8).
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

from triarch.drivers.container.record import RunFiles
from triarch.errors import Unavailable
from triarch.model.driver import Resize, Stream

LOG_BYTES = 16 << 20

_STREAMS = {2: Stream.STDOUT, 3: Stream.STDERR}
# conmon sends at most one read of 8 KiB with the stream's number before it.
_PACKET_BYTES = 1 << 16
_INPUT_BYTES = 8192
_CONTROL_RESIZE = 1


def conmon_command(
    conmon: str, crun: str, uuid: str, files: RunFiles, log_path: str, *, terminal: bool, attached: bool
) -> tuple[str, ...]:
    """The command line (pure). `attached` gives an app machine an input; without it there is none."""
    options = {
        "--api-version": "1",
        "--cid": uuid,
        "--cuuid": uuid,
        "--name": uuid,
        "--runtime": crun,
        "--bundle": str(files.run_dir),
        "--container-pidfile": str(files.first_pid),
        "--conmon-pidfile": str(files.monitor_pid),
        "--log-path": f"k8s-file:{log_path}",
        "--log-size-max": str(LOG_BYTES),
        "--log-level": "error",
        "--exit-dir": str(files.exit_dir),
    }
    flags = ["--full-attach", "--no-new-keyring", "--no-sync-log", "--sync"]
    if terminal:
        flags.append("--terminal")
    elif attached:
        flags.append("--stdin")
    runtime = (f"--runtime-arg=--root={files.runtime_root}", "--runtime-arg=--cgroup-manager=cgroupfs")
    return (conmon, *(word for option in options.items() for word in option), *flags, *runtime)


class Attachment:
    """A connection to a container's own input and output."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    @classmethod
    async def open(cls, files: RunFiles) -> Attachment:
        """Raises `Unavailable` when the monitor is gone."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        connection.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(connection, str(files.attach_socket))
        except OSError as error:
            connection.close()
            raise Unavailable(f"cannot attach to the console: {error.strerror}") from error
        return cls(connection)

    async def output(self) -> AsyncIterator[tuple[Stream, bytes]]:
        """Pieces of output until the container has ended."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                packet = await loop.sock_recv(self._connection, _PACKET_BYTES)
            except ConnectionError:
                return
            if not packet:
                return
            stream = _STREAMS.get(packet[0])
            if stream is not None:
                yield stream, packet[1:]

    async def send(self, data: bytes) -> None:
        """Input for the container. Raises `ConnectionError` when it has ended."""
        loop = asyncio.get_running_loop()
        for start in range(0, len(data), _INPUT_BYTES):
            await loop.sock_sendall(self._connection, data[start : start + _INPUT_BYTES])

    def end_input(self) -> None:
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._connection.close()


def resize_console(files: RunFiles, size: Resize) -> None:
    """Tell the monitor the terminal's new size. A machine without a terminal, or gone, is ignored."""
    message = f"{_CONTROL_RESIZE} {size.rows} {size.columns}\n".encode()
    with suppress(OSError):
        fd = os.open(files.control_fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.write(fd, message)
        finally:
            os.close(fd)


def exit_code(path: Path) -> int | None:
    """What conmon wrote when the container ended; None when it did not live to."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
