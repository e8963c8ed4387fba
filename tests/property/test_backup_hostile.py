"""Backups that somebody tampered with: refused as damaged, never followed, and never more than they say."""

from __future__ import annotations

import hashlib
import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from triarch.errors import Damaged, Invalid
from triarch.host.sparse import BLOCK_BYTES, read_content
from triarch.model.machine import IdRange, Machine
from triarch.model.settings import Settings
from triarch.model.snapshot import BackupManifest, DiskImage
from triarch.model.template import Init, Layer, Template, TemplateRef, template_digest
from triarch.storage.backup import (
    _HEAD,
    DATA,
    END,
    END_OF_PART,
    MAGIC,
    MANIFEST,
    PART,
    read_backup,
    read_manifest,
    write_backup,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LAYER = Layer(digest="a" * 64, size_bytes=4096)
TEMPLATE = Template(
    name="t", level=1, digest=template_digest((LAYER,)), layers=(LAYER,), init=Init.SYSTEM, created_at=NOW
)
MACHINE = Machine(
    name="web",
    uuid="00000000-0000-4000-8000-000000000001",
    index=1,
    template=TemplateRef(name="t", level=1, digest=TEMPLATE.digest),
    architecture="container",
    init=Init.SYSTEM,
    ids=IdRange(base=0),
    created_at=NOW,
)
SIZE = 5 * BLOCK_BYTES + 4096


def chunk(kind: int, offset: int, payload: bytes = b"") -> bytes:
    head = _HEAD.pack(kind, offset, len(payload))
    return head + hashlib.sha256(head + payload).digest() + payload


def manifest(**changes: object) -> BackupManifest:
    disk = DiskImage(name="delta", size_bytes=SIZE, allocated_bytes=0, content_bytes=BLOCK_BYTES, digest="0" * 64)
    whole = BackupManifest(
        format=1, version="x", created_at=NOW, machine=MACHINE, settings=Settings(), template=TEMPLATE, disks=(disk,)
    )
    return msgspec.structs.replace(whole, **changes)


def compress(path: Path, content: bytes) -> Path:
    path.write_bytes(subprocess.run(["zstd", "-qc"], input=content, capture_output=True, check=True).stdout)
    return path


def unpack(path: Path, directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    for old in directory.iterdir():
        old.unlink()
    read_backup(path, lambda name: directory / name.replace("/", "_"), lambda text, fraction: None, lambda: False)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A real one, decompressed."""
    directory = tmp_path_factory.mktemp("good")
    disk = directory / "delta"
    with disk.open("wb") as file:
        os.truncate(file.fileno(), SIZE)
        for block in (0, 3):
            os.pwrite(file.fileno(), os.urandom(5000), block * BLOCK_BYTES)
    content = read_content(disk)
    image = DiskImage(
        name="delta", size_bytes=SIZE, allocated_bytes=0, content_bytes=content.content_bytes, digest=content.digest
    )
    target = directory / "web.triarch"
    write_backup(target, manifest(disks=(image,)), {"delta": disk}, lambda text, fraction: None, lambda: False)
    unpack(target, directory / "out")
    assert read_content(directory / "out/delta") == content
    return subprocess.run(["zstd", "-qdc", target], capture_output=True, check=True).stdout


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_tampered_stream_passes(good: bytes, tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(good)
    how = data.draw(st.sampled_from(("flip", "cut", "insert", "swap")))
    at = data.draw(st.integers(0, len(content) - 1))
    if how == "flip":
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    elif how == "cut":
        del content[at:]
    elif how == "insert":
        content[at:at] = data.draw(st.binary(min_size=1, max_size=64))
    else:
        length = data.draw(st.integers(1, 4096))
        if content[at : at + length] == content[at + length : at + 2 * length]:
            return
        content[at : at + 2 * length] = content[at + length : at + 2 * length] + content[at : at + length]
    if bytes(content) == good:
        return
    with pytest.raises((Damaged, Invalid)):
        unpack(compress(tmp_path / "bad.triarch", bytes(content)), tmp_path / "out")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=4096))
def test_no_noise_is_a_backup(tmp_path: Path, noise: bytes) -> None:
    (tmp_path / "noise").write_bytes(noise)
    with pytest.raises(Damaged):
        read_manifest(tmp_path / "noise")
    with pytest.raises(Damaged):
        read_manifest(compress(tmp_path / "packed", MAGIC + noise))


_BEGIN = chunk(PART, 0, b'{"name":"delta","size_bytes":%d}' % SIZE)
_BLOCK = bytes([1]) * BLOCK_BYTES


@pytest.mark.parametrize(
    "body",
    [
        _BEGIN + chunk(DATA, 7, _BLOCK),
        _BEGIN + chunk(DATA, 8 * BLOCK_BYTES, _BLOCK),
        _BEGIN + chunk(DATA, 0, _BLOCK[:100]),
        _BEGIN + chunk(DATA, BLOCK_BYTES, _BLOCK) + chunk(DATA, 0, _BLOCK),
        # More than the manifest announced: a bomb stops at its own word.
        _BEGIN + chunk(DATA, 0, _BLOCK) + chunk(DATA, BLOCK_BYTES, _BLOCK),
        _BEGIN + chunk(DATA, 0, _BLOCK) + chunk(END_OF_PART, SIZE),
        chunk(PART, 0, b'{"name":"../../etc/passwd","size_bytes":1}'),
        chunk(PART, 0, b'{"name":"delta","size_bytes":1}'),
        chunk(PART, 0, b"[" * 4000),
        chunk(END, 1),
        _HEAD.pack(DATA, 0, 1 << 31),
        b"",
    ],
    ids=range(12),
)
def test_lies_about_parts_are_refused(tmp_path: Path, body: bytes) -> None:
    content = MAGIC + chunk(MANIFEST, 0, msgspec.json.encode(manifest())) + body
    with pytest.raises(Damaged, match="damaged in its part 'delta'"):
        unpack(compress(tmp_path / "bad", content), tmp_path / "out")
    assert sum(path.stat().st_blocks * 512 for path in (tmp_path / "out").iterdir()) <= 3 * BLOCK_BYTES


@pytest.mark.parametrize(
    "changes",
    [
        {"disks": ()},
        {"disks": manifest().disks * 2},
        {"disks": (msgspec.structs.replace(manifest().disks[0], name="../delta"),)},
        {"disks": (msgspec.structs.replace(manifest().disks[0], size_bytes=1 << 60),)},
        {"disks": (*manifest().disks, msgspec.structs.replace(manifest().disks[0], name="volume-../../x"))},
        {"template": msgspec.structs.replace(TEMPLATE, digest="b" * 64)},
        {"machine": msgspec.structs.replace(MACHINE, template=TemplateRef(name="t", level=1, digest="b" * 64))},
    ],
    ids=range(7),
)
def test_lies_in_the_manifest_are_refused(tmp_path: Path, changes: dict[str, object]) -> None:
    content = MAGIC + chunk(MANIFEST, 0, msgspec.json.encode(manifest(**changes)))
    with pytest.raises(Damaged, match="manifest"):
        read_manifest(compress(tmp_path / "bad", content))
    content = MAGIC + chunk(MANIFEST, 0, b'{"format":2}')
    with pytest.raises(Invalid, match="format 2"):
        read_manifest(compress(tmp_path / "future", content))


@pytest.mark.parametrize(
    "changes",
    (
        {"disks": (msgspec.structs.replace(manifest().disks[0], content_bytes=-(1 << 50)),)},
        {"disks": (msgspec.structs.replace(manifest().disks[0], content_bytes=1 << 50),)},
        {"machine": msgspec.structs.replace(MACHINE, created_at=NOW.replace(tzinfo=None))},
        {"template": msgspec.structs.replace(TEMPLATE, created_at=NOW.replace(tzinfo=None))},
    ),
)
def test_no_figure_or_time_of_a_manifest_is_taken_on_trust(tmp_path: Path, changes: dict[str, object]) -> None:
    payload = msgspec.json.encode(manifest(**changes))
    with pytest.raises(Damaged, match="'manifest'"):
        read_manifest(compress(tmp_path / "b", MAGIC + chunk(MANIFEST, 0, payload)))
