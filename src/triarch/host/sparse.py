"""The content of large, mostly empty files: read block by block, zeros left out, with one digest for all copies.

Where a file has holes depends on the filesystem that it lies in, so holes count as what they read as. Two files have
the same digest exactly when they are equal, however each of them is stored.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import msgspec

from triarch.host.files import data_ranges

BLOCK_BYTES = 256 << 10
_ZEROS = bytes(BLOCK_BYTES)
_PLACE = struct.Struct(">Q")


def blocks(fd: int, size_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Every block of `BLOCK_BYTES` (the last may be shorter) that is not all zeros, with its offset, in order."""
    offset = 0
    for start, end in data_ranges(fd, size_bytes):
        offset = max(offset, start - start % BLOCK_BYTES)
        while offset < end:
            data = os.pread(fd, min(BLOCK_BYTES, size_bytes - offset), offset)
            if not data:
                raise OSError(5, "the file became shorter while it was read")
            if data != _ZEROS[: len(data)]:
                yield offset, data
            offset += BLOCK_BYTES


class ContentDigest:
    """sha256 over offset (8 bytes, big endian) and bytes of every block that is not all zeros, then the file's size."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self.content_bytes = 0

    def add(self, offset: int, data: bytes) -> None:
        self.content_bytes += len(data)
        self._hash.update(_PLACE.pack(offset))
        self._hash.update(data)

    def finish(self, size_bytes: int) -> str:
        self._hash.update(_PLACE.pack(size_bytes))
        return self._hash.hexdigest()


class Content(msgspec.Struct, frozen=True, kw_only=True):
    """What a file holds: `content_bytes` without the blocks that are all zeros."""

    digest: str
    content_bytes: int


def read_content(path: Path) -> Content:
    """Read all of it (blocking)."""
    digest = ContentDigest()
    with path.open("rb", buffering=0) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        for offset, data in blocks(file.fileno(), size_bytes):
            digest.add(offset, data)
    return Content(digest=digest.finish(size_bytes), content_bytes=digest.content_bytes)
