"""Reading a console log that is still being written."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

CHUNK_BYTES = 65536
POLL_SECONDS = 0.1


async def follow_log(path: Path, running: Callable[[], bool]) -> AsyncIterator[bytes]:
    """What the file holds, then what is appended while `running()`; a file that is not there yet is empty."""
    offset = 0
    while True:
        more = running()
        while chunk := await asyncio.to_thread(_read, path, offset):
            offset += len(chunk)
            yield chunk
        if not more:
            return
        await asyncio.sleep(POLL_SECONDS)


def _read(path: Path, offset: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(CHUNK_BYTES)
    except FileNotFoundError:
        return b""
