"""Asking a machine from the host whether it serves: a TCP connection, or the status of one HTTP answer.

What answers is a guest that nobody trusts: no redirect is followed, and no more than one status line is read. Both
raise `OSError` where nothing answers; the caller sets the time limit.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator

MAX_STATUS_LINE_BYTES = 1024
# status-line = HTTP-version SP status-code SP [ reason-phrase ] (RFC 9112, 4)
_STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([1-5][0-9]{2})(?: [^\r\n]*)?\r?\n")


@contextlib.asynccontextmanager
async def _connected(address: str, port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(address, port, limit=MAX_STATUS_LINE_BYTES)
    try:
        yield reader, writer
    finally:
        # Not close(): whatever it still sends is of no interest, and nobody waits for it.
        writer.transport.abort()


async def connect_tcp(address: str, port: int) -> None:
    """Return once the connection stands; it is then dropped."""
    async with _connected(address, port):
        return


async def http_status(address: str, port: int, path: str, host: str) -> int:
    """The status code that GET `path` is answered with. Raises `ValueError` for an answer that is not HTTP/1."""
    async with _connected(address, port) as (reader, writer):
        request = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: triarch\r\nConnection: close\r\n\r\n"
        writer.write(request.encode("ascii"))
        try:
            line = await reader.readuntil(b"\n")
        except asyncio.IncompleteReadError as error:
            line = error.partial
        except asyncio.LimitOverrunError:
            line = b""
        return parse_status_line(line)


def parse_status_line(line: bytes) -> int:
    """Raises `ValueError`."""
    match = _STATUS_LINE.fullmatch(line)
    if match is None:
        raise ValueError("the answer is not HTTP")
    return int(match[1])
