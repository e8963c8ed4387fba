"""A far end as a socket that a program can have as its input and output."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Protocol, runtime_checkable

from triarch.model.driver import Data, EndOfInput, Input, Stream

_CHUNK_BYTES = 256 << 10


class Stdio(Protocol):
    """The far end (as `triarch.drivers.base.Stdio`)."""

    async def read(self) -> Input: ...

    async def write(self, stream: Stream, data: bytes) -> None: ...


@runtime_checkable
class Direct(Protocol):
    """A far end that is a socket itself: what is said need not go through this process."""

    def fileno(self) -> int: ...


async def carry(stdio: Stdio, run: Callable[[int], Awaitable[object]]) -> None:
    """Do `run` with a connected socket (which stays the caller's) at the other end of which is `stdio`.

    Returns when `run` has returned and all that was written is delivered. A far end that is gone cancels `run`.
    """
    if isinstance(stdio, Direct):
        await run(stdio.fileno())
        return
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        running = asyncio.ensure_future(run(theirs.fileno()))
        delivering = asyncio.ensure_future(_deliver(ours, stdio))
        feeding = asyncio.ensure_future(_feed(ours, stdio))
        pending: set[asyncio.Future[object]] = {running, delivering, feeding}  # type: ignore[arg-type]
        try:
            while not running.done():
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            # The program's own end is closed by now: with this one the last writer goes.
            theirs.close()
            await delivering
        finally:
            for task in (running, delivering, feeding):
                task.cancel()
            await asyncio.gather(running, delivering, feeding, return_exceptions=True)


async def _deliver(ours: socket.socket, stdio: Stdio) -> None:
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(ours, _CHUNK_BYTES):
        await stdio.write(Stream.STDOUT, data)


async def _feed(ours: socket.socket, stdio: Stdio) -> None:
    loop = asyncio.get_running_loop()
    while True:
        piece = await stdio.read()
        if isinstance(piece, EndOfInput):
            break
        if isinstance(piece, Data):
            # A program that ended has no use for more.
            with suppress(BrokenPipeError, ConnectionResetError):
                await loop.sock_sendall(ours, piece.data)
    with suppress(OSError):
        ours.shutdown(socket.SHUT_WR)
