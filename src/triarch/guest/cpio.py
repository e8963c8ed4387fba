"""Writing an initramfs: a cpio archive in the "newc" format.

The format is in the kernel's Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from pathlib import PurePosixPath

import msgspec

_ALIGNMENT = 4


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One file, folder or symbolic link, owned by root. `path` is relative; a link's `data` is its target."""

    path: str
    mode: int
    data: bytes = b""


def folder(path: str, mode: int = 0o755) -> Entry:
    return Entry(path=path, mode=stat.S_IFDIR | mode)


def file(path: str, data: bytes, mode: int = 0o644) -> Entry:
    return Entry(path=path, mode=stat.S_IFREG | mode, data=data)


def write_archive(entries: Iterable[Entry]) -> bytes:
    """The archive; folders that `entries` imply come before what lies in them. The same input gives the same bytes."""
    known: set[str] = set()
    archive = bytearray()
    for entry in entries:
        for parent in reversed(PurePosixPath(entry.path).parents[:-1]):
            if str(parent) not in known:
                known.add(str(parent))
                _append(archive, len(known), folder(str(parent)))
        if entry.path not in known:
            known.add(entry.path)
            _append(archive, len(known), entry)
    _append(archive, 0, Entry(path="TRAILER!!!", mode=0))
    return bytes(archive)


def _append(archive: bytearray, inode: int, entry: Entry) -> None:
    name = entry.path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    #        inode  mode        uid gid links  mtime size             device and rdev, major and minor
    numbers = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, 0, 0, len(name), 0)
    archive += b"070701" + b"".join(b"%08x" % number for number in numbers) + name
    archive += bytes(-len(archive) % _ALIGNMENT)
    archive += entry.data
    archive += bytes(-len(archive) % _ALIGNMENT)
