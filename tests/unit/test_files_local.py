"""Trees that a hostile guest describes, and trees of ours."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from files_rig import DONE, HELLO, names_in, saying

from triarch.client.file_local import Transfer, Writer, extents
from triarch.client.file_pull import Pull
from triarch.errors import DaemonUnavailable, Damaged
from triarch.model.file_protocol import (
    FileEntry,
    FileKind,
    Frame,
    data_header,
    encode_entry,
    finish_request,
    frame,
)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A directory to pull into, beside one that nothing may touch."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/precious").write_text("precious")
    (tmp_path / "inside").mkdir()
    yield tmp_path / "inside"
    assert names_in(tmp_path / "outside") == ["precious"]
    assert (tmp_path / "outside/precious").read_text() == "precious"
    assert sorted(names_in(tmp_path)) == ["inside", "outside"]


def directory(path: bytes) -> FileEntry:
    return FileEntry(path=path, kind=FileKind.DIRECTORY, mode=0o755)


def file(path: bytes, content: bytes = b"hostile", mode: int = 0o644) -> bytes:
    entry = FileEntry(path=path, kind=FileKind.FILE, size_bytes=len(content), mode=mode)
    return encode_entry(entry) + data_header(0, len(content)) + content + finish_request(len(content))


def pull(place: Path, *frames: bytes, trusted: bool = False, name: bytes = b"got") -> Pull:
    top = encode_entry(directory(b"/srv"))
    with saying(HELLO, top, encode_entry(directory(b"")), *frames, DONE) as link:
        pulled = Pull(link, "web", lambda _: None, trusted=trusted)
        pulled.tree(b"/srv", os.fsencode(place), name, recursive=True)
    return pulled


@pytest.mark.parametrize(
    "path", [b"..", b"../outside/x", b"a/../../x", b"/etc/x", b"a//b", b".", b"a/.", b"..//x", b"a/..", b"/"]
)
def test_names_that_lead_out_end_the_copy(place: Path, path: bytes) -> None:
    with pytest.raises(Damaged):
        pull(place, encode_entry(directory(b"a")), file(path))


def test_a_link_of_the_trees_own_is_not_followed(place: Path) -> None:
    link = FileEntry(path=b"door", kind=FileKind.SYMLINK, target=os.fsencode(place.parent / "outside"))
    pulled = pull(place, encode_entry(link), file(b"door/precious"), file(b"door/new"), file(b"good"))
    assert (place / "got/door").is_symlink()
    assert (place / "got/good").read_bytes() == b"hostile"
    assert len(pulled.skipped) == 2


def test_a_link_that_was_here_is_not_followed_either(place: Path) -> None:
    (place / "got").mkdir()
    (place / "got/door").symlink_to(place.parent / "outside")
    (place / "got/precious").symlink_to(place.parent / "outside/precious")
    pulled = pull(place, encode_entry(directory(b"door")), file(b"door/new"), file(b"precious"))
    assert (place / "got/precious").read_bytes() == b"hostile"
    assert not (place / "got/precious").is_symlink()
    assert pulled.skipped


def test_hard_links_stay_inside(place: Path) -> None:
    outside = os.fsencode(place.parent / "outside/precious")
    link = FileEntry(path=b"door", kind=FileKind.SYMLINK, target=os.fsencode(place.parent / "outside"))
    for target in (b"../../outside/precious", outside):
        with pytest.raises(Damaged):
            pull(place, encode_entry(FileEntry(path=b"x", kind=FileKind.LINK, target=target)))
    through = FileEntry(path=b"x", kind=FileKind.LINK, target=b"door/precious")
    assert pull(place, encode_entry(link), encode_entry(through)).skipped
    assert (place.parent / "outside/precious").stat().st_nlink == 1


def test_devices_are_not_made(place: Path) -> None:
    device = FileEntry(path=b"null", kind=FileKind.CHARACTER_DEVICE, size_bytes=0x103)
    assert [skipped.name for skipped in pull(place, encode_entry(device)).skipped] == ["web/srv/null"]
    assert names_in(place / "got") == []


@pytest.mark.parametrize("trusted", [False, True])
def test_rights_on_this_host_take_trust(place: Path, trusted: bool) -> None:
    pulled = pull(place, file(b"su", mode=0o6755), trusted=trusted)
    mode = stat.S_IMODE((place / "got/su").stat().st_mode)
    assert (mode, pulled.disarmed) == ((0o6755, 0) if trusted else (0o755, 1))


def test_more_than_was_told_is_not_written(place: Path) -> None:
    entry = encode_entry(FileEntry(path=b"x", kind=FileKind.FILE, size_bytes=10))
    for evil in (data_header(1 << 60, 1) + b"x", data_header(5, 6) + b"x" * 6, finish_request(1 << 50)):
        with pytest.raises(Damaged):
            pull(place, entry, evil)
    assert names_in(place / "got") == []


def test_a_server_that_hangs_up_leaves_nothing_half_written(place: Path) -> None:
    entry = encode_entry(FileEntry(path=b"x", kind=FileKind.FILE, size_bytes=10))
    with (
        saying(
            HELLO, encode_entry(directory(b"/srv")), encode_entry(directory(b"")), entry, data_header(0, 3) + b"abc"
        ) as link,
        pytest.raises(DaemonUnavailable),
    ):
        Pull(link, "web", lambda _: None, trusted=False).tree(b"/srv", os.fsencode(place), b"got", recursive=True)
    assert names_in(place / "got") == []


@pytest.mark.parametrize(
    "said",
    [b"HTTP/1.1 200 OK\r\n\r\n", b"V\xff\xff\xff\xff", frame(Frame.HELLO, b"\0\0\0\2"), DONE, frame(Frame.ERROR, b"x")],
)
def test_what_is_no_file_server_is_told_so(place: Path, said: bytes) -> None:
    with saying(said, DONE) as link, pytest.raises(Damaged):
        Pull(link, "web", lambda _: None, trusted=False).tree(b"/x", os.fsencode(place), b"got", recursive=True)
    assert names_in(place) == []


def test_a_flood_ends_the_copy(place: Path) -> None:
    flood = frame(Frame.ERROR, bytes(12) + b"x") * 70_000
    with saying(HELLO, flood) as link, pytest.raises(Damaged, match="floods"):
        while True:
            link._wait()


def test_a_mode_that_forbids_writing_comes_last(place: Path) -> None:
    closed = FileEntry(path=b"closed", kind=FileKind.DIRECTORY, mode=0o555, modified_ns=10**18)
    pull(place, encode_entry(closed), file(b"closed/x"))
    status = (place / "got/closed").stat()
    assert (stat.S_IMODE(status.st_mode), status.st_mtime_ns) == (0o555, 10**18)


def test_extents_are_those_of_a_sparse_file(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as sparse:
        sparse.truncate(1 << 20)
        sparse.seek(256 << 10)
        sparse.write(b"x" * 4096)
    fd = os.open(path, os.O_RDONLY)
    try:
        assert sum(end - start for start, end in extents(fd, os.fstat(fd))) < 1 << 19
    finally:
        os.close(fd)


def test_a_writer_wants_a_name(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        for name in (b"", b"..", b".", b"a/b"):
            with pytest.raises(Damaged):
                Writer(fd, name)
    finally:
        os.close(fd)
    assert Transfer().done_bytes == 0


def test_a_server_that_answers_a_push_with_gigabytes_is_left(tmp_path: Path) -> None:
    """What comes while we send has to wait, and waits in memory."""
    piece = frame(Frame.DATA, bytes(256 << 10))
    with saying(HELLO, *[piece] * 400) as link, pytest.raises(Damaged, match="floods"):
        for _ in range(100_000):
            link._wait()


def test_a_partial_copy_that_another_made_first_is_not_written_to(place: Path) -> None:
    os.link(place.parent / "outside/precious", place / "partial")
    parent_fd = os.open(place, os.O_RDONLY)
    writer = Writer(parent_fd, b"got")
    try:
        with pytest.raises(FileExistsError):
            writer.begin(FileEntry(path=b"", kind=FileKind.FILE, mode=0o644, size_bytes=4), b"partial", 0)
    finally:
        writer.close()
        os.close(parent_fd)


@pytest.mark.parametrize("said", [encode_entry(FileEntry(path=b"x", kind=FileKind.FILE, size_bytes=1 << 63)), None])
def test_a_file_longer_than_any_can_be_is_refused(place: Path, said: bytes | None) -> None:
    longest = FileEntry(path=b"x", kind=FileKind.FILE, size_bytes=(1 << 63) - 1)
    with pytest.raises(Damaged):
        pull(place, said or encode_entry(longest), finish_request(1 << 63))
