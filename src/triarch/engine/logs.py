"""Reading a console log that is still being written."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import msgspec

from triarch.host.console_log import offset_since, predecessor_of, read_dates
from triarch.host.inotify import Inotify

CHUNK_BYTES = 128 << 10
# Growth is told; what is not told (a file system without notices, a machine's end) is looked after so often.
LOOK_SECONDS = 0.25
# A line that is longer may be begun in its middle.
_MAX_LINE_BYTES = 64 << 10


class Beginning(msgspec.Struct, frozen=True, kw_only=True):
    """Where to begin: at all that was kept, narrowed by each that is given."""

    since_seconds: float | None = None
    tail_lines: int | None = None
    tail_bytes: int | None = None


EVERYTHING = Beginning()


class LogReader:
    """Reads on in a log, from a beginning to whatever comes. What is not there yet is empty.

    Who writes a log that has grown long either renames it to its predecessor and begins a new file, or copies it there
    and cuts it. A reader that is too slow for that goes on at the beginning of what is there when it looks.
    """

    def __init__(self, path: Path, beginning: Beginning = EVERYTHING) -> None:
        self.path = path
        self._file = _open(path)
        self._predecessor = _open(predecessor_of(path))
        if self._predecessor is not None and self._file is not None and _same(self._predecessor, self._file):
            # It was begun anew between the two.
            self._predecessor.close()
            self._predecessor = None
        for file, offset in _place(path, self._predecessor, self._file, beginning):
            file.seek(offset)

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
            self._file = _open(self.path)
        if self._file is None:
            return b""
        return self._file.read(CHUNK_BYTES) or self._read_new(self._file)

    def _read_new(self, file: BinaryIO) -> bytes:
        """At the end of `file`: what it got last before it was replaced, or the beginning of what replaced it."""
        try:
            now = self.path.stat()
        except FileNotFoundError:
            return b""
        if now.st_ino == os.fstat(file.fileno()).st_ino:
            if now.st_size < file.tell():
                file.seek(0)
        elif not (last := file.read(CHUNK_BYTES)):
            file.close()
            self._file = file = self.path.open("rb", buffering=0)
        else:
            return last
        return file.read(CHUNK_BYTES)


class LogWatch:
    """Tells any number of readers when logs grow, by one queue of the kernel's, which is there while somebody reads.

    A user has few such queues (`fs.inotify.max_user_instances`). Made and used in the event loop.
    """

    def __init__(self) -> None:
        self._inotify: Inotify | None = None
        self._waiting: dict[int, list[asyncio.Event]] = {}

    @contextmanager
    def growth(self, path: Path) -> Iterator[asyncio.Event]:
        """An event that is set whenever something in the log's directory was written."""
        event = asyncio.Event()
        watch = self._watch(path)
        self._waiting.setdefault(watch, []).append(event)
        try:
            yield event
        finally:
            events = self._waiting.get(watch, [])
            if event in events:
                events.remove(event)
            if not events and self._inotify is not None:
                self._waiting.pop(watch, None)
                self._inotify.forget(watch)
            if not self._waiting:
                self.close()

    def close(self) -> None:
        if self._inotify is not None:
            asyncio.get_running_loop().remove_reader(self._inotify.fd)
            self._inotify.close()
            self._inotify = None
        self._waiting.clear()

    def _watch(self, path: Path) -> int:
        """The kernel's number for the directory; -1 where it has none to give."""
        try:
            if self._inotify is None:
                self._inotify = Inotify()
                asyncio.get_running_loop().add_reader(self._inotify.fd, self._notice)
            return self._inotify.watch_directory(str(path.parent))
        except OSError:
            return -1

    def _notice(self) -> None:
        assert self._inotify is not None
        for watch in self._inotify.read():
            for event in self._waiting.get(watch, ()):
                event.set()


async def follow_log(
    path: Path, watch: LogWatch, running: Callable[[], bool], beginning: Beginning = EVERYTHING
) -> AsyncIterator[bytes]:
    """What was kept, then what is appended while `running()`. Who takes it slowly holds up nobody else."""
    reader = await asyncio.to_thread(LogReader, path, beginning)
    try:
        async with aclosing(read_on(reader, watch, running)) as pieces:
            async for piece in pieces:
                yield piece
    finally:
        reader.close()


async def read_on(reader: LogReader, watch: LogWatch, running: Callable[[], bool]) -> AsyncGenerator[bytes, None]:
    """As `follow_log`, from where `reader` is."""
    with watch.growth(reader.path) as growth:
        while True:
            growth.clear()
            more = running()
            while chunk := await asyncio.to_thread(reader.read):
                yield chunk
            if not more:
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_SECONDS):
                    await growth.wait()


def _open(path: Path) -> BinaryIO | None:
    try:
        # Unbuffered: a buffer would not see that the file was cut.
        return path.open("rb", buffering=0)
    except FileNotFoundError:
        return None


def _same(one: BinaryIO, other: BinaryIO) -> bool:
    return os.path.samestat(os.fstat(one.fileno()), os.fstat(other.fileno()))


def _place(
    path: Path, predecessor: BinaryIO | None, file: BinaryIO | None, beginning: Beginning
) -> Iterator[tuple[BinaryIO, int]]:
    """Where to begin in each file: the later of what each wish says."""
    lines, size = beginning.tail_lines, beginning.tail_bytes
    for each, its_path in ((file, path), (predecessor, predecessor_of(path))):
        if each is None:
            continue
        end = os.fstat(each.fileno()).st_size
        offsets = [0]
        if lines is not None:
            offset, lines = _last_lines(each, end, lines)
            offsets.append(offset)
        if size is not None:
            offsets.append(_line_after(each, end, end - size))
            size = max(0, size - end)
        if beginning.since_seconds is not None:
            offsets.append(_since(each, end, its_path, beginning.since_seconds))
        yield each, max(offsets)


def _last_lines(file: BinaryIO, end: int, lines: int) -> tuple[int, int]:
    """Where the last `lines` lines begin, and how many of them are to be found before this file."""
    if not lines:
        return end, 0
    at, first = end, True
    while at:
        at, until = max(0, at - CHUNK_BYTES), at
        piece = os.pread(file.fileno(), until - at, at)
        stop = len(piece)
        if first and piece.endswith(b"\n"):
            stop -= 1
        first = False
        while (found := piece.rfind(b"\n", 0, stop)) >= 0:
            lines -= 1
            if not lines:
                return at + found + 1, 0
            stop = found
    return 0, lines - 1 if end else lines


def _line_after(file: BinaryIO, end: int, offset: int) -> int:
    """The beginning of the first line after `offset`."""
    if offset <= 0:
        return 0
    piece = os.pread(file.fileno(), _MAX_LINE_BYTES, offset - 1)
    found = piece.find(b"\n")
    return min(end, offset + found) if found >= 0 else offset


def _since(file: BinaryIO, end: int, path: Path, at_seconds: float) -> int:
    """The beginning of the line that was being written at that time. Of a log that nobody dated it is all."""
    dates = read_dates(path)
    if not dates.marks:
        return 0
    offset = offset_since(dates.marks, at_seconds)
    if offset is None:
        return min(end, dates.dated_bytes)
    start = max(0, offset - _MAX_LINE_BYTES)
    before = os.pread(file.fileno(), offset - start, start)
    return start + before.rfind(b"\n") + 1 if b"\n" in before or not start else offset
