"""The serial console: bytes both ways, for one viewer at a time."""

from __future__ import annotations

import asyncio
from pathlib import Path

from triarch.drivers.base import Stdio
from triarch.drivers.qemu.streams import carry, connect, receive, send
from triarch.model.driver import Data, EndOfInput, Stream


async def attach_console(path: Path, stdio: Stdio) -> None:
    """Return when QEMU goes away; the end of the input alone ends nothing. Raises what `stdio` raises.

    Raises `Unavailable` when QEMU is not there.
    """
    async with connect(path) as (reader, writer):
        await carry(_show(reader, stdio), _type(stdio, writer))


async def _type(stdio: Stdio, writer: asyncio.StreamWriter) -> None:
    while not isinstance(piece := await stdio.read(), EndOfInput):
        # A serial line has no size to change.
        if isinstance(piece, Data):
            await send(writer, piece.data)


async def _show(reader: asyncio.StreamReader, stdio: Stdio) -> None:
    while data := await receive(reader):
        await stdio.write(Stream.STDOUT, data)
