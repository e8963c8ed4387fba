"""Images: read back by an independent reader, checked by fsck.erofs, and mounted by the kernel where we are root."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from triarch.errors import Damaged, Invalid, MissingProgram
from triarch.host.erofs import check_image
from triarch.templates.erofs import PADDING_BYTES, ErofsWriter
from triarch.templates.tree import Kind, Node, Tree, directory
from triarch.testing.image_reader import read_image

ACL = b"\2\0\0\0" + b"\1\0\7\0\xff\xff\xff\xff" + b"\4\0\5\0\xff\xff\xff\xff" + b"\x20\0\5\0\xff\xff\xff\xff"
CAPABILITY = b"\1\0\0\2\0\x20" + bytes(14)


def sample(writer: ErofsWriter) -> Tree:
    """A tree with everything that is awkward to lay out."""
    tree = Tree()
    tree.root.mode, tree.root.mtime_ns = 0o751, 1_700_000_000_000_000_001
    big = Node(Kind.FILE, mode=0o4755, uid=33, gid=65535, mtime_ns=-1_500_000_000)
    big.content = writer.content(10_000, [(0, b"a" * 4096), (4096, b"b" * 5904)])
    tree.insert((b"big",), big)
    tree.insert((b"twin",), big)
    sparse = Node(Kind.FILE)
    sparse.content = writer.content(1 << 20, [(0, b"x"), (500_001, b"y" * 5000)])
    tree.insert((b"sparse",), sparse)
    tree.insert((b"empty",), Node(Kind.FILE))
    tree.insert((b"memory",), Node(Kind.FILE, content=b"kept in memory"))
    tree.insert((b"fifo",), Node(Kind.FIFO, mode=0o600))
    tree.insert((b"short",), Node(Kind.SYMLINK, mode=0o777, target=b"big"))
    tree.insert((b"long",), Node(Kind.SYMLINK, mode=0o777, target=b"../" * 1365))
    attributes = {
        b"user.a": b"",
        b"user.bb": b"v" * 3000,
        b"security.capability": CAPABILITY,
        b"system.posix_acl_access": ACL,
    }
    tree.insert((b"attributes",), Node(Kind.FILE, content=b"data", xattrs=attributes))
    tree.insert((b"attributed-link-dir",), Node(Kind.DIRECTORY, mode=0o2755, xattrs={b"user.x": b"y" * 4090}))
    many = directory(0o1777)
    for number in range(3000):
        many.children[b"%d-" % number + b"n" * (number % 240)] = Node(Kind.FILE, content=b"%d" % number)
    many.children[b"new\nline \xff"] = directory()
    tree.insert((b"many",), many)
    deep = tree.root
    for _ in range(60):
        deep.children[b"deep"] = directory()
        deep = deep.children[b"deep"]
    return tree


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return write(tmp_path / "image.erofs")


def write(path: Path) -> Path:
    with path.open("xb+") as file:
        writer = ErofsWriter(file)
        writer.finish(sample(writer))
    return path


def test_reads_back_as_written(image: Path) -> None:
    found = read_image(image)
    assert found[b""].mode == 0o040751 and found[b""].mtime_ns == 1_700_000_000_000_000_001
    big = found[b"big"]
    assert big.content == b"a" * 4096 + b"b" * 5904
    assert (big.mode, big.uid, big.gid, big.links, big.mtime_ns) == (0o104755, 33, 65535, 2, -1_500_000_000)
    assert found[b"twin"] == big
    assert found[b"sparse"].content == b"x" + bytes(500_000) + b"y" * 5000 + bytes((1 << 20) - 505_001)
    assert found[b"empty"].size_bytes == 0
    assert found[b"memory"].content == b"kept in memory"
    assert found[b"fifo"].mode == 0o010600
    assert (found[b"short"].content, found[b"long"].content) == (b"big", b"../" * 1365)
    assert found[b"attributes"].xattrs[b"user.bb"] == b"v" * 3000
    assert found[b"attributes"].xattrs[b"system.posix_acl_access"] == ACL
    assert found[b"attributes"].content == b"data"
    assert found[b"many"].links == 3
    assert sum(name.startswith(b"many/") for name in found) == 3001
    assert found[b"many/2999-" + b"n" * (2999 % 240)].content == b"2999"
    assert found[b"/".join([b"deep"] * 60)].is_directory


def test_is_made_for_dax(image: Path) -> None:
    assert image.stat().st_size % PADDING_BYTES == 0
    for name, entry in read_image(image).items():
        if entry.mode & 0o170000 == 0o100000:
            assert not entry.inline, name
            assert entry.nid > 0


def test_holes_take_no_room(tmp_path: Path) -> None:
    path = tmp_path / "image"
    with path.open("xb+") as file:
        writer = ErofsWriter(file)
        tree = Tree()
        node = Node(Kind.FILE)
        node.content = writer.content(1 << 30, [(1 << 29, b"middle")])
        tree.insert((b"hole",), node)
        writer.finish(tree)
    assert path.stat().st_size > 1 << 30
    assert path.stat().st_blocks * 512 < 1 << 20


def test_same_tree_same_bytes(image: Path, tmp_path: Path) -> None:
    assert write(tmp_path / "again.erofs").read_bytes() == image.read_bytes()


async def test_fsck_accepts_it_and_finds_damage(image: Path) -> None:
    try:
        await check_image(image)
    except MissingProgram as error:
        pytest.skip(error.message)
    with image.open("r+b") as file:
        file.seek(1024 + 14)
        file.write(b"\xff\xff")
    with pytest.raises(Damaged, match=str(image)):
        await check_image(image)


@contextlib.contextmanager
def mounted(image: Path, directory: Path) -> Iterator[Path]:
    directory.mkdir()
    argv = ["mount", "-t", "erofs", "-o", "loop,ro", str(image), str(directory)]
    if subprocess.run(argv, capture_output=True, check=False).returncode:
        pytest.skip("cannot mount EROFS here (needs root and the kernel's erofs)")
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def test_kernel_sees_the_same(image: Path, tmp_path: Path) -> None:
    with mounted(image, tmp_path / "mounted") as root:
        base = os.fsencode(root)
        for name, entry in read_image(image).items():
            path = base + b"/" + name
            state = os.lstat(path)
            assert (state.st_mode, state.st_uid, state.st_gid) == (entry.mode, entry.uid, entry.gid), name
            assert (state.st_nlink, state.st_mtime_ns, state.st_ino) == (entry.links, entry.mtime_ns, entry.nid)
            if entry.mode & 0o170000 == 0o120000:
                assert os.readlink(path) == entry.content  # noqa: PTH115
            elif entry.mode & 0o170000 == 0o100000:
                with open(path, "rb") as file:  # noqa: PTH123
                    assert file.read() == entry.content
            if entry.mode & 0o170000 != 0o120000:
                kept = {os.fsencode(key): os.getxattr(path, key) for key in os.listxattr(path)}
                assert kept == entry.xattrs, name
        assert len(os.listdir(base + b"/many")) == 3001  # noqa: PTH208


@pytest.mark.parametrize(
    "name", [b"trusted.x", b"user.", b"security.", b"system.nfs4_acl", b"plain", b"user." + b"x" * 256]
)
def test_attributes_that_cannot_be_kept(name: bytes, tmp_path: Path) -> None:
    tree = Tree()
    tree.root.xattrs = {name: b"1"}
    with (tmp_path / "image").open("xb+") as file, pytest.raises(Invalid):
        ErofsWriter(file).finish(tree)
