"""The serial console: QEMU has one client of it at a time, so that all who type share one line."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from triarch.drivers.base import Stdio
from triarch.drivers.qemu.streams import connect, receive, send
from triarch.errors import Unavailable
from triarch.model.driver import Data, EndOfInput


class SerialLines:
    """The open lines of all machines, by socket."""

    def __init__(self) -> None:
        self._lines: dict[Path, _Line] = {}

    async def type_into(self, path: Path, stdio: Stdio) -> None:
        """Pass input on until it ends, or QEMU does. The line is opened once something is typed.

        Raises `Unavailable` when QEMU is not there.
        """
        async with AsyncExitStack() as stack:
            line: _Line | None = None
            while not isinstance(piece := await stdio.read(), EndOfInput):
                # A serial line has no size to change.
                if not isinstance(piece, Data):
                    continue
                if line is None:
                    line = await stack.enter_async_context(self._line(path))
                await line.send(piece.data)

    @asynccontextmanager
    async def _line(self, path: Path) -> AsyncIterator[_Line]:
        line = self._lines.get(path)
        if line is None or line.over:
            line = self._lines[path] = _Line(path)
        line.users += 1
        try:
            await line.opened()
            yield line
        finally:
            line.users -= 1
            if not line.users:
                if self._lines.get(path) is line:
                    del self._lines[path]
                await line.close()


class _Line:
    """One connection, for as many as type. What QEMU says on it is in the log too, and thrown away here."""

    def __init__(self, path: Path) -> None:
        self.users = 0
        self._path = path
        self._ready: asyncio.Future[asyncio.StreamWriter] = asyncio.get_running_loop().create_future()
        self._turn = asyncio.Lock()
        self._task = asyncio.create_task(self._hold())

    @property
    def over(self) -> bool:
        return self._task.done()

    async def opened(self) -> None:
        await asyncio.shield(self._ready)

    async def send(self, data: bytes) -> None:
        """Raises `Unavailable` when QEMU is gone."""
        if self._task.done():
            raise Unavailable("the machine has ended")
        async with self._turn:
            await send(self._ready.result(), data)

    async def close(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        # Of nobody's interest any more.
        if self._ready.done() and not self._ready.cancelled():
            self._ready.exception()

    async def _hold(self) -> None:
        """The guest stands still while it talks to a client that does not listen: everything is taken at once."""
        try:
            async with connect(self._path) as (reader, writer):
                self._ready.set_result(writer)
                while await receive(reader):
                    pass
        except Unavailable as error:
            self._ready.set_exception(error)
