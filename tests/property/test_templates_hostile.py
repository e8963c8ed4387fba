"""Whatever an archive says: nothing outside the workspace changes, and a refusal leaves nothing."""

from __future__ import annotations

import asyncio
import io
import tarfile
import tempfile
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from triarch.errors import Error
from triarch.templates.importer import import_tree
from triarch.testing.image_reader import Entry, read_image

SETTINGS = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))

PART = st.sampled_from(["a", "b", "c", "..", ".", "", "dev", "etc", "sbin", "init", "machine-id", "var", "log", "\n"])
PATH = st.builds(
    lambda root, parts: root + "/".join(parts), st.sampled_from(["", "./", "/", "../"]), st.lists(PART, max_size=5)
)
# Where a naive extractor would write: the directory beside the workspace.
OUTSIDE = st.sampled_from(["../outside", "../../outside", "{outside}", "/{outside}/..", "a/../../../outside"])
KIND = st.sampled_from([b"0", b"0", b"0", b"1", b"2", b"2", b"3", b"4", b"5", b"5", b"6", b"7", b"S", b"V", b"Z"])


TAME_PART = st.sampled_from(["a", "b", "c", ".", "", "dev", "etc", "sbin", "init", "var", "log", "\n"])
TAME_PATH = st.builds("/".join, st.lists(TAME_PART, min_size=1, max_size=5)).filter(lambda path: path[:1] != "/")
TAME_KIND = st.sampled_from([b"0", b"0", b"2", b"5", b"5", b"6"])


@st.composite
def members(draw: st.DrawFn) -> tarfile.TarInfo:
    """A member of an archive: mostly harmless by itself, so that whole archives pass too."""
    hostile = draw(st.integers(0, 7)) == 0
    info = tarfile.TarInfo(draw(st.one_of(PATH, OUTSIDE) if hostile else TAME_PATH) or "x")
    info.type = draw(KIND if hostile else TAME_KIND)
    info.linkname = draw(st.one_of(PATH, OUTSIDE)) or "x"
    info.mode = draw(st.integers(0, 0o7777))
    info.uid = draw(st.sampled_from([0, 1000, 65535, *([65536, 2**31] if hostile else [])]))
    info.size = draw(st.sampled_from([0, 1, 511, 512, 5000])) if info.type in (b"0", b"7", b"S") else 0
    info.devmajor, info.devminor = draw(st.sampled_from([(0, 0), (1, 3), (8, 0)]))
    key = draw(st.sampled_from(["", "user.a", *(["trusted.overlay.opaque", "bad"] if hostile else [])]))
    if key:
        info.pax_headers = {f"SCHILY.xattr.{key}": draw(st.text(max_size=5))}
    return info


def archive(infos: list[tarfile.TarInfo], outside: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info in infos:
            info.name = info.name.replace("{outside}", str(outside))
            info.linkname = info.linkname.replace("{outside}", str(outside))
            tar.addfile(info, io.BytesIO(b"hostile" * 1000))
    return buffer.getvalue()


def snapshot(root: Path) -> dict[str, tuple[int, int, bytes]]:
    found = {}
    for path in sorted(root.rglob("*")):
        state = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found[str(path)] = (state.st_mode, state.st_uid, content)
    return found


def bring(data: bytes, base: Path) -> dict[bytes, Entry] | None:
    """Import beside a directory that must not change; the tree of the image, or None when it was refused."""
    outside, workspace = base / "outside", base / "workspace"
    workspace.mkdir()
    (base / "rootfs.tar").write_bytes(data)
    before = snapshot(outside)
    try:
        draft = asyncio.run(import_tree("test", base / "rootfs.tar", workspace, lambda progress: None))
    except Error as error:
        assert "\n" not in error.message
        assert list(workspace.iterdir()) == []
        return None
    finally:
        assert snapshot(outside) == before
        assert {path.name for path in base.iterdir()} == {"outside", "workspace", "rootfs.tar"}
    assert list(workspace.iterdir()) == [draft.image]
    return read_image(draft.image)


def scene() -> tempfile.TemporaryDirectory[str]:
    base = tempfile.TemporaryDirectory()
    (Path(base.name) / "outside").mkdir()
    (Path(base.name) / "outside" / "secret").write_bytes(b"host's own")
    return base


@SETTINGS
@given(st.lists(members(), max_size=8))
def test_no_archive_reaches_outside(infos: list[tarfile.TarInfo]) -> None:
    with scene() as base:
        found = bring(archive(infos, Path(base) / "outside"), Path(base))
        if found is None:
            return
        for name, entry in found.items():
            assert not {b"..", b"."} & set(name.split(b"/"))
            assert entry.mode & 0o170000 in (0o100000, 0o040000, 0o120000, 0o010000)
            assert entry.uid < 65536
            assert not any(key.startswith(b"trusted.") for key in entry.xattrs)
            assert b"host's own" not in entry.content
        assert found[b"dev"].is_directory and not [name for name in found if name.startswith(b"dev/")]


BASE = archive(
    [
        tarfile.TarInfo("etc"),
        *(tarfile.TarInfo(name) for name in ("a/b", "a/c" * 60)),
    ],
    Path("/nowhere"),
)


@SETTINGS
@given(st.lists(st.tuples(st.integers(0, len(BASE.rstrip(b"\0"))), st.binary(min_size=1, max_size=12)), max_size=4))
def test_damaged_archives_are_refused_or_sound(patches: list[tuple[int, bytes]]) -> None:
    """Bytes are overwritten and the checksums of headers made right again, so that the damage gets past them."""
    data = bytearray(BASE)
    for offset, patch in patches:
        data[offset : offset + len(patch)] = patch
    for start in range(0, len(data) - 511, 512):
        if data[start + 257 : start + 262] == b"ustar":
            total = sum(data[start : start + 148]) + 8 * 32 + sum(data[start + 156 : start + 512])
            data[start + 148 : start + 156] = b"%06o\0 " % total
    with scene() as base:
        bring(bytes(data), Path(base))
