"""Reading a console log that is still being written."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import BinaryIO

CHUNK_BYTES = 65536
POLL_SECONDS = 0.1


class LogReader:
    """Reads on in a log, from its predecessor's beginning to whatever comes.

    Who writes a log that has grown long either renames it to its predecessor, `NAME.1`, and begins a new file, or
    copies it there and cuts it. A file that is not there yet is empty.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: BinaryIO | None = None
        self._predecessor = _open(path.with_name(f"{path.name}.1"))

    def close(self) -> None:
        for file in (self._predecessor, self._file):
            if file is not None:
                file.close()

    def read(self) -> bytes:
        """The next piece; empty when there is none now."""
        if self._predecessor is not None:
            if data := self._predecessor.read(CHUNK_BYTES):
                return data
            self._predecessor.close()
            self._predecessor = None
        if self._file is None:
            self._file = _open(self._path)
        if self._file is None:
            return b""
        return self._file.read(CHUNK_BYTES) or self._read_new(self._file)

    def _read_new(self, file: BinaryIO) -> bytes:
        """At the end of `file`: what it got last before it was replaced, or the beginning of what replaced it."""
        try:
            now = self._path.stat()
        except FileNotFoundError:
            return b""
        if now.st_ino == os.fstat(file.fileno()).st_ino:
            if now.st_size < file.tell():
                file.seek(0)
        elif not (last := file.read(CHUNK_BYTES)):
            file.close()
            self._file = file = self._path.open("rb", buffering=0)
        else:
            return last
        return file.read(CHUNK_BYTES)


async def follow_log(path: Path, running: Callable[[], bool]) -> AsyncIterator[bytes]:
    """What was kept, then what is appended while `running()`."""
    reader = await asyncio.to_thread(LogReader, path)
    try:
        while True:
            more = running()
            while chunk := await asyncio.to_thread(reader.read):
                yield chunk
            if not more:
                return
            await asyncio.sleep(POLL_SECONDS)
    finally:
        reader.close()


def _open(path: Path) -> BinaryIO | None:
    try:
        # Unbuffered: a buffer would not see that the file was cut.
        return path.open("rb", buffering=0)
    except FileNotFoundError:
        return None
