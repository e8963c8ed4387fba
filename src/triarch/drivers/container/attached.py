"""A far end on a container's own input and output."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from triarch.drivers.base import Stdio
from triarch.drivers.container.monitor import Attachment, resize_console
from triarch.drivers.container.record import RunFiles
from triarch.host.pidfd import ProcessId, wait_for_end
from triarch.model.driver import Data, EndOfInput, Resize, Stream

# Of 8 KiB at most.
_PENDING_PIECES = 32


async def converse(
    attachment: Attachment, stdio: Stdio, files: RunFiles, first: ProcessId, *, takes_input: bool
) -> None:
    """Return when the container has ended and its output is delivered. Raises what the far end raises when it goes.

    A far end that does not read holds up the container, but not its end: what is left of its output when `first`, its
    first process, has ended waits here.
    """
    arrived = _Arrived()
    taking = asyncio.create_task(_take(attachment, arrived))
    ending = asyncio.create_task(_open_wide(first, arrived))
    output = asyncio.create_task(_deliver(arrived, stdio))
    feeding = asyncio.create_task(_feed(attachment, stdio, files, takes_input=takes_input))
    try:
        done, _ = await asyncio.wait((output, feeding), return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        await output
    finally:
        tasks = (taking, ending, output, feeding)
        for each in tasks:
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        attachment.close()


class _Arrived:
    """Output that came and was not delivered yet: a few pieces, or, once nobody makes any more, all of it."""

    def __init__(self) -> None:
        self.pieces: asyncio.Queue[tuple[Stream, bytes] | None] = asyncio.Queue()
        self._room = asyncio.Semaphore(_PENDING_PIECES)
        self._wide = False

    async def put(self, piece: tuple[Stream, bytes]) -> None:
        if not self._wide:
            await self._room.acquire()
        self.pieces.put_nowait(piece)

    def delivered(self) -> None:
        self._room.release()

    def open_wide(self) -> None:
        """From now on there is room for everything."""
        self._wide = True
        self._room.release()


async def _take(attachment: Attachment, arrived: _Arrived) -> None:
    try:
        async for piece in attachment.output():
            await arrived.put(piece)
    finally:
        arrived.pieces.put_nowait(None)


async def _open_wide(first: ProcessId, arrived: _Arrived) -> None:
    await wait_for_end(first)
    arrived.open_wide()


async def _deliver(arrived: _Arrived, stdio: Stdio) -> None:
    while (piece := await arrived.pieces.get()) is not None:
        await stdio.write(*piece)
        arrived.delivered()


async def type_into(stdio: Stdio, files: RunFiles, *, takes_input: bool) -> None:
    """Pass input on to the console until it ends. The monitor is attached to once something is typed."""
    attachment: Attachment | None = None
    draining: asyncio.Task[None] | None = None
    try:
        while not isinstance(piece := await stdio.read(), EndOfInput):
            if isinstance(piece, Resize):
                resize_console(files, piece)
            elif takes_input:
                if attachment is None:
                    attachment = await Attachment.open(files)
                    draining = asyncio.create_task(_drain(attachment))
                await attachment.send(piece.data)
    except ConnectionError:
        # The container has ended.
        return
    finally:
        if draining is not None:
            draining.cancel()
            await asyncio.gather(draining, return_exceptions=True)
        if attachment is not None:
            attachment.close()


async def _drain(attachment: Attachment) -> None:
    """The monitor stands still, and its container, while an attached socket is full: what comes is in the log too."""
    async for _ in attachment.output():
        pass


async def _feed(attachment: Attachment, stdio: Stdio, files: RunFiles, *, takes_input: bool) -> None:
    while True:
        piece = await stdio.read()
        if isinstance(piece, EndOfInput):
            break
        if isinstance(piece, Resize):
            resize_console(files, piece)
        elif isinstance(piece, Data) and takes_input:
            with suppress(ConnectionError):
                await attachment.send(piece.data)
    if takes_input:
        attachment.end_input()
