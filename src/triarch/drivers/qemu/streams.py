"""Bytes in two directions at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from triarch.errors import Unavailable

_READ_BYTES = 64 << 10


@asynccontextmanager
async def connect(path: Path) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to one of QEMU's sockets. Raises `Unavailable` when QEMU is not there."""
    try:
        reader, writer = await asyncio.open_unix_connection(str(path), limit=_READ_BYTES)
    except OSError as error:
        raise Unavailable(f"QEMU does not listen on {path}: {(error.strerror or str(error)).lower()}") from error
    try:
        yield reader, writer
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()


async def receive(reader: asyncio.StreamReader) -> bytes:
    """The next bytes, none when QEMU is gone."""
    try:
        return await reader.read(_READ_BYTES)
    except ConnectionError:
        return b""


async def send(writer: asyncio.StreamWriter, data: bytes) -> None:
    """Write with back pressure. That QEMU is gone shows where one reads."""
    with suppress(ConnectionError):
        writer.write(data)
        await writer.drain()


async def carry(output: Coroutine[None, None, None], input_: Coroutine[None, None, None]) -> None:
    """Run both until `output` ends; the end of the input alone ends nothing. An error of either ends both."""
    showing, feeding = asyncio.ensure_future(output), asyncio.ensure_future(input_)
    try:
        done, _ = await asyncio.wait({showing, feeding}, return_when=asyncio.FIRST_COMPLETED)
        if showing not in done:
            feeding.result()
            await showing
        showing.result()
    finally:
        showing.cancel()
        feeding.cancel()
        await asyncio.gather(showing, feeding, return_exceptions=True)
