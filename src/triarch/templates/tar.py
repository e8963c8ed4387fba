"""A strict tar reader for archives that nobody vouches for: bounded memory, one pass, no silent end.

Reads ustar, GNU and pax (POSIX.1-2001) archives, sparse files of GNU tar and libarchive included. Python's `tarfile` is
not used because it takes a damaged header for the end of the archive, so that half a system would be imported without
a word, and because it reads extension headers of any size into memory.
"""

from __future__ import annotations

import base64
import binascii
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from triarch.errors import Invalid

BLOCK_BYTES = 512
MAX_EXTENSION_BYTES = 1 << 20
MAX_SPARSE_RANGES = 100_000
MAX_TRAILER_BYTES = 64 << 20
_READ_BYTES = 1 << 20
_GNU_MAGIC = b"ustar  \0"

Header = dict[bytes, bytes]


class Source(Protocol):
    """A byte stream: at most `size` bytes, fewer only at its end."""

    def read(self, size: int, /) -> bytes: ...


class Type(Enum):
    FILE = "file"
    HARD_LINK = "hard link"
    SYMLINK = "symlink"
    CHARACTER_DEVICE = "character device"
    BLOCK_DEVICE = "block device"
    DIRECTORY = "directory"
    FIFO = "fifo"


_TYPES = {
    b"0": Type.FILE, b"\0": Type.FILE, b"7": Type.FILE, b"S": Type.FILE,
    b"1": Type.HARD_LINK, b"2": Type.SYMLINK, b"3": Type.CHARACTER_DEVICE, b"4": Type.BLOCK_DEVICE,
    b"5": Type.DIRECTORY, b"D": Type.DIRECTORY, b"6": Type.FIFO,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Range:
    """Bytes `offset` … `offset + length` of a sparse file that are in the archive."""

    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Member:
    """One member as the archive states it; nothing here has been judged. `size_bytes` counts holes too."""

    name: bytes
    type: Type
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    size_bytes: int
    link: bytes
    major: int
    minor: int
    xattrs: dict[bytes, bytes]


class TarReader:
    """Iterate over members; `content` gives the bytes of the one that was yielded last.

    Everything that makes an archive unreadable raises `Invalid`; a stream without tar's end mark counts as cut off.
    """

    def __init__(self, stream: Source) -> None:
        self._stream = stream
        self._position = 0
        self._left = 0
        self._padding = 0
        self._ranges: tuple[Range, ...] = ()

    def __iter__(self) -> Iterator[Member]:
        global_header: Header = {}
        header: Header = {}
        while (block := self._next_header()) is not None:
            kind = block[156:157]
            if kind == b"g":
                self._extend(global_header, self._extension(block))
            elif kind in (b"x", b"X"):
                self._extend(header, self._extension(block))
            elif kind in (b"L", b"K"):
                key = b"path" if kind == b"L" else b"linkpath"
                self._extend(header, {key: self._read_extension(block).rstrip(b"\0")})
            elif kind != b"V":
                yield self._member(block, global_header | header)
                header = {}
        if header:
            raise self._damaged("an extension header is followed by no member")

    def content(self) -> Iterator[tuple[int, bytes]]:
        """(offset, bytes) of the current member, in rising order; what lies between them is zeros."""
        for part in self._ranges:
            offset, end = part.offset, part.offset + part.length
            while offset < end:
                data = self._read(min(_READ_BYTES, end - offset))
                self._left -= len(data)
                yield offset, data
                offset += len(data)

    # Blocks

    def _read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._position += len(data)
        if len(data) != size:
            raise self._damaged("it is cut off")
        return data

    def _skip(self, size: int) -> None:
        while size:
            size -= len(self._read(min(size, _READ_BYTES)))

    def _next_header(self) -> bytes | None:
        """The next header block after what is left of the member before it; None at the end mark."""
        self._skip(self._left + self._padding)
        self._left = self._padding = 0
        self._ranges = ()
        block = self._read(BLOCK_BYTES)
        if not block.strip(b"\0"):
            self._drain()
            return None
        stated = self._number(block[148:156], "checksum")
        summed = block[:148] + b" " * 8 + block[156:]
        if stated not in (sum(summed), sum(byte - 256 if byte > 127 else byte for byte in summed)):
            raise self._damaged("a header has the wrong checksum" if self._position > BLOCK_BYTES else "it is no tar")
        return block

    def _drain(self) -> None:
        """Read the padding behind the end mark, so that the decompressor below can verify its own checksum."""
        trailer = 0
        while data := self._stream.read(_READ_BYTES):
            trailer += len(data)
            if trailer > MAX_TRAILER_BYTES:
                raise self._damaged(f"more than {MAX_TRAILER_BYTES >> 20} MiB follow its end mark")

    def _damaged(self, what: str) -> Invalid:
        return Invalid(f"the archive cannot be read at byte {self._position} (unpacked): {what}")

    # Headers

    def _member(self, block: bytes, header: Header) -> Member:
        code = block[156:157]
        if code not in _TYPES:
            raise self._damaged(f"members of type {code!r} are not supported")
        kind = _TYPES[code]
        name = header.get(b"path", self._plain_name(block))
        link = header.get(b"linkpath", block[157:257].partition(b"\0")[0])
        stored = self._size(block, header)
        size = stored
        if kind is Type.FILE and code == b"\0" and name.endswith(b"/"):
            kind = Type.DIRECTORY
        if kind in (Type.FILE, Type.DIRECTORY):
            # A GNU dump directory has data; for links, devices and fifos a size is decoration.
            self._left, self._padding = stored, -stored % BLOCK_BYTES
        if kind is Type.FILE:
            name, size, self._ranges = self._sparse(block, header, name, stored)
        return Member(
            name=name,
            type=kind,
            mode=self._number(block[100:108], "mode") & 0o7777,
            uid=self._pax_number(header, b"uid", block[108:116]),
            gid=self._pax_number(header, b"gid", block[116:124]),
            mtime_ns=self._mtime(block, header),
            size_bytes=size,
            link=link,
            major=self._number(block[329:337], "device") if self._is_device(kind) else 0,
            minor=self._number(block[337:345], "device") if self._is_device(kind) else 0,
            xattrs=self._xattrs(header),
        )

    @staticmethod
    def _is_device(kind: Type) -> bool:
        return kind in (Type.CHARACTER_DEVICE, Type.BLOCK_DEVICE)

    @staticmethod
    def _plain_name(block: bytes) -> bytes:
        name = block[:100].partition(b"\0")[0]
        if block[257:263] == b"ustar\0" and (prefix := block[345:500].partition(b"\0")[0]):
            return prefix + b"/" + name
        return name

    def _size(self, block: bytes, header: Header) -> int:
        size = self._pax_number(header, b"size", block[124:136])
        if not 0 <= size < 1 << 62:
            raise self._damaged(f"a member states a size of {size} bytes")
        return size

    def _number(self, field: bytes, what: str) -> int:
        """Octal digits, or two's complement with the top bit set (GNU and star, for what octal cannot hold)."""
        if field[0] & 0x80:
            value = int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
            return value - (1 << (8 * len(field) - 1)) if field[0] & 0x40 else value
        text = field.partition(b"\0")[0].strip()
        try:
            return int(text, 8) if text else 0
        except ValueError as error:
            raise self._damaged(f"the {what} {field!r} is no octal number") from error

    def _pax_number(self, header: Header, key: bytes, field: bytes) -> int:
        if key not in header:
            return self._number(field, key.decode())
        return self._decimal(header[key], key.decode())

    def _decimal(self, text: bytes, what: str) -> int:
        if not text.removeprefix(b"-").isdigit() or len(text) > 20:
            raise self._damaged(f"the {what} {text[:40]!r} is no decimal number")
        return int(text)

    def _mtime(self, block: bytes, header: Header) -> int:
        text = header.get(b"mtime")
        if text is None:
            return self._number(block[136:148], "mtime") * 1_000_000_000
        seconds, _, fraction = text.partition(b".")
        nanoseconds = self._decimal((fraction[:9] or b"0").ljust(9, b"0"), "mtime")
        whole = self._decimal(seconds, "mtime") * 1_000_000_000
        return whole - nanoseconds if text.startswith(b"-") else whole + nanoseconds

    # Extension headers

    def _extend(self, header: Header, more: Header) -> None:
        header |= more
        if sum(len(key) + len(value) for key, value in header.items()) > 2 * MAX_EXTENSION_BYTES:
            raise self._damaged(f"the extension headers of one member exceed {2 * MAX_EXTENSION_BYTES} bytes")

    def _read_extension(self, block: bytes) -> bytes:
        size = self._number(block[124:136], "size")
        if not 0 <= size <= MAX_EXTENSION_BYTES:
            raise self._damaged(f"an extension header of {size} bytes is too large; it may have {MAX_EXTENSION_BYTES}")
        data = self._read(size)
        self._skip(-size % BLOCK_BYTES)
        return data

    def _extension(self, block: bytes) -> Header:
        """The records `LENGTH KEY=VALUE\\n` of a pax header."""
        data = self._read_extension(block)
        found: Header = {}
        while data.strip(b"\0"):
            digits, space, _ = data[:12].partition(b" ")
            length = int(digits) if digits.isdigit() else 0
            record = data[len(digits) + 1 : length]
            key, equals, value = record.partition(b"=")
            if not space or not equals or not key or len(data) < length or record[-1:] != b"\n":
                raise self._damaged("a pax header is malformed")
            if key in (b"GNU.sparse.offset", b"GNU.sparse.numbytes"):
                raise self._damaged("sparse files of pax format 0.0 are not supported; GNU tar >= 1.16 writes 1.0")
            found[key] = value[:-1]
            data = data[length:]
        return found

    def _xattrs(self, header: Header) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        for key, value in header.items():
            if key.startswith(b"LIBARCHIVE.xattr."):
                name = urllib.parse.unquote_to_bytes(key.removeprefix(b"LIBARCHIVE.xattr."))
                try:
                    found.setdefault(name, base64.b64decode(value + b"=" * (-len(value) % 4), validate=True))
                except binascii.Error as error:
                    raise self._damaged("an extended attribute is no base64") from error
            elif key.startswith(b"SCHILY.xattr."):
                found[key.removeprefix(b"SCHILY.xattr.")] = value
        return found

    # Sparse files

    def _sparse(self, block: bytes, header: Header, name: bytes, stored: int) -> tuple[bytes, int, tuple[Range, ...]]:
        """(name, size with holes, ranges that are stored) of a file; `self._left` is what remains of it afterwards."""
        if block[156:157] == b"S" and block[257:265] == _GNU_MAGIC:
            size, ranges = self._number(block[483:495], "size"), self._gnu_map(block)
        elif b"GNU.sparse.map" in header:
            size, ranges = self._decimal(header.get(b"GNU.sparse.size", b""), "size"), self._pax_map(header)
        elif header.get(b"GNU.sparse.major") == b"1":
            size, ranges = self._decimal(header.get(b"GNU.sparse.realsize", b""), "size"), self._data_map()
        else:
            return name, stored, (Range(0, stored),)
        end = 0
        for part in ranges:
            if part.offset < end or part.length < 0:
                raise self._damaged("the map of a sparse file is not in rising order")
            end = part.offset + part.length
        if end > size or size >= 1 << 62 or sum(part.length for part in ranges) != self._left:
            raise self._damaged("the map of a sparse file does not fit its size")
        return header.get(b"GNU.sparse.name", name), size, tuple(ranges)

    def _gnu_map(self, block: bytes) -> list[Range]:
        """The old GNU format: four entries in the header, 21 in each block that follows."""
        ranges: list[Range] = []
        area, more = block[386:482], block[482]
        while True:
            for start in range(0, len(area), 24):
                if area[start : start + 24].strip(b"\0"):
                    offset = self._number(area[start : start + 12], "sparse map")
                    ranges.append(Range(offset, self._number(area[start + 12 : start + 24], "sparse map")))
            if not more:
                return ranges
            if len(ranges) > MAX_SPARSE_RANGES:
                raise self._damaged(f"a sparse file has more than {MAX_SPARSE_RANGES} ranges")
            following = self._read(BLOCK_BYTES)
            area, more = following[:504], following[504]

    def _pax_map(self, header: Header) -> list[Range]:
        """pax format 0.1: `offset,length,offset,length…` in the extension header."""
        numbers = [self._decimal(text, "sparse map") for text in header[b"GNU.sparse.map"].split(b",")]
        if len(numbers) % 2:
            raise self._damaged("the map of a sparse file has an odd number of entries")
        return [Range(*pair) for pair in zip(numbers[::2], numbers[1::2], strict=True)]

    def _data_map(self) -> list[Range]:
        """pax format 1.0: count, then offsets and lengths, one decimal a line, in the first blocks of the data."""
        numbers: list[int] = []
        text, wanted = b"", 1
        while len(numbers) < wanted:
            if self._left < BLOCK_BYTES:
                raise self._damaged("the map of a sparse file is cut off")
            *lines, text = (text + self._read(BLOCK_BYTES)).split(b"\n")
            self._left -= BLOCK_BYTES
            numbers += [self._decimal(line, "sparse map") for line in lines]
            wanted = 1 + 2 * numbers[0] if numbers else 1
            if not numbers or not 0 <= numbers[0] <= MAX_SPARSE_RANGES:
                raise self._damaged(f"a sparse file has no map, or one of more than {MAX_SPARSE_RANGES} ranges")
        if len(numbers) != wanted:
            raise self._damaged("the map of a sparse file is longer than it says")
        return [Range(*pair) for pair in zip(numbers[1::2], numbers[2::2], strict=True)]
