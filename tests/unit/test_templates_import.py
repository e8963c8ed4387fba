"""Importing archives: what is kept, what is refused, and that a refusal leaves nothing."""

from __future__ import annotations

import asyncio
import gzip
import io
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from triarch.errors import Error, Exhausted, Invalid, NotFound
from triarch.host.process import PACKAGES
from triarch.model.operation import Progress
from triarch.model.template import Init
from triarch.templates import image as image_module
from triarch.templates.image import TreeDraft
from triarch.templates.importer import import_tree
from triarch.templates.members import Limits
from triarch.testing.image_reader import read_image

Entry = tuple[tarfile.TarInfo, bytes]


def entry(name: str, content: bytes = b"", *, kind: bytes = tarfile.REGTYPE, link: str = "", **facts: object) -> Entry:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(content)
    for key, value in facts.items():
        setattr(info, key, value)
    return info, content


def symlink(name: str, target: str) -> Entry:
    return entry(name, kind=tarfile.SYMTYPE, link=target)


def hardlink(name: str, target: str) -> Entry:
    return entry(name, kind=tarfile.LNKTYPE, link=target)


def device(name: str, major: int, minor: int, kind: bytes = tarfile.CHRTYPE) -> Entry:
    return entry(name, kind=kind, devmajor=major, devminor=minor)


def attribute(name: str, key: str, value: str = "1") -> Entry:
    return entry(name, pax_headers={f"SCHILY.xattr.{key}": value})


SYSTEM = (
    entry("./", kind=tarfile.DIRTYPE, mode=0o755),
    entry("./sbin/init", b"#!", mode=0o755),
    entry("./etc/os-release", b'NAME=Test\nPRETTY_NAME="Test \'n Linux"\n'),
)


def tar(*entries: Entry) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for info, content in entries:
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    path = tmp_path / "workspace"
    path.mkdir()
    return path


@pytest.fixture
def bring(tmp_path: Path, workspace: Path) -> Callable[..., TreeDraft]:
    """Import bytes as an archive; after a refusal the workspace must be empty."""

    def do(data: bytes, limits: Limits | None = None) -> TreeDraft:
        archive = tmp_path / "rootfs.tar"
        archive.write_bytes(data)
        try:
            return asyncio.run(import_tree("test", archive, workspace, lambda progress: None, limits=limits))
        except Error:
            assert list(workspace.iterdir()) == []
            raise

    return do


