"""What the file server (`guest/files/*.c`) and whoever asks it say to each other; `files.h` is the same page for C.

Frames in both directions: one type byte, the payload's length as 4 bytes, the payload; numbers are big endian. The
server greets with HELLO and then answers requests one after the other, in their order:

    STAT flags path              ENTRY
    LIST path                    ENTRY of everything in a directory, DONE
    GET flags offset path        ENTRY and for a file DATA… FINISH, of it and, if RECURSIVE, of all below it; DONE
    HASH length path             FINISH with the SHA-256 of the file's first `length` bytes
    REMOVE flags path            DONE
    ENTRY, DATA…, FINISH size    nothing: a file appears whole with FINISH, everything else with its ENTRY
    SYNC                         DONE

Instead of an answer, or among ENTRYs that do arrive, ERROR tells what did not work (GET, LIST and REMOVE still end with
DONE). What goes wrong with an object that is written is told some time before the next SYNC is answered.

Paths in requests are absolute. Those in answers to GET are relative to the object that was asked for, which is ""
itself; a hard link's target is the path of an earlier entry. GET follows no link below the object. NO_DATA leaves the
content out, SUM puts the content's SHA-256 into FINISH. With FOLLOW, STAT answers with the path that the links lead to.

An ENTRY with a `tag` is written to the file `.triarch-TAG.partial` beside its place, which a broken connection leaves
there and `offset` goes on with. A directory that exists is left as it is; with TIMES_ONLY just its time is set.

All that a server says may be the work of a hostile guest: `FrameReader` and `decode_*` raise `Damaged` for what breaks
these rules; that a path leads nowhere else is for whoever uses it to see to (`client.local`).
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Iterator
from enum import IntEnum, IntFlag, StrEnum

import msgspec

from triarch.errors import Damaged

VERSION = 1
MAX_DATA_BYTES = 256 << 10
# DATA that is sent to the server may be longer: it goes to the file without a stop.
MAX_BULK_BYTES = 1 << 20
MAX_FRAME_BYTES = MAX_DATA_BYTES + (16 << 10)
# More is not read of a file that says it is empty (as those in /proc do).
MAX_UNSIZED_BYTES = 1 << 20
PARTIAL_NAME = ".triarch-%016x.partial"
HEADER_BYTES = 5

_HEADER = struct.Struct(">BI")
_OBJECT = struct.Struct(">IBIIIQqIQQ")
_U16, _U32, _U64 = struct.Struct(">H"), struct.Struct(">I"), struct.Struct(">Q")
_FLAGGED = struct.Struct(">IQ")
_MAX_PATH_BYTES = 32 << 10
_MAX_XATTRS = 1 << 12
_MAX_SIZE = (1 << 63) - 1  # of a file (off_t)
_NANOSECONDS = 1_000_000_000


class Frame(IntEnum):
    HELLO = ord("V")
    STAT = ord("S")
    LIST = ord("L")
    GET = ord("G")
    HASH = ord("H")
    REMOVE = ord("R")
    SYNC = ord("Y")
    ENTRY = ord("E")
    DATA = ord("D")
    FINISH = ord("F")
    ERROR = ord("X")
    DONE = ord("O")


class Flag(IntFlag):
    NONE = 0
    RECURSIVE = 1
    FOLLOW = 2
    NO_DATA = 4
    SUM = 8
    TIMES_ONLY = 16


class FileKind(StrEnum):
    """What an object in a tree is; `LINK` is one more name of a file that was named before."""

    FILE = "f"
    DIRECTORY = "d"
    SYMLINK = "l"
    LINK = "h"
    FIFO = "p"
    CHARACTER_DEVICE = "c"
    BLOCK_DEVICE = "b"
    SOCKET = "s"


_KINDS = {ord(kind.value): kind for kind in FileKind}
_KINDS_OF_MODE = {
    stat.S_IFREG: FileKind.FILE,
    stat.S_IFDIR: FileKind.DIRECTORY,
    stat.S_IFLNK: FileKind.SYMLINK,
    stat.S_IFIFO: FileKind.FIFO,
    stat.S_IFCHR: FileKind.CHARACTER_DEVICE,
    stat.S_IFBLK: FileKind.BLOCK_DEVICE,
    stat.S_IFSOCK: FileKind.SOCKET,
}


def kind_of_mode(mode: int) -> FileKind:
    return _KINDS_OF_MODE[stat.S_IFMT(mode)]


class FileEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One object of a tree. Paths and targets are bytes: names need not be text. `mode` is permissions only.

    `size_bytes` of a device is its number. `xattrs` are names and values.
    """

    path: bytes
    kind: FileKind
    mode: int = 0o644
    uid: int = 0
    gid: int = 0
    size_bytes: int = 0
    modified_ns: int = 0
    target: bytes = b""
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    flags: int = 0
    offset: int = 0
    tag: int = 0

    @property
    def name(self) -> str:
        """The path as Python and JSON can hold it (surrogateescape)."""
        return os.fsdecode(self.path)


