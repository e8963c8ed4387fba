"""A machine's console log on disk: `console.log`, its one predecessor, and beside each an index of when it was written.

A file is never longer than `MAX_LOG_BYTES` when somebody looks after it, so that a machine that talks without end keeps
two of them. The index (`console.times`) is a row of records, an offset and a time: what stands at and after the offset
was written then, or up to a second from then; the next record tells what follows. The last record is written over by
each look at the log: up to there everything is dated, and what comes after it is not yet. The index grows by one record
a second at most, and is begun anew with its log.
"""

from __future__ import annotations

import os
import shutil
import struct
import time
from bisect import bisect_left
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import msgspec

MAX_LOG_BYTES = 16 << 20
STEP_SECONDS = 1.0
_RECORD = struct.Struct("<Qd")
# Of an index that has grown longer, its log is begun anew: nine hours of a line a second.
_MAX_INDEX_BYTES = _RECORD.size << 15


class Mark(msgspec.Struct, frozen=True):
    """What stands at `offset` was written at `at_seconds` (of the epoch)."""

    offset: int
    at_seconds: float


class Dates(msgspec.Struct, frozen=True):
    """When what a log holds was written. What comes after `dated_bytes` was written since."""

    marks: tuple[Mark, ...]
    dated_bytes: int


_NO_MARK = Mark(0, float("-inf"))


def predecessor_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.1")


def index_of(path: Path) -> Path:
    """The index of `console.log` or of its predecessor."""
    name = path.name.removesuffix(".1")
    return path.with_name(path.name.replace(name, f"{name.removesuffix('.log')}.times", 1))


class ConsoleLog:
    """The writer's side. One object at a time writes, or looks after what somebody else (QEMU) appends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._index = index_of(path)
        self._last: Mark | None = None
        self._marks = 0
        self._seen_bytes = -1

    def append(self, data: bytes, marks: Iterable[Mark]) -> None:
        """Add to the end; offsets of `marks` count from the beginning of `data`. Raises `OSError`."""
        size = self._size()
        if size and self._is_full(size + len(data)):
            self.path.replace(predecessor_of(self.path))
            self._replace_index()
            size = 0
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
        self._note([Mark(size + mark.offset, mark.at_seconds) for mark in marks], size + len(data))

    def look_after(self) -> None:
        """Note how far it has grown, and cut it when it is too long; what its writer adds just then is lost.

        The writer appends (O_APPEND), so that its next write goes to the new beginning. Raises `OSError`.
        """
        status = self.path.stat()
        if self._seen_bytes < 0:
            # Of another daemon, or of nobody: what came since its last record is as old as the last write at most.
            self._seen_bytes = min(read_dates(self.path).dated_bytes, status.st_size)
        if status.st_size > self._seen_bytes:
            self._note([Mark(self._seen_bytes, status.st_mtime)], status.st_size)
        self._seen_bytes = status.st_size
        if self._is_full(status.st_size):
            self._cut()

    def _cut(self) -> None:
        # Never more than was too long, whatever the guest said while nobody looked.
        with self.path.open("rb") as log, predecessor_of(self.path).open("wb") as predecessor:
            os.fchmod(predecessor.fileno(), 0o600)
            skipped = max(0, log.seek(0, os.SEEK_END) - MAX_LOG_BYTES)
            log.seek(skipped)
            shutil.copyfileobj(log, predecessor, 1 << 20)
        os.truncate(self.path, 0)
        self._replace_index(skipped)
        self._seen_bytes = 0

    def _is_full(self, size: int) -> bool:
        return size > MAX_LOG_BYTES or self._index_size() > _MAX_INDEX_BYTES

    def _size(self) -> int:
        try:
            return self.path.lstat().st_size
        except FileNotFoundError:
            return 0

    def _index_size(self) -> int:
        try:
            return self._index.stat().st_size
        except FileNotFoundError:
            return 0

    def _note(self, marks: list[Mark], size: int) -> None:
        """Date what is there now, `size` bytes."""
        last = self._take_up_index(size) if self._last is None else self._last
        fresh = []
        for mark in marks:
            if not last.at_seconds <= mark.at_seconds < last.at_seconds + STEP_SECONDS:
                last = mark
                fresh.append(mark)
        self._last = last
        records = b"".join(_RECORD.pack(mark.offset, mark.at_seconds) for mark in (*fresh, Mark(size, last.at_seconds)))
        fd = os.open(self._index, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.pwrite(fd, records, self._marks * _RECORD.size)
        finally:
            os.close(fd)
        self._marks += len(fresh)

    def _take_up_index(self, size: int) -> Mark:
        """What another object wrote of this log; the last mark in it."""
        known = read_dates(self.path)
        if known.dated_bytes > size:
            # A crash between beginning a log anew and beginning its index anew.
            self._replace_index()
            return _NO_MARK
        self._marks = len(known.marks)
        return known.marks[-1] if known.marks else _NO_MARK

    def _replace_index(self, skipped: int = 0) -> None:
        """The index goes with its log, whose first `skipped` bytes were left out."""
        self._last, self._marks = _NO_MARK, 0
        with suppress(FileNotFoundError):
            self._index.replace(index_of(predecessor_of(self.path)))
        if skipped:
            kept = [m for m in _read_index(predecessor_of(self.path)) if m.offset >= skipped]
            packed = b"".join(_RECORD.pack(mark.offset - skipped, mark.at_seconds) for mark in kept)
            index_of(predecessor_of(self.path)).write_bytes(packed)


def append_now(path: Path, data: bytes) -> None:
    """Add what was written just now. Raises `OSError`."""
    ConsoleLog(path).append(data, (Mark(0, time.time()),))


def read_dates(path: Path) -> Dates:
    """Of a log; there are none for one that nobody dated."""
    index = _read_index(path)
    return Dates(index[:-1], index[-1].offset) if index else Dates((), 0)


def _read_index(path: Path) -> tuple[Mark, ...]:
    """All records; half a record at the end, which a crash left, counts for nothing."""
    try:
        data = index_of(path).read_bytes()
    except FileNotFoundError:
        return ()
    whole = len(data) - len(data) % _RECORD.size
    return tuple(Mark(*fields) for fields in _RECORD.iter_unpack(data[:whole]))


def offset_since(marks: tuple[Mark, ...], at_seconds: float) -> int | None:
    """Where what was written at `at_seconds` or later begins, up to a second too early; None when there is nothing."""
    # What a record stands for goes on for a second.
    found = bisect_left(marks, at_seconds - STEP_SECONDS, key=lambda mark: mark.at_seconds)
    return marks[found].offset if found < len(marks) else None