def test_keeps_everything_that_a_tree_is(bring: Callable[..., TreeDraft]) -> None:
    draft = bring(
        tar(
            *SYSTEM,
            entry("bin/su", b"su", mode=0o4755, uid=0, gid=65535, mtime=1_234_567_890.5),
            hardlink("bin/su2", "./bin/su"),
            symlink("etc/mtab", "/proc/self/mounts"),
            symlink("up", "../../../outside"),
            entry("run-fifo", kind=tarfile.FIFOTYPE, mode=0o620),
            attribute("bin/ping", "security.capability", "\1\0\0\2"),
            entry("odd\nname é", b"x", uid=1000),
            entry("dup", b"first"),
            entry("dup", b"last"),
        )
    )
    assert (draft.init, draft.command, draft.os_name) == (Init.SYSTEM, (), "Test 'n Linux")
    found = read_image(draft.image)
    su = found[b"bin/su"]
    assert (su.mode, su.gid, su.links, su.mtime_ns, su.content) == (
        0o104755,
        65535,
        2,
        1_234_567_890_500_000_000,
        b"su",
    )
    assert found[b"bin/su2"].nid == su.nid
    assert found[b"etc/mtab"].content == b"/proc/self/mounts"
    assert found[b"up"].content == b"../../../outside"
    assert found[b"run-fifo"].mode == 0o010620
    assert found[b"bin/ping"].xattrs == {b"security.capability": b"\1\0\0\2"}
    assert found["odd\nname é".encode()].uid == 1000
    assert found[b"dup"].content == b"last"


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ([entry("/etc/passwd", b"x")], "'/etc/passwd' is absolute"),
        ([entry("../escape", b"x")], "leads out of the tree"),
        ([entry("a/../../escape", b"x")], "leads out of the tree"),
        ([entry("a/..", kind=tarfile.DIRTYPE)], "leads out of the tree"),
        ([symlink("out", "/etc"), entry("out/cron.d/x", b"x")], "out of the tree, to '/etc'"),
        ([symlink("a/out", "../../etc"), entry("a/out/x", b"x")], "leads out of the tree"),
        ([symlink("b", "/etc"), symlink("a", "b"), entry("a/x", b"x")], "out of the tree, to '/etc'"),
        ([symlink("a", "b"), symlink("b", "a"), entry("a/x", b"x")], "which is not there"),
        ([entry("file", b"x"), entry("file/x", b"x")], "lies below a file"),
        ([hardlink("passwd", "/etc/passwd")], "absolute"),
        ([hardlink("passwd", "../etc/passwd")], "leads out of the tree"),
        ([hardlink("passwd", "etc/passwd")], "did not bring before it"),
        ([symlink("out", "/etc"), hardlink("passwd", "out/passwd")], "out of the tree"),
        ([entry("dir", kind=tarfile.DIRTYPE), hardlink("x", "dir")], "hard link to the directory"),
        ([device("disk", 8, 0, tarfile.BLKTYPE)], "'disk' is a block device"),
        ([device("etc/null", 1, 3)], "'etc/null' is a character device"),
        ([device("etc/gone", 0, 0)], "overlay whiteout"),
        ([device("dev/gone", 0, 0)], "overlay whiteout"),
        ([attribute("x", "trusted.overlay.opaque", "y")], "'trusted.overlay.opaque'"),
        ([attribute("x", "user.overlay.redirect", "/")], "'user.overlay.redirect'"),
        ([attribute("x", "trusted.anything")], "'trusted.anything'"),
        ([attribute("x", "system.nfs4_acl")], "cannot be kept"),
        ([attribute("x", "user.big", "v" * 70_000)], "70000 bytes"),
        ([entry("x", uid=65536)], "65536:0"),
        ([entry("x", gid=4_294_967_295)], "0:4294967295"),
        ([entry("x" * 256)], "longer than Linux allows"),
        ([entry("d/" * 2100 + "x")], "longer than Linux allows"),
        ([symlink("x", "y" * 5000)], "impossible target"),
        ([entry("x", kind=b"M")], "type b'M'"),
        ([entry("d/x"), entry("d", b"x")], "not empty"),
        ([entry(".", b"x")], "root of the tree is a file"),
    ],
)
def test_hostile_members_are_refused_by_name(
    bring: Callable[..., TreeDraft], entries: list[Entry], reason: str
) -> None:
    with pytest.raises(Invalid) as caught:
        bring(tar(*SYSTEM, *entries))
    assert reason in caught.value.message
    assert "\n" not in caught.value.message


def test_links_inside_the_tree_are_followed(bring: Callable[..., TreeDraft]) -> None:
    draft = bring(
        tar(entry("usr/lib/a", b"a"), symlink("lib", "usr/lib"), symlink("x/y", "../lib/."), entry("x/y/b", b"b"))
    )
    assert read_image(draft.image)[b"usr/lib/b"].content == b"b"


def test_devices_of_dev_are_dropped(bring: Callable[..., TreeDraft]) -> None:
    found = read_image(bring(tar(*SYSTEM, device("./dev/null", 1, 3), device("dev/sda", 8, 0, tarfile.BLKTYPE))).image)
    assert not [name for name in found if name.startswith(b"dev/")]
    assert found[b"dev"].is_directory


