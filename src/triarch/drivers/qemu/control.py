"""The control port from the host's side: asking a guest to stop, and carrying the streams of an attached command."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

from triarch.drivers.base import Stdio
from triarch.drivers.qemu.streams import carry, connect, receive, send
from triarch.errors import Damaged, Unavailable
from triarch.guest.protocol import (
    STDIN_WINDOW_BYTES,
    Credit,
    Ended,
    GuestDecoder,
    GuestMessage,
    HostMessage,
    Output,
    encode_message,
)
from triarch.model.driver import Data, EndOfInput

Message = TypeVar("Message", bound=GuestMessage)


class ControlPort:
    """An open control port. QEMU has one client at a time: whoever is attached also sends the stop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._window_bytes = STDIN_WINDOW_BYTES
        self._window_opened = asyncio.Event()
        self._decoder = GuestDecoder()
        self._heard: list[GuestMessage] = []

    async def send(self, message: HostMessage) -> None:
        """Hand it to QEMU, which keeps it until the guest listens. A guest that is gone needs none."""
        await send(self._writer, encode_message(message))

    async def wait_for(self, kind: type[Message]) -> Message:
        """The guest's next message of that kind. Raises `Unavailable` when it is gone, or `Damaged`."""
        while True:
            for position, message in enumerate(self._heard):
                if isinstance(message, kind):
                    del self._heard[: position + 1]
                    return message
            data = await receive(self._reader)
            if not data:
                raise Unavailable("the guest is gone")
            self._heard = self._decoder.feed(data)

    async def carry(self, stdio: Stdio) -> None:
        """Carry an attached command's streams until its exit is told or the guest is gone.

        Raises what `stdio` raises, or `Damaged`.
        """
        await carry(self._show(stdio), self._feed(stdio))

    async def _feed(self, stdio: Stdio) -> None:
        while True:
            piece = await stdio.read()
            if isinstance(piece, Data):
                await self._feed_data(piece.data)
            else:
                await self.send(piece)
            if isinstance(piece, EndOfInput):
                return

    async def _feed_data(self, data: bytes) -> None:
        """No more than the command has room for, so that what it never reads is not in the way of a stop."""
        while data:
            while not self._window_bytes:
                self._window_opened.clear()
                await self._window_opened.wait()
            piece, data = data[: self._window_bytes], data[self._window_bytes :]
            self._window_bytes -= len(piece)
            await self.send(Data(piece))

    async def _show(self, stdio: Stdio) -> None:
        decoder = GuestDecoder()
        while data := await receive(self._reader):
            for message in decoder.feed(data):
                match message:
                    case Output(stream, piece):
                        await stdio.write(stream, piece)
                    case Credit(size_bytes):
                        self._give_credit(size_bytes)
                    case Ended():
                        # How it ended is in the report, which needs no daemon to be kept.
                        return
                    case _:
                        pass

    def _give_credit(self, size_bytes: int) -> None:
        if self._window_bytes + size_bytes > STDIN_WINDOW_BYTES:
            raise Damaged("the guest took more input than it was given")
        self._window_bytes += size_bytes
        self._window_opened.set()


@asynccontextmanager
async def open_control(path: Path) -> AsyncIterator[ControlPort]:
    """Connect to the control port. Raises `Unavailable` when QEMU is not there."""
    async with connect(path) as (reader, writer):
        yield ControlPort(reader, writer)
