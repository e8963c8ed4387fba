"""The real file server, given anything: it answers or leaves, and never falls over."""

from __future__ import annotations

import os
import struct
import tempfile
from pathlib import Path

import pytest
from files_rig import answers_of
from hypothesis import given, settings
from hypothesis import strategies as st

from triarch.model.file_protocol import (
    FileEntry,
    FileFault,
    FileKind,
    Flag,
    Frame,
    FrameReader,
    data_header,
    decode_entry,
    decode_fault,
    decode_finish,
    encode_entry,
    finish_request,
    frame,
    get_request,
    hash_request,
    list_request,
    remove_request,
    stat_request,
    sync_request,
)

paths = st.lists(
    st.sampled_from([b"", b"a", b"b", b"..", b".", b"up", b"x" * 300, b"\n\xff", b"file"]), max_size=5
).map(lambda parts: b"/" + b"/".join(parts))
flags = st.integers(0, 31).map(Flag)
entries = st.builds(
    FileEntry,
    path=paths,
    kind=st.sampled_from(FileKind),
    target=paths,
    mode=st.integers(0, 0o7777),
    tag=st.sampled_from([0, 7]),
    offset=st.sampled_from([0, 5, 2**40]),
    flags=st.integers(0, 31),
    xattrs=st.lists(st.tuples(st.sampled_from([b"user.a", b"nonsense"]), st.binary(max_size=9)), max_size=2).map(tuple),
)
requests = st.one_of(
    st.builds(stat_request, paths, flags),
    st.builds(list_request, paths),
    st.builds(get_request, paths, flags, st.sampled_from([0, 3, 2**63])),
    st.builds(hash_request, paths, st.sampled_from([0, 3, 2**64 - 1])),
    st.builds(remove_request, paths, flags),
    st.builds(encode_entry, entries),
    st.binary(max_size=20).map(lambda data: data_header(3, len(data)) + data),
    st.builds(finish_request, st.sampled_from([0, 3, 2**40])),
    st.just(sync_request()),
    st.builds(lambda kind, junk: frame(kind, junk), st.sampled_from(Frame), st.binary(max_size=80)),
)


def said(stdout: bytes) -> list[tuple[Frame, bytes]]:
    reader = FrameReader()
    reader.feed(stdout)
    return list(reader.frames())


@settings(max_examples=60, deadline=None)
@given(st.lists(requests, max_size=15), st.binary(max_size=8))
def test_it_answers_or_leaves(asked: list[bytes], junk: bytes) -> None:
    with tempfile.TemporaryDirectory() as root:
        tree = Path(root) / "tree"
        (tree / "a/b").mkdir(parents=True)
        (tree / "a/file").write_bytes(b"content")
        (tree / "up").symlink_to("../../../../../../..")
        (Path(root) / "file").write_text("not the machine's")
        code, stdout = answers_of(tree, b"".join(asked) + junk)
        assert code in (0, 1)
        for kind, payload in said(stdout):
            if kind is Frame.ENTRY:
                decode_entry(payload)
            elif kind is Frame.ERROR:
                decode_fault(payload)
            elif kind is Frame.FINISH:
                decode_finish(payload)
        assert (Path(root) / "file").read_text() == "not the machine's"
        assert sorted(path.name for path in Path(root).iterdir()) == ["file", "tree"]


def test_a_file_that_is_not_ended_is_not_there(tmp_path: Path) -> None:
    begun = encode_entry(FileEntry(path=b"/x", kind=FileKind.FILE)) + data_header(0, 3) + b"abc"
    answers_of(tmp_path, begun)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".server"]
    kept = encode_entry(FileEntry(path=b"/x", kind=FileKind.FILE, tag=7)) + data_header(0, 3) + b"abc"
    answers_of(tmp_path, kept)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".server", ".triarch-0000000000000007.partial"]
    rest = encode_entry(FileEntry(path=b"/x", kind=FileKind.FILE, tag=7, offset=3)) + data_header(3, 3) + b"def"
    answers_of(tmp_path, rest + finish_request(6))
    assert (tmp_path / "x").read_bytes() == b"abcdef"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".server", "x"]


def test_a_link_in_the_place_of_a_partial_copy_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    (tmp_path / ".triarch-0000000000000007.partial").symlink_to("precious")
    request = encode_entry(FileEntry(path=b"/x", kind=FileKind.FILE, tag=7)) + data_header(0, 3) + b"abc"
    _, stdout = answers_of(tmp_path, request + finish_request(3))
    assert (tmp_path / "precious").read_text() == "precious"
    assert any(kind is Frame.ERROR for kind, _ in said(stdout))


@pytest.mark.parametrize("size", [2**32 - 1, (1 << 20) + 9])
def test_a_frame_that_is_too_long_ends_it(tmp_path: Path, size: int) -> None:
    for kind in (Frame.DATA, Frame.ENTRY):
        code, stdout = answers_of(tmp_path, struct.pack(">BI", kind, size) + bytes(100))
        assert code in (0, 1)
        assert [found for found, _ in said(stdout)] == [Frame.HELLO]


def test_what_is_mounted_below_is_not_removed(tmp_path: Path) -> None:
    mounted = tmp_path / "dir/mounted"
    mounted.mkdir(parents=True)
    from triarch.host.syscalls import MNT_DETACH, mount, unmount

    if os.geteuid():
        pytest.skip("mounting needs root")
    mount("tmpfs", str(mounted), "tmpfs")
    try:
        (mounted / "precious").touch()
        _, stdout = answers_of(tmp_path, remove_request(b"/dir", Flag.RECURSIVE))
        assert (mounted / "precious").exists()
        faults: list[FileFault] = [decode_fault(payload) for kind, payload in said(stdout) if kind is Frame.ERROR]
        assert faults
    finally:
        unmount(str(mounted), MNT_DETACH)