class FileFault(msgspec.Struct, frozen=True, kw_only=True):
    """Something that did not work: `number` is an errno, `free_bytes` what is left where the machine's disk is full."""

    number: int
    path: bytes
    free_bytes: int = 0


class Finish(msgspec.Struct, frozen=True, kw_only=True):
    """The end of a file: how far it was read, and its SHA-256 if that was asked for."""

    size_bytes: int
    sha256: bytes | None = None


def frame(kind: Frame, *payload: bytes | memoryview) -> bytes:
    """One whole frame."""
    return b"".join((_HEADER.pack(kind, sum(map(len, payload))), *payload))


def stat_request(path: bytes, flags: Flag = Flag.NONE) -> bytes:
    return frame(Frame.STAT, _U32.pack(flags), path)


def list_request(path: bytes) -> bytes:
    return frame(Frame.LIST, path)


def get_request(path: bytes, flags: Flag = Flag.NONE, offset: int = 0) -> bytes:
    return frame(Frame.GET, _FLAGGED.pack(flags, offset), path)


def hash_request(path: bytes, size_bytes: int) -> bytes:
    return frame(Frame.HASH, _U64.pack(size_bytes), path)


def remove_request(path: bytes, flags: Flag = Flag.NONE) -> bytes:
    return frame(Frame.REMOVE, _U32.pack(flags), path)


def sync_request() -> bytes:
    return frame(Frame.SYNC)


def data_header(offset: int, size_bytes: int) -> bytes:
    """What goes before `size_bytes` of a file's content."""
    return _HEADER.pack(Frame.DATA, _U64.size + size_bytes) + _U64.pack(offset)


def finish_request(size_bytes: int) -> bytes:
    return frame(Frame.FINISH, _U64.pack(size_bytes))


def encode_entry(entry: FileEntry) -> bytes:
    """An ENTRY frame."""
    seconds, nanoseconds = divmod(entry.modified_ns, _NANOSECONDS)
    parts = [
        _OBJECT.pack(
            entry.flags,
            ord(entry.kind.value),
            entry.mode,
            entry.uid,
            entry.gid,
            entry.size_bytes,
            seconds,
            nanoseconds,
            entry.offset,
            entry.tag,
        ),
        _U32.pack(len(entry.path)),
        entry.path,
        _U32.pack(len(entry.target)),
        entry.target,
        _U16.pack(len(entry.xattrs)),
    ]
    for name, value in entry.xattrs:
        parts += (_U32.pack(len(name)), name, _U32.pack(len(value)), value)
    return frame(Frame.ENTRY, *parts)


class _Cursor:
    """Takes pieces off a payload. Raises `Damaged` where there are none."""

    def __init__(self, payload: bytes, at: int = 0) -> None:
        self._payload = payload
        self._at = at

    def take(self, size: int) -> bytes:
        end = self._at + size
        if end > len(self._payload):
            raise Damaged("the file server sent a frame that ends too early")
        piece = self._payload[self._at : end]
        self._at = end
        return piece

    def number(self, layout: struct.Struct) -> int:
        value: int = layout.unpack(self.take(layout.size))[0]
        return value

    def text(self, max_bytes: int) -> bytes:
        size = self.number(_U32)
        if size > max_bytes:
            raise Damaged(f"the file server sent a name of {size} bytes")
        return self.take(size)


