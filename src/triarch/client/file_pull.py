"""From a machine to here."""

from __future__ import annotations

import os
from typing import BinaryIO

import msgspec

from triarch.client.file_faults import error_of_fault
from triarch.client.file_link import FileLink
from triarch.client.file_local import RESUMABLE_BYTES, Report, Transfer, Writer, partial_name, sha256_of, tag_of
from triarch.client.file_push import Skipped
from triarch.errors import Damaged, Invalid, NotFound
from triarch.model.file_protocol import (
    MAX_UNSIZED_BYTES,
    FileEntry,
    FileFault,
    FileKind,
    Flag,
    Frame,
    decode_data,
    decode_entry,
    decode_fault,
    decode_finish,
    get_request,
    hash_request,
    stat_request,
)

_KINDS_NOT_MADE = (FileKind.CHARACTER_DEVICE, FileKind.BLOCK_DEVICE, FileKind.SOCKET)
_HOLE_BYTES = 1 << 20
_EXDEV = 18
_DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class Pull:
    """One copy of a tree out of a machine. `faults` and `skipped` are what did not work."""

    def __init__(self, link: FileLink, machine: str, report: Report, *, trusted: bool) -> None:
        self._link = link
        self._machine = machine
        self._report = report
        self._trusted = trusted
        self.transfer = Transfer()
        self.faults: list[FileFault] = []
        self.skipped: list[Skipped] = []
        self.disarmed = 0
        self._last: FileEntry | None = None
        self._source = b""

    def _named(self, path: bytes) -> str:
        """An object of the tree as people know it."""
        return self._machine + os.fsdecode(self._source.rstrip(b"/") + (b"/" + path if path else b""))

    def look(self, source: bytes, *, follow: bool) -> FileEntry:
        """What is at a path. Raises `NotFound` and others."""
        self._link.send(stat_request(source, Flag.FOLLOW if follow else Flag.NONE))
        kind, payload = self._link.next()
        if kind is Frame.ERROR:
            raise error_of_fault(self._machine, "pull", decode_fault(payload))
        if kind is not Frame.ENTRY:
            raise Damaged(f"the file server answered a question about a file with {kind.name}")
        return decode_entry(payload)

    def tree(self, source: bytes, directory: bytes, name: bytes, *, recursive: bool) -> None:
        """Copy to `name` in the local `directory`. Raises `Invalid` for a directory without `recursive`."""
        found = self.look(source, follow=not recursive)
        self._source = source
        if found.kind is FileKind.DIRECTORY and not recursive:
            raise Invalid(
                f"'{self._machine}{os.fsdecode(source)}' is a directory",
                hint=f"triarch file pull -r {self._machine}{os.fsdecode(source)} …",
            )
        parent_fd = os.open(directory, _DIRECTORY_FLAGS)
        try:
            writer = Writer(parent_fd, name, trusted=self._trusted)
            try:
                self._receive(writer, source, found, parent_fd, recursive=recursive)
            finally:
                writer.close()
                self.disarmed += writer.disarmed
        finally:
            os.close(parent_fd)

    def _receive(self, writer: Writer, source: bytes, found: FileEntry, parent_fd: int, *, recursive: bool) -> None:
        partial, offset = None, 0
        if found.kind is FileKind.FILE:
            self.transfer.total_bytes = found.size_bytes
            if found.size_bytes >= RESUMABLE_BYTES:
                partial = partial_name(tag_of(source, b"%d %d" % (found.size_bytes, found.modified_ns)))
                offset = self._resumed_at(source, partial, parent_fd, found.size_bytes)
                self.transfer.done_bytes = offset
        self._link.send(get_request(source, Flag.RECURSIVE if recursive else Flag.FOLLOW, offset))
        while True:
            kind, payload = self._link.next()
            try:
                match kind:
                    case Frame.DATA:
                        at, data = decode_data(payload)
                        writer.write(at, data)
                        self.transfer.done_bytes += len(data)
                        self._report(self.transfer)
                    case Frame.ENTRY:
                        self._entry(writer, decode_entry(payload), partial, offset)
                    case Frame.FINISH:
                        self._finish(writer, decode_finish(payload).size_bytes)
                    case Frame.ERROR:
                        self._fault(decode_fault(payload))
                    case Frame.DONE:
                        return
                    case _:
                        raise Damaged(f"the file server sent {kind.name} in the middle of a tree")
            except OSError as error:
                writer.fail()
                name = self._named(b"" if self._last is None else self._last.path)
                self.skipped.append(Skipped(name=name, reason=(error.strerror or str(error)).lower()))

    def _entry(self, writer: Writer, entry: FileEntry, partial: bytes | None, offset: int) -> None:
        self._last = entry
        self.transfer.name = entry.name
        if entry.kind is FileKind.FILE:
            is_top = not entry.path
            writer.begin(entry, partial if is_top else None, offset if is_top else 0)
            return
        if entry.kind in _KINDS_NOT_MADE:
            self.skipped.append(Skipped(name=self._named(entry.path), reason="devices and sockets are not copied"))
            return
        writer.make(entry)
        self.transfer.files += entry.kind is not FileKind.DIRECTORY

    def _finish(self, writer: Writer, size_bytes: int) -> None:
        entry = self._last
        if entry is None:
            raise Damaged("the file server ended a file that it did not begin")
        if writer.is_writing:
            writer.end(size_bytes)
            self.transfer.files += 1
            self._report(self.transfer)
            if size_bytes < entry.size_bytes:
                reason = f"it was cut while it was read: {size_bytes} of {entry.size_bytes} bytes are here"
                self.skipped.append(Skipped(name=self._named(entry.path), reason=reason))

    def _fault(self, fault: FileFault) -> None:
        if fault.number == _EXDEV:
            self.skipped.append(Skipped(name=self._named(fault.path), reason="it belongs to the kernel"))
        else:
            path = fault.path if fault.path.startswith(b"/") else self._source.rstrip(b"/") + b"/" + fault.path
            self.faults.append(msgspec.structs.replace(fault, path=path.rstrip(b"/")))

    def _resumed_at(self, source: bytes, partial: bytes, parent_fd: int, size_bytes: int) -> int:
        """How much of this very file an interrupted copy has left here."""
        try:
            fd = os.open(partial, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent_fd)
        except OSError:
            return 0
        try:
            here = os.fstat(fd).st_size
            if not 0 < here <= size_bytes:
                return 0
            self._link.send(hash_request(source, here))
            kind, payload = self._link.next()
            if kind is not Frame.FINISH:
                return 0
            there = decode_finish(payload)
            return here if there.size_bytes == here and there.sha256 == sha256_of(fd, here) else 0
        finally:
            os.close(fd)

    def stream(self, source: bytes, target: BinaryIO) -> None:
        """Copy one file's content to `target`. Raises `Invalid` for what has none."""
        found = self.look(source, follow=True)
        if found.kind is not FileKind.FILE:
            raise Invalid(f"'{self._machine}{os.fsdecode(source)}' is no file: it has no content")
        self.transfer.total_bytes = found.size_bytes
        self._link.send(get_request(source, Flag.FOLLOW))
        at, ended = 0, None
        while True:
            kind, payload = self._link.next()
            if kind is Frame.DATA:
                offset, data = decode_data(payload)
                if offset < at or offset + len(data) > (found.size_bytes or MAX_UNSIZED_BYTES):
                    raise Damaged("the file server sent a file's pieces in no order")
                _fill(target, offset - at)
                target.write(data)
                at = offset + len(data)
                self.transfer.done_bytes = at
                self._report(self.transfer)
            elif kind is Frame.FINISH:
                ended = decode_finish(payload).size_bytes
                _fill(target, min(ended, found.size_bytes) - at)
            elif kind is Frame.ERROR:
                raise error_of_fault(self._machine, "pull", decode_fault(payload))
            elif kind is Frame.DONE:
                break
        if ended is None:
            raise NotFound(f"'{self._machine}{os.fsdecode(source)}' went away while it was read")
        target.flush()


def _fill(target: BinaryIO, size_bytes: int) -> None:
    """A hole, for what cannot have any."""
    while size_bytes > 0:
        size_bytes -= target.write(bytes(min(size_bytes, _HOLE_BYTES)))
