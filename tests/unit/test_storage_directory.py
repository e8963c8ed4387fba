"""What the directory pool does beyond the contract of pools, and how it fails."""

from __future__ import annotations

import hashlib
import os
import subprocess
import time
import uuid as uuids
from collections.abc import Iterator
from pathlib import Path

import pytest

from triarch.errors import Busy, Exhausted, Invalid, NotFound
from triarch.host import files
from triarch.host.files import copy_sparse, data_ranges
from triarch.host.locks import lock_file
from triarch.storage import directory
from triarch.storage.directory import DirectoryPool

MIB = 1 << 20


@pytest.fixture
def pool(tmp_path: Path) -> DirectoryPool:
    pool = DirectoryPool("test", tmp_path / "pool")
    pool.prepare()
    return pool


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 6 MiB."""
    path = tmp_path / "small"
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "triarch-test", str(path)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("cannot mount a tmpfs here (needs root)")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def tree(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*")}


def test_full_disk_while_a_layer_is_added(small_disk: Path, tmp_path: Path) -> None:
    pool = DirectoryPool("test", small_disk / "pool")
    pool.prepare()
    before = tree(small_disk)
    image = tmp_path / "image"
    image.write_bytes(os.urandom(8 * MIB))
    with pytest.raises(Exhausted, match="cannot write layer image") as caught:
        pool.add_layer(image)
    assert caught.value.hint == f"df -h {small_disk / 'pool' / 'layers'}"
    assert tree(small_disk) == before
    assert image.exists()


def test_full_disk_while_a_delta_is_made(small_disk: Path) -> None:
    pool = DirectoryPool("test", small_disk / "pool")
    pool.prepare()
    (small_disk / "filler").write_bytes(bytes(files.free_space_bytes(small_disk)))
    before = tree(small_disk)
    with pytest.raises(Exhausted):
        pool.create_delta(str(uuids.uuid4()), 10 << 30)
    assert tree(small_disk) == before


def test_full_disk_while_a_blank_is_cloned(small_disk: Path) -> None:
    pool = DirectoryPool("test", small_disk / "pool")
    pool.prepare()
    pool.create_delta(str(uuids.uuid4()), 10 << 30)
    (small_disk / "filler").write_bytes(bytes(files.free_space_bytes(small_disk)))
    before = tree(small_disk)
    with pytest.raises(Exhausted):
        pool.create_delta(str(uuids.uuid4()), 10 << 30)
    assert tree(small_disk) == before


def test_size_that_no_file_can_have_is_exhausted(pool: DirectoryPool) -> None:
    with pytest.raises(Exhausted):
        pool.create_delta(str(uuids.uuid4()), 1 << 62)
    assert pool.deltas() == ()


def test_leftovers_of_a_killed_daemon_are_swept(pool: DirectoryPool) -> None:
    for name in ("layers/.new-layer", "deltas/.half", "blank/.half"):
        (pool.root / name).write_bytes(b"half")
    pool.prepare()
    assert tree(pool.root) == {"layers", "deltas", "blank", "sets", "volumes"}


def test_second_verification_does_not_read_the_layer(
    pool: DirectoryPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = tmp_path / "image"
    image.write_bytes(os.urandom(MIB))
    layer = pool.add_layer(image)

    def refuse(path: Path) -> str:
        raise AssertionError("read again")

    monkeypatch.setattr(directory, "sha256_of", refuse)
    assert DirectoryPool("again", pool.root).verify_layer(layer).name == f"{layer.digest}.erofs"


def test_verification_counts_for_one_boot(pool: DirectoryPool, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(os.urandom(MIB))
    layer = pool.add_layer(image)
    note = pool.root / "layers" / f"{layer.digest}.verified"
    note.write_bytes(note.read_bytes().replace(b'"boot_id":"', b'"boot_id":"x'))
    stale = note.read_bytes()
    pool.verify_layer(layer)
    assert note.read_bytes() != stale


def test_deltas_are_private_and_layers_read_only(pool: DirectoryPool, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"layer")
    layer = pool.add_layer(image)
    assert pool.layer_path(layer.digest).stat().st_mode & 0o777 == 0o444
    assert pool.create_delta(str(uuids.uuid4()), 64 * MIB).stat().st_mode & 0o777 == 0o600
    assert pool.root.stat().st_mode & 0o777 == 0o700


def test_blanks_do_not_pile_up(pool: DirectoryPool) -> None:
    for extra in range(20):
        pool.create_delta(str(uuids.uuid4()), 64 * MIB + extra * 4096)
    assert len(list((pool.root / "blank").iterdir())) == 16
    assert len(pool.deltas()) == 20


def test_sparse_copy_keeps_content_and_holes(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    with source.open("wb") as file:
        file.truncate(64 * MIB)
        for offset in (0, 5 * MIB + 123, 64 * MIB - 7):
            file.seek(offset)
            file.write(b"content")
    with source.open("rb") as original, target.open("xb") as copy:
        copy_sparse(original.fileno(), copy.fileno())
    assert hashlib.sha256(source.read_bytes()).digest() == hashlib.sha256(target.read_bytes()).digest()
    assert target.stat().st_blocks * 512 < MIB
    with target.open("rb") as file:
        assert len(list(data_ranges(file.fileno(), 64 * MIB))) == 3


def test_lock_lives_as_long_as_any_duplicate(tmp_path: Path) -> None:
    path = tmp_path / "delta"
    path.touch()
    first = lock_file(path)
    duplicate = os.dup(first)
    os.close(first)
    with pytest.raises(Busy, match=str(path)):
        lock_file(path)
    os.close(duplicate)
    os.close(lock_file(path, writable=False))


def test_lock_needs_a_regular_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "link", tmp_path / "fifo", tmp_path):
        with pytest.raises(Invalid, match="not a regular file"):
            lock_file(path)
    with pytest.raises(NotFound):
        lock_file(tmp_path / "absent")


def test_locks_do_not_reach_child_programs(tmp_path: Path) -> None:
    path = tmp_path / "delta"
    path.touch()
    fd = lock_file(path)
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_a_removed_delta_gives_its_room_back_and_leaves_no_name(pool: DirectoryPool) -> None:
    uuid = str(uuids.uuid4())
    path = pool.create_delta(uuid, 64 * MIB, durable=False)
    pool.remove_delta(uuid)
    assert not path.exists()
    deadline = time.monotonic() + 10
    while list(path.parent.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not list(path.parent.iterdir())


def test_a_removal_that_was_interrupted_is_swept(pool: DirectoryPool) -> None:
    path = pool.create_delta(str(uuids.uuid4()), 64 * MIB)
    left = path.rename(path.with_name(f".removed-{path.stem}"))
    assert pool.deltas() == ()
    pool.prepare()
    assert not left.exists()
