"""Writing EROFS images (Documentation/filesystems/erofs.rst, fs/erofs/erofs_fs.h), made for DAX.

    block 0                 superblock at byte 1024
    blocks 1 …              content of files, uncompressed, each from a block of its own
    …                       directories and symlinks that are too large to stand beside their inode
    meta_blkaddr …          inodes with extended attributes, small directories and symlinks; the root first
    … 2 MiB                 padding: virtio-pmem wants whole huge pages

Content is written while the archive is read; inodes follow at the end, so that one pass makes an image. The result
depends on the tree alone: same tree, same bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from triarch.errors import Invalid
from triarch.templates.tree import Extent, Kind, Node, Tree

BLOCK_BYTES = 4096
PADDING_BYTES = 2 << 20

_SUPERBLOCK_OFFSET = 1024
_MAGIC = 0xE0F5E1E2
_COMPAT_CHECKSUM, _COMPAT_MTIME = 0x1, 0x2
_FLAT_PLAIN, _FLAT_INLINE = 0, 2
_INODE_BYTES = 64
_SLOT_BYTES = 32
# Content may be copied out of the image, so all images can share one UUID; fixed, because images are reproducible.
_UUID = bytes.fromhex("7472696172636800a000000000000001")

_INODE = struct.Struct("<HHHHQIIIIQII16x")
_SUPERBLOCK = struct.Struct("<IIIBBHQQIIII16s16sIHHHBBIQB23x")
_DIRENT = struct.Struct("<QHBB")
_XATTR_HEADER = struct.Struct("<IB7x")
_XATTR_ENTRY = struct.Struct("<BBH")

_FILE_TYPE = {Kind.FILE: 1, Kind.DIRECTORY: 2, Kind.FIFO: 5, Kind.SYMLINK: 7}
_MODE_TYPE = {Kind.FILE: 0o100000, Kind.DIRECTORY: 0o040000, Kind.FIFO: 0o010000, Kind.SYMLINK: 0o120000}

# Longest first: the kernel's name index and the part of the name that it stands for.
XATTR_PREFIXES: tuple[tuple[bytes, int], ...] = (
    (b"system.posix_acl_access", 2),
    (b"system.posix_acl_default", 3),
    (b"security.", 6),
    (b"user.", 1),
)
MAX_XATTR_BYTES = 0xFFFF


@dataclass(slots=True)
class _Placed:
    """A node on its way into the image. `names` is how many names it has; `inline` is what stands beside the inode."""

    node: Node
    parent: Node
    names: int = 0
    xattrs: bytes = b""
    offset: int = 0
    first_block: int = 0
    size_bytes: int = 0
    inline: bool = False

    @property
    def nid(self) -> int:
        return self.offset // _SLOT_BYTES


class ErofsWriter:
    """Writes one image into a new file: `content` any number of times, then `finish` once."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._next_block = 1
        file.seek(BLOCK_BYTES)

    def content(self, size_bytes: int, pieces: Iterable[tuple[int, bytes]]) -> Extent:
        """Store a file of `size_bytes` from (offset, bytes) in rising order; holes between them stay holes."""
        extent = Extent(self._next_block if size_bytes else 0, size_bytes)
        start = self._next_block * BLOCK_BYTES
        self._next_block += -(-size_bytes // BLOCK_BYTES)
        position = 0
        for offset, data in pieces:
            if offset - position >= BLOCK_BYTES:
                self._file.seek(start + offset)
            else:
                self._file.write(bytes(offset - position))
            self._file.write(data)
            position = offset + len(data)
        padding = self._next_block * BLOCK_BYTES - start - position
        if padding >= BLOCK_BYTES:
            self._file.seek(self._next_block * BLOCK_BYTES)
        else:
            self._file.write(bytes(padding))
        return extent

    def read(self, extent: Extent, size_bytes: int) -> bytes:
        """The first `size_bytes` of stored content."""
        here = self._file.tell()
        self._file.seek(extent.first_block * BLOCK_BYTES)
        data = self._file.read(min(size_bytes, extent.size_bytes))
        self._file.seek(here)
        return data

    def finish(self, tree: Tree) -> None:
        """Write the inodes and the superblock, and pad. Nodes whose content is in memory get their blocks first."""
        for _, node in tree.walk():
            if isinstance(node.content, bytes):
                node.content = self.content(len(node.content), [(0, node.content)] if node.content else [])
        placed = _place(tree)
        for item in placed.values():
            if not item.inline and item.node.kind in (Kind.DIRECTORY, Kind.SYMLINK):
                item.first_block = self._next_block
                self._next_block += -(-item.size_bytes // BLOCK_BYTES)
        meta_block = self._next_block
        for number, item in enumerate(placed.values(), 1):
            self._write_inode(meta_block * BLOCK_BYTES, number, item, placed)
        tail = next(reversed(placed.values()))
        end = tail.offset + _INODE_BYTES + len(tail.xattrs) + (tail.size_bytes if tail.inline else 0)
        blocks = meta_block + -(-end // BLOCK_BYTES)
        self._file.truncate(-(-blocks * BLOCK_BYTES // PADDING_BYTES) * PADDING_BYTES)
        self._file.seek(0)
        self._file.write(_superblock(placed[id(tree.root)].nid, len(placed), blocks, meta_block))
        self._file.flush()

    def _write_inode(self, meta_start: int, number: int, item: _Placed, placed: dict[int, _Placed]) -> None:
        node = item.node
        if node.kind is Kind.DIRECTORY:
            body = _directory_body(node, item.parent, placed)
        else:
            body = node.target if node.kind is Kind.SYMLINK else b""
        links = 2 + sum(child.kind is Kind.DIRECTORY for child in node.children.values())
        first_block = node.content.first_block if isinstance(node.content, Extent) and node.kind is Kind.FILE else 0
        inode = _INODE.pack(
            1 | (_FLAT_INLINE if item.inline else _FLAT_PLAIN) << 1,
            (len(item.xattrs) - _XATTR_HEADER.size) // 4 + 1 if item.xattrs else 0,
            _MODE_TYPE[node.kind] | node.mode,
            0,
            item.size_bytes,
            item.first_block or first_block,
            number,
            node.uid,
            node.gid,
            node.mtime_ns // 1_000_000_000 & 0xFFFF_FFFF_FFFF_FFFF,
            node.mtime_ns % 1_000_000_000,
            links if node.kind is Kind.DIRECTORY else item.names,
        )
        self._file.seek(meta_start + item.offset)
        self._file.write(inode + item.xattrs + (body if item.inline else b""))
        if item.first_block:
            self._file.seek(item.first_block * BLOCK_BYTES)
            self._file.write(body)


def _place(tree: Tree) -> dict[int, _Placed]:
    """Give every inode its place in the metadata area, keyed by the node's identity, in the order of the tree."""
    placed: dict[int, _Placed] = {}
    parents: dict[int, Node] = {id(tree.root): tree.root}
    for _, node in tree.walk():
        for child in node.children.values():
            parents[id(child)] = node
        item = placed.setdefault(id(node), _Placed(node, parents[id(node)]))
        item.names += 1
    # Slot 0 stays empty: programs take inode number 0 for a deleted name.
    position = _INODE_BYTES
    for item in placed.values():
        node = item.node
        item.xattrs = _xattr_body(node.xattrs)
        head = _INODE_BYTES + len(item.xattrs)
        if node.kind is Kind.DIRECTORY:
            item.size_bytes = _directory_size(node)
        elif node.kind is Kind.SYMLINK:
            item.size_bytes = len(node.target)
        elif isinstance(node.content, Extent):
            item.size_bytes = node.content.size_bytes
        room = BLOCK_BYTES - position % BLOCK_BYTES
        if node.kind in (Kind.DIRECTORY, Kind.SYMLINK) and head + item.size_bytes <= BLOCK_BYTES:
            item.inline = True
            head += item.size_bytes
            position += room if head > room else 0
        item.offset = position
        position += -(-head // _INODE_BYTES) * _INODE_BYTES
    return placed


def _directory_blocks(node: Node) -> Iterator[list[bytes]]:
    """The names of a directory, `.` and `..` included, in byte order, cut into what fits in one block each."""
    names: list[bytes] = []
    used = 0
    for name in sorted((b".", b"..", *node.children)):
        needed = _DIRENT.size + len(name)
        if used + needed > BLOCK_BYTES:
            yield names
            names, used = [], 0
        names.append(name)
        used += needed
    yield names


def _directory_size(node: Node) -> int:
    blocks = list(_directory_blocks(node))
    return (len(blocks) - 1) * BLOCK_BYTES + sum(_DIRENT.size + len(name) for name in blocks[-1])


def _directory_body(node: Node, parent: Node, placed: dict[int, _Placed]) -> bytes:
    body = bytearray()
    for names in _directory_blocks(node):
        body += bytes(-len(body) % BLOCK_BYTES)
        name_offset = _DIRENT.size * len(names)
        for name in names:
            child = node if name == b"." else parent if name == b".." else node.children[name]
            body += _DIRENT.pack(placed[id(child)].nid, name_offset, _FILE_TYPE[child.kind], 0)
            name_offset += len(name)
        body += b"".join(names)
    return bytes(body)


def _xattr_body(xattrs: dict[bytes, bytes]) -> bytes:
    """The attributes as they stand behind the inode; nothing is shared between inodes."""
    if not xattrs:
        return b""
    body = bytearray(_XATTR_HEADER.pack(0, 0))
    for name, value in sorted(xattrs.items()):
        index, rest = split_xattr_name(name)
        body += _XATTR_ENTRY.pack(len(rest), index, len(value)) + rest + value
        body += bytes(-len(body) % 4)
    return bytes(body)


def split_xattr_name(name: bytes) -> tuple[int, bytes]:
    """(the kernel's index of the prefix, the rest). Raises `Invalid` for a name that EROFS cannot hold."""
    for prefix, index in XATTR_PREFIXES:
        rest = name.removeprefix(prefix)
        if name.startswith(prefix) and bool(rest) == prefix.endswith(b".") and len(rest) <= 255:
            return index, rest
    raise Invalid(f"the extended attribute {name[:80]!r} cannot be kept; user.*, security.* and POSIX ACLs can")


def _superblock(root_nid: int, inodes: int, blocks: int, meta_block: int) -> bytes:
    def pack(checksum: int) -> bytes:
        return _SUPERBLOCK.pack(
            _MAGIC, checksum, _COMPAT_CHECKSUM | _COMPAT_MTIME, 12, 0, root_nid, inodes, 0, 0, blocks, meta_block, 0,
            _UUID, b"", 0, 0, 0, 0, 0, 0, 0, 0, 0,
        )  # fmt: skip

    area = bytearray(BLOCK_BYTES - _SUPERBLOCK_OFFSET)
    area[: _SUPERBLOCK.size] = pack(0)
    area[: _SUPERBLOCK.size] = pack(_crc32c(area))
    return bytes(_SUPERBLOCK_OFFSET) + bytes(area)


def _crc32c(data: bytes | bytearray) -> int:
    """CRC-32C as the kernel's crc32c(~0, …): without the inversion at the end."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc
