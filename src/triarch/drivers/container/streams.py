"""Moving bytes between descriptors and a far end, with back pressure."""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress

# As much as anybody's pipe may hold (pipe(7)): a command that writes small pieces is then seldom made to wait.
PIPE_BYTES = 1 << 20
# What a unix socket takes at once: the rest of a longer message would be copied, and moved with each piece that goes.
CHUNK_BYTES = 128 << 10


async def copy_until(fd: int, sink: Callable[[bytes], Awaitable[None]], ended: asyncio.Future[int]) -> None:
    """Pass on what a non-blocking descriptor gives, until its end, or until `ended` and nothing more is there now.

    Whatever was written to it before `ended` is passed on; what others that still hold it write later is not.
    """
    while True:
        # Asked before the read: what comes between the two is still read.
        last = ended.done()
        try:
            data = os.read(fd, CHUNK_BYTES)
        except BlockingIOError:
            if last:
                return
            await _ready(fd, writing=False, ended=ended)
            continue
        except OSError:
            # A pseudo-terminal that nobody is left on.
            return
        if not data:
            return
        await sink(data)


async def write_all(fd: int, data: bytes) -> None:
    """Write to a non-blocking descriptor. Raises `BrokenPipeError` or another `OSError` when nobody reads any more."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            await _ready(fd, writing=True)


async def readable(fd: int) -> None:
    """Return when a read would not block."""
    await _ready(fd, writing=False)


async def _ready(fd: int, *, writing: bool, ended: asyncio.Future[int] | None = None) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    add, remove = (loop.add_writer, loop.remove_writer) if writing else (loop.add_reader, loop.remove_reader)
    add(fd, _wake, ready)
    try:
        await asyncio.wait((ready, *(() if ended is None else (ended,))), return_when=asyncio.FIRST_COMPLETED)
    finally:
        remove(fd)


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


def pipe_for_child(*, child_writes: bool) -> tuple[int, int]:
    """(ours, the child's): ours does not block, neither is inherited by other programs."""
    read_fd, write_fd = os.pipe()
    # Refused where a user's pipes hold too much already.
    with suppress(OSError):
        fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    ours, theirs = (read_fd, write_fd) if child_writes else (write_fd, read_fd)
    os.set_blocking(ours, False)
    return ours, theirs