@pytest.mark.parametrize("program", ["cat", "gzip", "xz", "zstd", "bzip2"])
def test_compression_is_told_by_content(bring: Callable[..., TreeDraft], program: str) -> None:
    argv = [program] if program == "cat" else [program, "-c"]
    packed = subprocess.run(argv, input=tar(*SYSTEM), capture_output=True, check=True).stdout
    assert b"sbin/init" in read_image(bring(packed).image)
    assert program == "cat" or program in PACKAGES
    if program in ("gzip", "xz", "zstd"):
        with pytest.raises(Invalid, match="cannot be unpacked"):
            bring(packed[: len(packed) - 6])
        damaged = bytearray(packed)
        damaged[len(packed) // 2] ^= 0xFF
        with pytest.raises(Invalid):
            bring(bytes(damaged))


def test_same_archive_same_image(bring: Callable[..., TreeDraft]) -> None:
    first = bring(tar(*SYSTEM)).image
    content = first.read_bytes()
    first.unlink()
    assert bring(tar(*SYSTEM)).image.read_bytes() == content


def test_bombs(bring: Callable[..., TreeDraft]) -> None:
    zeros = tar(*SYSTEM, entry("zeros", bytes(64 << 20)))
    bomb = subprocess.run(["gzip", "-c"], input=zeros, capture_output=True, check=True).stdout
    with pytest.raises(Invalid, match="more than 100 times its size"):
        bring(bomb, Limits(ratio=100, ratio_from_bytes=1 << 20))
    with pytest.raises(Invalid, match="more than 33554432 bytes with member 'zeros'"):
        bring(bomb, Limits(total_bytes=32 << 20))
    hole = entry("hole", bytes(512), pax_headers={"GNU.sparse.map": "0,512", "GNU.sparse.size": str(1 << 50)})
    with pytest.raises(Invalid, match="member 'hole'"):
        bring(tar(*SYSTEM, hole))
    with pytest.raises(Invalid, match="more than 50 names"):
        bring(tar(*(entry(f"{n}") for n in range(60))), Limits(names=50))
    with pytest.raises(Invalid, match="more than 50 names"):
        bring(tar(entry("d/" * 60 + "x")), Limits(names=50))
    with pytest.raises(Invalid, match="exceed 1000 bytes"):
        bring(tar(*(entry("n" * 100 + str(n)) for n in range(20))), Limits(metadata_bytes=1000))


@pytest.mark.parametrize("data", [b"", b"hello", b"\x1f\x8b nothing", os.urandom(4096), b"PK\3\4" * 500])
def test_what_is_no_archive(bring: Callable[..., TreeDraft], data: bytes) -> None:
    with pytest.raises(Invalid):
        bring(data)


def test_missing_archive_and_bad_name(workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        asyncio.run(import_tree("test", tmp_path / "absent", workspace, lambda progress: None))
    with pytest.raises(Invalid, match="regular file"):
        asyncio.run(import_tree("test", tmp_path, workspace, lambda progress: None))
    with pytest.raises(Invalid, match="template name"):
        asyncio.run(import_tree("../x", tmp_path / "absent", workspace, lambda progress: None))


def test_full_disk(bring: Callable[..., TreeDraft], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_module, "RESERVED_BYTES", 1 << 60)
    with pytest.raises(Exhausted, match="have to stay free"):
        bring(tar(*SYSTEM))


def children() -> set[str]:
    return {pid for task in Path("/proc/self/task").glob("*/children") for pid in task.read_text().split()}


async def test_cancelling_ends_the_program_and_leaves_nothing(tmp_path: Path, workspace: Path) -> None:
    archive = tmp_path / "rootfs.tar.gz"
    archive.write_bytes(gzip.compress(tar(entry("x", os.urandom(24 << 20))), compresslevel=1))
    before = children()
    reports: list[Progress] = []
    task = asyncio.create_task(import_tree("test", archive, workspace, reports.append))
    while not reports:
        await asyncio.sleep(0.005)
    started = children() - before
    assert started
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert list(workspace.iterdir()) == []
    for pid in started:
        assert not Path(f"/proc/{pid}").exists()


async def test_progress_rises(tmp_path: Path, workspace: Path) -> None:
    archive = tmp_path / "rootfs.tar"
    archive.write_bytes(tar(entry("x", os.urandom(1 << 20) * 100)))
    reports: list[Progress] = []
    await import_tree("test", archive, workspace, reports.append)
    fractions = [report.fraction or 0.0 for report in reports]
    assert len(fractions) >= 3 and fractions == sorted(fractions) and fractions[-1] <= 1.0
