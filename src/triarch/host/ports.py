"""Whether a port of the host is free: by trying to bind it (bind(2))."""

from __future__ import annotations

import errno
import socket

_KINDS = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}


def port_error(address: str, port: int, protocol: str) -> str | None:
    """None for one that could be had now, `in use`, or the kernel's other reason in lower case."""
    with socket.socket(socket.AF_INET, _KINDS[protocol]) as asked:
        if protocol == "tcp":
            # Connections that have ended hold nobody up.
            asked.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            asked.bind((address, port))
            if protocol == "tcp":
                asked.listen(1)
        except OSError as error:
            return "in use" if error.errno == errno.EADDRINUSE else (error.strerror or str(error)).lower()
    return None
