"""The tar reader against the archives that real programs write, and against damaged ones."""

from __future__ import annotations

import hashlib
import io
import os
import random
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from triarch.errors import Invalid
from triarch.templates.tar import MAX_EXTENSION_BYTES, Member, TarReader, Type

LONG = "d" * 90 + "/" + "e" * 90 + "/" + "f" * 90


def read(data: bytes) -> list[tuple[Member, bytes]]:
    reader = TarReader(io.BytesIO(data))
    found = []
    for member in reader:
        content = bytearray(member.size_bytes if member.type is Type.FILE else 0)
        for offset, piece in reader.content():
            content[offset : offset + len(piece)] = piece
        found.append((member, bytes(content)))
    return found


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Files of every kind that GNU tar writes without root."""
    root = tmp_path / "tree"
    (root / LONG).mkdir(parents=True)
    (root / LONG / "deep").write_bytes(b"deep")
    (root / "empty").touch()
    (root / "exact").write_bytes(os.urandom(1024))
    (root / "odd").write_bytes(os.urandom(1025))
    (root / "new\nline ünd \udcff".encode(errors="surrogateescape").decode(errors="surrogateescape")).write_bytes(b"x")
    (root / "link").symlink_to("x" * 300)
    os.link(root / "odd", root / "twin")
    os.mkfifo(root / "fifo")
    (root / "odd").chmod(0o4751)
    os.utime(root / "odd", ns=(1_600_000_000_123_456_789, 1_600_000_000_123_456_789))
    with (root / "sparse").open("wb") as file:
        file.truncate(3 << 20)
        for number in range(40):
            file.seek(number * (64 << 10))
            file.write(os.urandom(4096 + number))
    return root


@pytest.mark.parametrize(
    "options", [("gnu",), ("pax",), ("gnu", "-S"), ("pax", "-S"), ("pax", "-S", "--sparse-version=0.1")]
)
def test_reads_what_gnu_tar_writes(tree: Path, options: tuple[str, ...]) -> None:
    argv = ["tar", "-C", str(tree), f"--format={options[0]}", *options[1:], "-c", "."]
    data = subprocess.run(argv, capture_output=True, check=True).stdout
    members = {member.name.rstrip(b"/").removeprefix(b"./"): (member, content) for member, content in read(data)}
    on_disk = {os.fsencode(os.path.relpath(path, tree)) for path in walk(tree)}
    assert set(members) - {b"."} == on_disk
    for name in on_disk:
        member, content = members[name]
        path = os.fsencode(tree) + b"/" + name
        state = os.lstat(path)
        assert member.uid == state.st_uid and member.gid == state.st_gid
        assert member.mtime_ns // 10**9 == state.st_mtime_ns // 10**9
        if member.type is Type.FILE:
            assert hashlib.sha256(content).digest() == hashlib.sha256(Path(os.fsdecode(path)).read_bytes()).digest()
            assert member.mode == state.st_mode & 0o7777
        elif member.type is Type.SYMLINK:
            assert member.link == b"x" * 300
    if options[0] == "pax":
        assert members[b"odd"][0].mtime_ns == 1_600_000_000_123_456_789 or members[b"odd"][0].type is Type.HARD_LINK
    assert {members[b"odd"][0].type, members[b"twin"][0].type} == {Type.FILE, Type.HARD_LINK}
    assert members[b"fifo"][0].type is Type.FIFO


def walk(root: Path) -> Iterator[str]:
    for above, directories, files in os.walk(root):
        for name in directories + files:
            yield os.path.join(above, name)  # noqa: PTH118


def archive(*members: tarfile.TarInfo, form: int = tarfile.PAX_FORMAT, **pax: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form, pax_headers=pax) as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(bytes(member.size)))
    return buffer.getvalue()


def test_large_and_negative_numbers() -> None:
    info = tarfile.TarInfo("x")
    info.uid, info.gid, info.mtime = 3_000_000_000, 2_100_000, -5
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        ((member, _),) = read(archive(info, form=form))
        assert (member.uid, member.gid, member.mtime_ns) == (3_000_000_000, 2_100_000, -5 * 10**9)


def test_attributes_of_both_dialects() -> None:
    schily, libarchive = tarfile.TarInfo("a"), tarfile.TarInfo("b")
    schily.pax_headers = {"SCHILY.xattr.user.one": "1=2\n3"}
    libarchive.pax_headers = {"LIBARCHIVE.xattr.user.t%77o": "AAEC/w"}
    (first, _), (second, _) = read(archive(schily, libarchive))
    assert first.xattrs == {b"user.one": b"1=2\n3"}
    assert second.xattrs == {b"user.two": b"\0\1\2\xff"}


def test_global_header_and_old_directories() -> None:
    info = tarfile.TarInfo("dir/")
    info.type = tarfile.AREGTYPE
    ((member, _),) = read(archive(info, comment="from git"))
    assert member.type is Type.DIRECTORY


def test_links_have_no_content_though_they_state_a_size() -> None:
    link, after = tarfile.TarInfo("link"), tarfile.TarInfo("after")
    link.type, link.linkname = tarfile.LNKTYPE, "target"
    header = bytearray(link.tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = b"00000001000\0"
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
    assert [m.name for m, _ in read(bytes(header) + archive(after, form=tarfile.USTAR_FORMAT))] == [b"link", b"after"]


def test_every_cut_is_noticed() -> None:
    info = tarfile.TarInfo("x" * 150)
    info.size = 1000
    data = archive(info, info)
    end = data.rstrip(b"\0")
    whole = -(-len(end) // 512) * 512
    for length in range(0, whole, 97):
        with pytest.raises(Invalid, match="cut off"):
            read(data[:length])


def test_damaged_header_is_not_the_end() -> None:
    info = tarfile.TarInfo("x")
    data = bytearray(archive(info, info, info, form=tarfile.USTAR_FORMAT))
    data[512 + 3] ^= 1
    with pytest.raises(Invalid, match="wrong checksum"):
        read(bytes(data))


def test_what_is_no_tar() -> None:
    with pytest.raises(Invalid, match="cannot be read"):
        read(b"#!/bin/sh\n" * 200)


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_huge_extension_header_is_refused_unread(kind: bytes) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = kind, MAX_EXTENSION_BYTES + 1
    with pytest.raises(Invalid, match="too large"):
        read(info.tobuf(tarfile.GNU_FORMAT))


def test_many_extension_headers_are_refused() -> None:
    chain = b""
    for number in range(40):
        value = b"%d comment.%03d=" % (100_017, number)
        body = value + b"x" * (100_017 - len(value) - 1) + b"\n"
        info = tarfile.TarInfo("x")
        info.type, info.size = b"x", len(body)
        chain += info.tobuf(tarfile.USTAR_FORMAT) + body + bytes(-len(body) % 512)
    with pytest.raises(Invalid, match="exceed"):
        read(chain)


@pytest.mark.parametrize(
    "headers",
    [
        {"GNU.sparse.map": "0,512,100,512", "GNU.sparse.size": "2000"},
        {"GNU.sparse.map": "0,1,2", "GNU.sparse.size": "2000"},
        {"GNU.sparse.map": "0,1024", "GNU.sparse.size": "10"},
        {"GNU.sparse.map": "0,512", "GNU.sparse.size": "2000"},
        {"GNU.sparse.map": "-5,1024", "GNU.sparse.size": "2000"},
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "2000"},
        {"GNU.sparse.offset": "1"},
        {"size": "99999999999999999999"},
        {"size": "-1"},
        {"uid": "abc"},
        {"mtime": "1e9"},
    ],
)
def test_malformed_pax_headers(headers: dict[str, str]) -> None:
    info = tarfile.TarInfo("x")
    info.size, info.pax_headers = 1024, headers
    with pytest.raises(Invalid):
        read(archive(info))


def test_flipped_bytes_never_raise_anything_else() -> None:
    info = tarfile.TarInfo("sparse")
    info.size, info.pax_headers = 1024, {"GNU.sparse.map": "0,512,1000,512", "GNU.sparse.size": "2000"}
    data = archive(info, info)
    random.seed(3)
    for _ in range(2000):
        broken = bytearray(data)
        for _ in range(random.randint(1, 4)):
            broken[random.randrange(3000)] = random.randrange(256)
        try:
            read(bytes(broken))
        except Invalid:
            continue
