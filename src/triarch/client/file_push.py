"""From here into a machine."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterable
from typing import BinaryIO

import msgspec

from triarch.client.file_faults import FULL
from triarch.client.file_link import FileLink
from triarch.client.file_local import (
    RESUMABLE_BYTES,
    Report,
    Transfer,
    describe,
    extents,
    partial_name,
    sha256_of,
    tag_of,
    xattrs_of,
)
from triarch.errors import Failed, Invalid
from triarch.model.file_protocol import (
    MAX_DATA_BYTES,
    FileEntry,
    FileFault,
    FileKind,
    Flag,
    Frame,
    decode_entry,
    decode_fault,
    decode_finish,
    hash_request,
    stat_request,
)

_ALL_MODES = 0o7777
# How often the machine's complaints are looked at: a full disk should end a long copy soon.
_FILES_BETWEEN_LOOKS = 64


class Overrides(msgspec.Struct, frozen=True, kw_only=True):
    """What objects get in the machine instead of what they have here; None keeps it."""

    uid: int | None = None
    gid: int | None = None
    mode: int | None = None


class Skipped(msgspec.Struct, frozen=True, kw_only=True):
    """Something that was not copied, and why."""

    name: str
    reason: str


class Push:
    """One copy of any number of local trees. `faults` and `skipped` are what did not work."""

    def __init__(self, link: FileLink, overrides: Overrides, report: Report) -> None:
        self._link = link
        self._overrides = overrides
        self._report = report
        self._links: dict[tuple[int, int], bytes] = {}
        # Who may not give files away here owns what arrives there as the machine's root.
        self._owners = os.geteuid() == 0
        self.transfer = Transfer()
        self.faults: tuple[FileFault, ...] = ()
        self.skipped: list[Skipped] = []
        self.largest_bytes = 0
        # Files that are gone on with: their names here by those there.
        self._resumed: dict[bytes, bytes] = {}

    def tree(self, source: bytes, target: bytes, *, recursive: bool) -> None:
        """Copy `source` to the path `target`. Without `recursive` a link is followed.

        Raises `OSError` for a source that cannot be read, and `Invalid` for a directory without `recursive`.
        """
        status = os.lstat(source) if recursive else os.stat(source)  # noqa: PTH116
        if stat.S_ISDIR(status.st_mode) and not recursive:
            raise Invalid(f"'{os.fsdecode(source)}' is a directory", hint="triarch file push -r …")
        self._object(source, target, status)

    def sync(self) -> None:
        """Return when the machine has it all. What another copy of the same file was in the way of is sent again."""
        self.faults += self._link.sync()
        again = [fault for fault in self.faults if fault.number == errno.EAGAIN and fault.path in self._resumed]
        if again:
            self.faults = tuple(fault for fault in self.faults if fault not in again)
            for fault in again:
                self._file(self._resumed.pop(fault.path), fault.path)
            self.faults += self._link.sync()

    def _dressed(self, entry: FileEntry) -> FileEntry:
        over = self._overrides
        uid = over.uid if over.uid is not None else entry.uid if self._owners else 0
        gid = over.gid if over.gid is not None else entry.gid if self._owners else 0
        mode = entry.mode if over.mode is None or entry.kind is FileKind.SYMLINK else over.mode
        if over.mode is not None and entry.kind is FileKind.DIRECTORY:
            # As chmod's X: a directory that can be read can be entered.
            mode |= (mode & 0o444) >> 2
        return msgspec.structs.replace(entry, uid=uid, gid=gid, mode=mode & _ALL_MODES)

    def _object(self, source: bytes, target: bytes, status: os.stat_result) -> None:
        if stat.S_ISREG(status.st_mode):
            self._name(source, target, status)
        elif stat.S_ISDIR(status.st_mode):
            self._directory(source, target, status)
        elif stat.S_ISLNK(status.st_mode):
            self._link.begin(self._dressed(describe(target, status, os.readlink(source))))  # noqa: PTH115
        elif stat.S_ISFIFO(status.st_mode):
            self._link.begin(self._dressed(describe(target, status)))
        else:
            self.skipped.append(Skipped(name=os.fsdecode(source), reason="devices and sockets are not copied"))

    def _directory(self, source: bytes, target: bytes, status: os.stat_result) -> None:
        entry = self._dressed(describe(target, status))
        self._link.begin(msgspec.structs.replace(entry, xattrs=xattrs_of(source)))
        for name, below in _listing(source):
            try:
                self._object(source + b"/" + name, target + b"/" + name, below)
            except OSError as error:
                self.skipped.append(Skipped(name=os.fsdecode(source + b"/" + name), reason=_reason(error)))
        # What was made in it has changed its time.
        self._link.begin(msgspec.structs.replace(entry, flags=Flag.TIMES_ONLY))

    def _name(self, source: bytes, target: bytes, status: os.stat_result) -> None:
        """A file, or one more name of one that was sent."""
        if status.st_nlink > 1:
            first = self._links.setdefault((status.st_dev, status.st_ino), target)
            if first != target:
                linked = self._dressed(describe(target, status, first))
                self._link.begin(msgspec.structs.replace(linked, kind=FileKind.LINK))
                return
        self._file(source, target, resume=True)

    def _file(self, source: bytes, target: bytes, *, resume: bool = False) -> None:
        fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise OSError(0, "it is no ordinary file any more")
            self._send(fd, source, target, status, resume=resume)
        finally:
            os.close(fd)

    def _send(self, fd: int, source: bytes, target: bytes, status: os.stat_result, *, resume: bool) -> None:
        entry = msgspec.structs.replace(self._dressed(describe(target, status)), xattrs=xattrs_of(fd))
        size = status.st_size
        self.largest_bytes = max(self.largest_bytes, size)
        self.transfer.name = os.fsdecode(target)
        offset = 0
        if size >= RESUMABLE_BYTES:
            tag = tag_of(target, b"%d %d" % (size, status.st_mtime_ns))
            offset = self._resumed_at(fd, target, tag, size) if resume else 0
            if offset:
                self._resumed[target] = source
            entry = msgspec.structs.replace(entry, tag=tag, offset=offset)
        self._link.begin(entry)
        self.transfer.done_bytes += offset
        if size <= MAX_DATA_BYTES and status.st_blocks * 512 >= size:
            data = os.pread(fd, size, 0)
            self._link.data(0, data)
            size = len(data)
            self._count(size)
        else:
            for start, end in extents(fd, status, offset):
                size = self._extent(fd, start, end, size)
        self._link.end(size)
        self.transfer.files += 1
        self._report(self.transfer)
        if self.transfer.files % _FILES_BETWEEN_LOOKS == 0:
            self._look()

    def _extent(self, fd: int, at: int, end: int, size: int) -> int:
        """Send one; the size of the file, which is less than was told when it was cut meanwhile."""
        while at < end:
            sent = self._link.data_from(fd, at, end - at)
            if not sent:
                return at
            at += sent
            self._count(sent)
            self._look()
        return size

    def _count(self, size_bytes: int) -> None:
        self.transfer.done_bytes += size_bytes
        self._report(self.transfer)

    def _look(self) -> None:
        """A disk that is full stays so: sending on would be for nothing."""
        if any(fault.number in FULL for fault in self._link.complaints):
            raise Full

    def _resumed_at(self, fd: int, target: bytes, tag: int, size_bytes: int) -> int:
        """How much of this very file an interrupted copy has left in the machine."""
        partial = os.path.join(os.path.dirname(target), partial_name(tag))  # noqa: PTH118, PTH120
        self.faults += self._link.sync()
        self._link.send(stat_request(partial))
        kind, payload = self._link.next()
        if kind is Frame.ERROR:
            decode_fault(payload)
            return 0
        there = decode_entry(payload)
        if there.kind is not FileKind.FILE or not 0 < there.size_bytes <= size_bytes:
            return 0
        self._link.send(hash_request(partial, there.size_bytes))
        kind, payload = self._link.next()
        if kind is not Frame.FINISH:
            return 0
        found = decode_finish(payload)
        same = found.size_bytes == there.size_bytes and found.sha256 == sha256_of(fd, there.size_bytes)
        return there.size_bytes if same else 0

    def stream(self, source: BinaryIO, target: bytes) -> None:
        """Copy everything that `source` has to `target`, whose size nobody knows before."""
        mode = 0o644 if self._overrides.mode is None else self._overrides.mode
        entry = FileEntry(path=target, kind=FileKind.FILE, mode=mode, modified_ns=_now_ns())
        over = self._overrides
        self._link.begin(msgspec.structs.replace(entry, uid=over.uid or 0, gid=over.gid or 0))
        offset = 0
        while piece := source.read(MAX_DATA_BYTES):
            self._link.data(offset, piece)
            offset += len(piece)
            self._count(len(piece))
            self._look()
        self.largest_bytes = max(self.largest_bytes, offset)
        self._link.end(offset)
        self.transfer.files += 1


class Full(Failed):
    """The machine's disk is full; what `sync` returns says more."""

    def __init__(self) -> None:
        super().__init__("the machine's disk is full")


def _listing(directory: bytes) -> Iterable[tuple[bytes, os.stat_result]]:
    with os.scandir(directory) as entries:
        for entry in entries:
            try:
                yield entry.name, entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue  # gone since it was listed


def _reason(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _now_ns() -> int:
    import time

    return time.time_ns()
