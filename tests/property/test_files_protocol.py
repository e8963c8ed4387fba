"""The file protocol: whatever is encoded is decoded, and nothing that a server says breaks its reader."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from pathlib import Path

from files_rig import HELLO, names_in, saying
from hypothesis import given, settings
from hypothesis import strategies as st

from triarch.client.file_pull import Pull
from triarch.errors import Error
from triarch.model import file_protocol
from triarch.model.file_protocol import (
    MAX_BULK_BYTES,
    MAX_DATA_BYTES,
    MAX_FRAME_BYTES,
    MAX_UNSIZED_BYTES,
    FileEntry,
    FileKind,
    Flag,
    Frame,
    FrameReader,
    decode_data,
    decode_entry,
    decode_fault,
    decode_finish,
    encode_entry,
    finish_request,
    frame,
)

names = st.binary(max_size=60).map(lambda name: name.replace(b"\0", b"x"))
u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
entries = st.builds(
    FileEntry,
    path=names,
    kind=st.sampled_from(FileKind),
    mode=st.integers(0, 0o7777),
    uid=u32,
    gid=u32,
    size_bytes=st.integers(0, 2**63 - 1),
    modified_ns=st.integers(-(10**20), 10**20),
    target=names,
    xattrs=st.lists(st.tuples(names.filter(bool), st.binary(max_size=50)), max_size=3).map(tuple),
    flags=u32,
    offset=u64,
    tag=u64,
)


@given(entries, st.integers(1, 50))
def test_an_entry_survives_any_cuts(entry: FileEntry, step: int) -> None:
    reader = FrameReader()
    data = encode_entry(entry) + finish_request(7)
    found = []
    for start in range(0, len(data), step):
        reader.feed(data[start : start + step])
        found += list(reader.frames())
    assert [kind for kind, _ in found] == [Frame.ENTRY, Frame.FINISH]
    assert decode_entry(found[0][1]) == entry
    assert decode_finish(found[1][1]).size_bytes == 7


@given(st.binary(max_size=300))
def test_any_bytes_are_frames_or_damaged(data: bytes) -> None:
    reader = FrameReader()
    reader.feed(data)
    with contextlib.suppress(Error):
        for _, payload in reader.frames():
            assert len(payload) <= MAX_FRAME_BYTES
    for decode in (decode_entry, decode_fault, decode_finish, decode_data):
        with contextlib.suppress(Error):
            decode(data)


@given(entries, st.data())
def test_an_entry_with_a_wrong_byte_is_an_entry_or_damaged(entry: FileEntry, data: st.DataObject) -> None:
    payload = bytearray(encode_entry(entry)[5:])
    payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(Error):
        decode_entry(bytes(payload))


hostile_names = st.lists(
    st.sampled_from([b"a", b"b", b"..", b".", b"", b"door", b"x" * 300, b"\n"]), min_size=1, max_size=4
).map(b"/".join)
hostile_frames = st.one_of(
    st.builds(
        lambda path, kind, target, size: encode_entry(
            FileEntry(path=path, kind=kind, target=target, size_bytes=size, mode=0o777)
        ),
        hostile_names,
        st.sampled_from(FileKind),
        st.one_of(hostile_names, st.just(b"/tmp"), st.just(b"../..")),
        st.sampled_from([0, 3, 2**40, 2**63]),
    ),
    st.builds(lambda at, data: frame(Frame.DATA, at.to_bytes(8, "big"), data), u64, st.binary(max_size=4)),
    st.builds(finish_request, st.sampled_from([0, 3, 2**40, 2**63])),
    st.builds(lambda number: frame(Frame.ERROR, number.to_bytes(4, "big"), bytes(8), b"x"), u32),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(hostile_frames, max_size=12))
def test_no_tree_leaves_its_place(frames: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as root:
        (Path(root) / "in").mkdir()
        top = encode_entry(FileEntry(path=b"/x", kind=FileKind.DIRECTORY))
        inside = encode_entry(FileEntry(path=b"", kind=FileKind.DIRECTORY))
        with saying(HELLO, top, inside, *frames) as link, contextlib.suppress(Error):
            pull = Pull(link, "web", lambda _: None, trusted=False)
            pull.tree(b"/x", os.fsencode(f"{root}/in"), b"got", recursive=True)
        assert names_in(root) == ["in"]
        assert set(names_in(f"{root}/in")) <= {"got"}
        for _, _, files in os.walk(f"{root}/in", followlinks=False):
            assert not any(name.endswith(".partial") for name in files)


def test_both_languages_have_the_same_page() -> None:
    source = (Path(file_protocol.__file__).parents[1] / "guest/files/files.h").read_text()
    letters = dict(re.findall(r"FILES_(\w+) = '(.)'", source))
    assert {name: ord(letter) for name, letter in letters.items()} == {kind.name: kind.value for kind in Frame}
    flags = {name: int(value) for name, value in re.findall(r"FILES_(\w+) = (\d+),", source)}
    assert flags == {flag.name: flag.value for flag in Flag if flag.name is not None}
    assert f"FILES_MAX_DATA_BYTES ({MAX_DATA_BYTES >> 10} << 10)" in source
    assert f"FILES_MAX_BULK_BYTES ({MAX_BULK_BYTES >> 20} << 20)" in source
    assert f"FILES_MAX_UNSIZED_BYTES ({MAX_UNSIZED_BYTES >> 20} << 20)" in source
