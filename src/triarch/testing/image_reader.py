"""Reading a template image back without the kernel: an independent witness for tests that run without root."""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BLOCK = 4096
_PREFIXES = {1: b"user.", 2: b"system.posix_acl_access", 3: b"system.posix_acl_default", 6: b"security."}


@dataclass(frozen=True, slots=True)
class Entry:
    """One inode of an image; `content` is a file's bytes or a symlink's target."""

    nid: int
    mode: int
    uid: int
    gid: int
    mtime_ns: int
    links: int
    size_bytes: int
    content: bytes
    xattrs: dict[bytes, bytes]
    first_block: int
    inline: bool

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)


def read_image(path: Path) -> dict[bytes, Entry]:
    """Every name of an uncompressed EROFS image with extended inodes, `b""` for the root."""
    reader = _Reader(path.read_bytes())
    return dict(reader.walk())


class _Reader:
    def __init__(self, data: bytes) -> None:
        self.data = data
        magic, root_nid = struct.unpack_from("<I10xH", data, 1024)
        (self.meta_block,) = struct.unpack_from("<I", data, 1024 + 40)
        assert magic == 0xE0F5E1E2, "no EROFS superblock"
        self.root_nid = root_nid

    def walk(self) -> Iterator[tuple[bytes, Entry]]:
        pending = [(b"", self.root_nid)]
        while pending:
            name, nid = pending.pop()
            entry = self.inode(nid)
            yield name, entry
            if entry.is_directory:
                children = self.names(entry.content)
                assert children[b"."] == nid
                pending += [(name + b"/" + k if name else k, v) for k, v in children.items() if k not in (b".", b"..")]

    def inode(self, nid: int) -> Entry:
        start = self.meta_block * BLOCK + nid * 32
        form, icount, mode, _, size, block, _, uid, gid, mtime, nanoseconds, links = struct.unpack_from(
            "<HHHHQIIIIqII", self.data, start
        )
        assert form & 1, "not an extended inode"
        inline = form >> 1 & 7 == 2
        xattr_bytes = 12 + 4 * (icount - 1) if icount else 0
        body = start + 64 + xattr_bytes if inline else block * BLOCK
        if inline:
            assert start // BLOCK == (body + size - 1) // BLOCK or not size, "inline data crosses a block"
        has_body = stat.S_ISREG(mode) or stat.S_ISDIR(mode) or stat.S_ISLNK(mode)
        return Entry(
            nid=nid,
            mode=mode,
            uid=uid,
            gid=gid,
            mtime_ns=mtime * 1_000_000_000 + nanoseconds,
            links=links,
            size_bytes=size,
            content=self.data[body : body + size] if has_body else b"",
            xattrs=self.xattrs(start + 64, xattr_bytes),
            first_block=block,
            inline=inline,
        )

    def xattrs(self, start: int, size: int) -> dict[bytes, bytes]:
        found = {}
        position, end = start + 12, start + size
        while position < end:
            name_bytes, index, value_bytes = struct.unpack_from("<BBH", self.data, position)
            position += 4
            name = _PREFIXES[index] + self.data[position : position + name_bytes]
            position += name_bytes
            found[name] = self.data[position : position + value_bytes]
            position += value_bytes
            position += -(position - start) % 4
        return found

    def names(self, body: bytes) -> dict[bytes, int]:
        found: dict[bytes, int] = {}
        for start in range(0, len(body), BLOCK):
            block = body[start : start + BLOCK]
            count = struct.unpack_from("<H", block, 8)[0] // 12
            heads = [struct.unpack_from("<QHBx", block, 12 * number) for number in range(count)]
            ends = [head[1] for head in heads[1:]] + [len(block)]
            for (nid, offset, _), end in zip(heads, ends, strict=True):
                found[block[offset:end].rstrip(b"\0")] = nid
        assert list(found) == sorted(found), "names are not in byte order"
        return found
