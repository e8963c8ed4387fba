"""A far end on a container's own input and output."""

from __future__ import annotations

import asyncio
from contextlib import suppress

from triarch.drivers.base import Stdio
from triarch.drivers.container.monitor import Attachment, resize_console
from triarch.drivers.container.record import RunFiles
from triarch.model.driver import Data, EndOfInput, Resize


async def converse(attachment: Attachment, stdio: Stdio, files: RunFiles, *, takes_input: bool) -> None:
    """Return when the container has ended and its output is delivered. Raises what the far end raises when it goes."""
    output = asyncio.create_task(_deliver(attachment, stdio))
    feeding = asyncio.create_task(_feed(attachment, stdio, files, takes_input=takes_input))
    try:
        done, _ = await asyncio.wait((output, feeding), return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        await output
    finally:
        for task in (output, feeding):
            task.cancel()
        await asyncio.gather(output, feeding, return_exceptions=True)
        attachment.close()


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


async def _deliver(attachment: Attachment, stdio: Stdio) -> None:
    async for stream, data in attachment.output():
        await stdio.write(stream, data)


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