def decode_entry(payload: bytes) -> FileEntry:
    """An ENTRY's payload. Raises `Damaged`."""
    if len(payload) < _OBJECT.size:
        raise Damaged("the file server sent a frame that ends too early")
    flags, kind, mode, uid, gid, size, seconds, nanoseconds, offset, tag = _OBJECT.unpack_from(payload)
    if kind not in _KINDS or mode > 0o7777 or nanoseconds >= _NANOSECONDS or abs(seconds) > 1 << 40 or size > _MAX_SIZE:
        raise Damaged("the file server described an object that cannot be")
    cursor = _Cursor(payload, _OBJECT.size)
    path, target = cursor.text(_MAX_PATH_BYTES), cursor.text(_MAX_PATH_BYTES)
    if b"\0" in path or b"\0" in target:
        raise Damaged("the file server sent a name with a NUL in it")
    count = cursor.number(_U16)
    if count > _MAX_XATTRS:
        raise Damaged(f"the file server sent {count} extended attributes of one object")
    xattrs = tuple((cursor.text(255), cursor.text(64 << 10)) for _ in range(count)) if count else ()
    if any(not name or b"\0" in name for name, _ in xattrs):
        raise Damaged("the file server sent an extended attribute without a proper name")
    return FileEntry(
        path=path,
        kind=_KINDS[kind],
        mode=mode,
        uid=uid,
        gid=gid,
        size_bytes=size,
        modified_ns=seconds * _NANOSECONDS + nanoseconds,
        target=target,
        xattrs=xattrs,
        flags=flags,
        offset=offset,
        tag=tag,
    )


def decode_fault(payload: bytes) -> FileFault:
    """An ERROR's payload. Raises `Damaged`."""
    cursor = _Cursor(payload)
    number, free_bytes = cursor.number(_U32), cursor.number(_U64)
    return FileFault(number=number, path=payload[12:], free_bytes=free_bytes)


def decode_finish(payload: bytes) -> Finish:
    """A FINISH's payload. Raises `Damaged`."""
    if len(payload) not in (8, 40):
        raise Damaged(f"the file server ended a file with {len(payload)} bytes")
    (size_bytes,) = _U64.unpack_from(payload)
    if size_bytes > _MAX_SIZE:
        raise Damaged("the file server ended a file that is longer than any can be")
    return Finish(size_bytes=size_bytes, sha256=payload[8:] or None)


def decode_data(payload: bytes | memoryview) -> tuple[int, memoryview]:
    """A DATA's payload: the offset in the file, and what is there. Raises `Damaged`."""
    if len(payload) < _U64.size:
        raise Damaged("the file server sent a frame that ends too early")
    return _U64.unpack_from(payload)[0], memoryview(payload)[_U64.size :]


def decode_hello(payload: bytes) -> None:
    """A HELLO's payload. Raises `Damaged` for a version that is not ours."""
    if payload != _U32.pack(VERSION):
        raise Damaged(f"the file server speaks another version of the protocol: {payload[:8].hex()}")


class FrameReader:
    """Cuts what comes from a server into frames. Holds one frame at most beyond what it was fed."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._at = 0

    def feed(self, data: bytes | memoryview) -> None:
        if self._at:
            del self._buffer[: self._at]
            self._at = 0
        self._buffer += data

    def frames(self) -> Iterator[tuple[Frame, bytes]]:
        """Every frame that is whole now. Raises `Damaged` for a type or a length that cannot be."""
        buffer = self._buffer
        while len(buffer) - self._at >= HEADER_BYTES:
            kind, size = _HEADER.unpack_from(buffer, self._at)
            if kind not in _FRAMES or size > MAX_FRAME_BYTES:
                raise Damaged(f"the file server sent a frame of type {kind} with {size} bytes, which there is none of")
            begin = self._at + HEADER_BYTES
            if len(buffer) - begin < size:
                return
            self._at = begin + size
            yield _FRAMES[kind], bytes(buffer[begin : begin + size])

    @property
    def missing_bytes(self) -> int:
        """How many bytes are known to be missing before another frame is whole."""
        held = len(self._buffer) - self._at
        if held < HEADER_BYTES:
            return HEADER_BYTES - held
        size: int = _HEADER.unpack_from(self._buffer, self._at)[1]
        return HEADER_BYTES + size - held


_FRAMES = {kind.value: kind for kind in Frame}
