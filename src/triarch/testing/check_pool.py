"""The contract of `storage/base.py` as tests. Subclass `CheckPool`, supply a pool, and every backend meets the same:

    class TestDirectoryPool(CheckPool):
        @pytest.fixture
        def pool(self, tmp_path):
            return DirectoryPool("test", tmp_path / "pool")

The suite reads and writes deltas with e2fsprogs (`debugfs`, `e2fsck`): it needs neither root nor a mount.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import uuid as uuids
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from triarch.errors import Busy, Damaged, Exists, Invalid, NotFound
from triarch.model.template import Layer
from triarch.storage.base import Pool

SIZE_BYTES = 256 << 20
LAYER_BYTES = (2 << 20) + 4096


def e2fs(*argv: str, commands: str = "") -> subprocess.CompletedProcess[str]:
    """Run a program of e2fsprogs, with `commands` on its standard input."""
    path = shutil.which(argv[0], path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if path is None:
        pytest.skip(f"{argv[0]} is not installed (package e2fsprogs)")
    return subprocess.run([path, *argv[1:]], input=commands, capture_output=True, text=True, check=False)


def new_uuid() -> str:
    return str(uuids.uuid4())


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the file's lock the way a loop device or a hypervisor does: through its own open file description."""
    with path.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def overwrite(path: Path, offset: int, data: bytes) -> None:
    """Damage a file that may be read-only, in place."""
    mode = path.stat().st_mode
    path.chmod(0o600)
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
    path.chmod(mode)


class PoolFixtures:
    """The pool comes from the subclass; the rest follows from it."""

    @pytest.fixture
    def pool(self, tmp_path: Path) -> Pool:
        raise NotImplementedError("a subclass of CheckPool supplies the fixture 'pool'")

    @pytest.fixture(autouse=True)
    def _prepared(self, pool: Pool) -> None:
        pool.prepare()

    @pytest.fixture
    def image(self, tmp_path: Path) -> Path:
        """A finished image outside the pool."""
        path = tmp_path / "workspace" / "tree.erofs"
        path.parent.mkdir()
        path.write_bytes(os.urandom(LAYER_BYTES))
        return path


class CheckLayers(PoolFixtures):
    def test_prepare_can_run_again_and_keeps_everything(self, pool: Pool, image: Path) -> None:
        layer = pool.add_layer(image)
        uuid = new_uuid()
        pool.create_delta(uuid, SIZE_BYTES)
        pool.prepare()
        assert pool.layers() == (layer,)
        assert pool.deltas() == (uuid,)

    def test_layer_is_moved_in_under_its_sha256(self, pool: Pool, image: Path) -> None:
        content = image.read_bytes()
        layer = pool.add_layer(image)
        assert layer == Layer(digest=hashlib.sha256(content).hexdigest(), size_bytes=len(content))
        assert pool.layer_path(layer.digest).read_bytes() == content
        assert pool.verify_layer(layer) == pool.layer_path(layer.digest)
        assert not image.exists()

    def test_same_content_twice_is_one_layer_and_keeps_the_first_file(self, pool: Pool, image: Path) -> None:
        twin = image.with_name("twin")
        shutil.copyfile(image, twin)
        layer = pool.add_layer(image)
        inode = pool.layer_path(layer.digest).stat().st_ino
        assert pool.add_layer(twin) == layer
        assert pool.layers() == (layer,)
        assert pool.layer_path(layer.digest).stat().st_ino == inode
        assert not twin.exists()

    def test_same_content_replaces_a_damaged_layer(self, pool: Pool, image: Path) -> None:
        twin = image.with_name("twin")
        shutil.copyfile(image, twin)
        layer = pool.add_layer(image)
        overwrite(pool.layer_path(layer.digest), 100, b"damage")
        assert pool.add_layer(twin) == layer
        assert pool.verify_layer(layer).stat().st_size == layer.size_bytes

    def test_damage_is_found_though_the_layer_was_verified_before(self, pool: Pool, image: Path) -> None:
        layer = pool.add_layer(image)
        path = pool.verify_layer(layer)
        before = path.stat()
        overwrite(path, LAYER_BYTES // 2, b"damage")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        with pytest.raises(Damaged) as caught:
            pool.verify_layer(layer)
        assert str(path) in caught.value.message
        assert "triarch template" in (caught.value.hint or "")
        with pytest.raises(Damaged):
            pool.verify_layer(layer)

    def test_short_layer_is_damaged(self, pool: Pool, image: Path) -> None:
        layer = pool.add_layer(image)
        path = pool.layer_path(layer.digest)
        path.chmod(0o600)
        os.truncate(path, LAYER_BYTES - 1)
        with pytest.raises(Damaged, match=str(LAYER_BYTES)):
            pool.verify_layer(layer)

    def test_missing_layer_is_not_found_and_removing_it_is_success(self, pool: Pool, image: Path) -> None:
        layer = pool.add_layer(image)
        pool.remove_layer(layer.digest)
        pool.remove_layer(layer.digest)
        assert pool.layers() == ()
        with pytest.raises(NotFound):
            pool.verify_layer(layer)

    @pytest.mark.parametrize("digest", ["", "..", "../" + "a" * 64, "A" * 64, "a" * 63, "a" * 64 + "\n"])
    def test_only_digests_become_paths(self, pool: Pool, digest: str) -> None:
        with pytest.raises(Invalid):
            pool.layer_path(digest)
        with pytest.raises(Invalid):
            pool.remove_layer(digest)


class CheckDeltas(PoolFixtures):
    def test_new_delta_is_an_empty_clean_sparse_ext4(self, pool: Pool) -> None:
        uuid = new_uuid()
        path = pool.create_delta(uuid, SIZE_BYTES)
        assert path == pool.delta_path(uuid)
        assert path.stat().st_size == SIZE_BYTES
        assert pool.allocated_bytes(uuid) < 8 << 20
        assert e2fs("e2fsck", "-fn", str(path)).returncode == 0
        for name in ("/upper", "/work"):
            facts = e2fs("debugfs", "-R", f"stat {name}", str(path)).stdout.split()
            assert facts[facts.index("Mode:") + 1] == "0755"
            assert facts[facts.index("User:") + 1] == facts[facts.index("Group:") + 1] == "0"
        pool.check_delta(uuid)

    def test_size_of_each_delta_is_its_own(self, pool: Pool) -> None:
        sizes = (64 << 20, (100 << 20) + 4096, 3 << 30)
        paths = [pool.create_delta(new_uuid(), size) for size in sizes]
        assert tuple(path.stat().st_size for path in paths) == sizes
        for path, size in zip(paths, sizes, strict=True):
            header = e2fs("dumpe2fs", "-h", str(path)).stdout
            blocks = int(header.split("Block count:")[1].split()[0])
            assert size - (1 << 20) <= blocks * 4096 <= size
        assert len(pool.deltas()) == len(sizes)

    def test_deltas_do_not_share_what_is_written(self, pool: Pool) -> None:
        one, other = new_uuid(), new_uuid()
        pool.create_delta(one, SIZE_BYTES)
        pool.create_delta(other, SIZE_BYTES)
        e2fs("debugfs", "-w", "-f", "-", str(pool.delta_path(one)), commands="mkdir upper/mine\n")
        assert "mine" in e2fs("debugfs", "-R", "ls -p /upper", str(pool.delta_path(one))).stdout
        assert "mine" not in e2fs("debugfs", "-R", "ls -p /upper", str(pool.delta_path(other))).stdout
        late = new_uuid()
        pool.create_delta(late, SIZE_BYTES)
        assert "mine" not in e2fs("debugfs", "-R", "ls -p /upper", str(pool.delta_path(late))).stdout

    def test_creating_again_keeps_what_the_machine_wrote(self, pool: Pool) -> None:
        uuid = new_uuid()
        path = pool.create_delta(uuid, SIZE_BYTES)
        e2fs("debugfs", "-w", "-f", "-", str(path), commands="mkdir upper/mine\n")
        assert pool.create_delta(uuid, SIZE_BYTES) == path
        assert "mine" in e2fs("debugfs", "-R", "ls -p /upper", str(path)).stdout
        with pytest.raises(Exists):
            pool.create_delta(uuid, 2 * SIZE_BYTES)
        assert path.stat().st_size == SIZE_BYTES

    def test_check_mends_what_a_kill_left(self, pool: Pool) -> None:
        uuid = new_uuid()
        path = pool.create_delta(uuid, SIZE_BYTES)
        e2fs("debugfs", "-w", "-f", "-", str(path), commands="feature +needs_recovery\nssv state 0\n")
        assert "needs_recovery" in e2fs("dumpe2fs", "-h", str(path)).stdout
        pool.check_delta(uuid)
        header = e2fs("dumpe2fs", "-h", str(path)).stdout
        assert "needs_recovery" not in header
        assert "Filesystem state:         clean" in header

    def test_check_refuses_what_cannot_be_mended(self, pool: Pool) -> None:
        uuid = new_uuid()
        path = pool.create_delta(uuid, SIZE_BYTES)
        overwrite(path, 0, b"\xff" * 65536)
        with pytest.raises(Damaged, match=str(path)):
            pool.check_delta(uuid)

    def test_check_refuses_a_broken_directory(self, pool: Pool) -> None:
        uuid = new_uuid()
        path = pool.create_delta(uuid, SIZE_BYTES)
        e2fs("debugfs", "-w", "-f", "-", str(path), commands="clri upper\n")
        with pytest.raises(Damaged, match=str(path)):
            pool.check_delta(uuid)

    def test_held_delta_is_busy_and_untouched(self, pool: Pool) -> None:
        uuid = new_uuid()
        path = pool.create_delta(uuid, SIZE_BYTES)
        with held(path):
            with pytest.raises(Busy):
                pool.check_delta(uuid)
            with pytest.raises(Busy):
                pool.remove_delta(uuid)
        assert path.exists()
        pool.check_delta(uuid)
        pool.remove_delta(uuid)
        assert not path.exists()

    def test_missing_delta(self, pool: Pool) -> None:
        uuid = new_uuid()
        pool.remove_delta(uuid)
        with pytest.raises(NotFound):
            pool.check_delta(uuid)
        with pytest.raises(NotFound):
            pool.allocated_bytes(uuid)

    def test_allocated_bytes_follow_what_is_written(self, pool: Pool, tmp_path: Path) -> None:
        uuid = new_uuid()
        path = pool.create_delta(uuid, SIZE_BYTES)
        before = pool.allocated_bytes(uuid)
        data = tmp_path / "data"
        data.write_bytes(os.urandom(8 << 20))
        e2fs("debugfs", "-w", "-f", "-", str(path), commands=f"write {data} upper/data\n")
        assert pool.allocated_bytes(uuid) - before >= 8 << 20
        assert pool.free_bytes() > 0

    @pytest.mark.parametrize(
        "uuid", ["", ".", "../../etc/passwd", "web", "0" * 36, new_uuid().upper(), new_uuid() + "\n"]
    )
    def test_only_uuids_become_paths(self, pool: Pool, uuid: str) -> None:
        for refused in (pool.delta_path, pool.check_delta, pool.remove_delta, pool.allocated_bytes):
            with pytest.raises(Invalid):
                refused(uuid)
        with pytest.raises(Invalid):
            pool.create_delta(uuid, SIZE_BYTES)


class CheckVolumes(PoolFixtures):
    """Filesystems of machines' own beside their deltas."""

    def test_a_volume_is_an_empty_clean_ext4_and_keeps_what_is_written(self, pool: Pool) -> None:
        uuid = new_uuid()
        path = pool.volumes.create(uuid, "data", 64 << 20)
        assert (path.stat().st_size, pool.volumes.all(uuid)) == (64 << 20, ("data",))
        pool.volumes.check(uuid, "data")
        e2fs("debugfs", "-w", "-f", "-", str(path), commands="mkdir kept\n")
        assert pool.volumes.create(uuid, "data", 64 << 20) == path
        assert "kept" in e2fs("debugfs", "-R", "ls /", str(path)).stdout

    def test_a_volume_grows_and_never_shrinks(self, pool: Pool) -> None:
        uuid = new_uuid()
        path = pool.volumes.create(uuid, "data", 64 << 20)
        pool.volumes.create(uuid, "data", 128 << 20)
        assert path.stat().st_size == 128 << 20
        pool.volumes.create(uuid, "data", 64 << 20)
        assert path.stat().st_size == 128 << 20
        pool.volumes.check(uuid, "data")

    def test_a_held_volume_is_busy_and_untouched(self, pool: Pool) -> None:
        uuid = new_uuid()
        path = pool.volumes.create(uuid, "data", 64 << 20)
        with held(path):
            for act in (pool.volumes.check, pool.volumes.remove):
                with pytest.raises(Busy):
                    act(uuid, "data")
            with pytest.raises(Busy):
                pool.volumes.create(uuid, "data", 128 << 20)
        assert path.stat().st_size == 64 << 20

    def test_absent_is_removed_already(self, pool: Pool) -> None:
        uuid = new_uuid()
        pool.volumes.remove(uuid, "data")
        pool.volumes.create(uuid, "data", 64 << 20)
        pool.volumes.create(uuid, "more", 64 << 20)
        pool.volumes.remove_all(uuid)
        pool.volumes.remove_all(uuid)
        assert pool.volumes.all(uuid) == ()

    @pytest.mark.parametrize("name", ["", "..", "a/b", "A", "x" * 16, "a\n"])
    def test_only_device_names_become_paths(self, pool: Pool, name: str) -> None:
        with pytest.raises(Invalid):
            pool.volumes.path(new_uuid(), name)


class CheckSets(PoolFixtures):
    def write(self, pool: Pool, uuid: str, name: str) -> None:
        e2fs("debugfs", "-w", "-f", "-", str(pool.delta_path(uuid)), commands=f"mkdir upper/{name}\n")

    def names(self, path: Path) -> str:
        return e2fs("debugfs", "-R", "ls -p /upper", str(path)).stdout

    @pytest.fixture
    def captured(self, pool: Pool) -> tuple[str, str]:
        """A machine that wrote 'before', a set of it, and 'after' in the machine since."""
        uuid, set_id = new_uuid(), new_uuid()
        pool.create_delta(uuid, SIZE_BYTES)
        self.write(pool, uuid, "before")
        pool.sets.capture(uuid, set_id)
        self.write(pool, uuid, "after")
        return uuid, set_id

    def test_a_set_is_what_the_machine_was(self, pool: Pool, captured: tuple[str, str]) -> None:
        uuid, set_id = captured
        pool.sets.capture(uuid, set_id)
        assert pool.sets.all() == (set_id,) and pool.sets.disks(set_id) == ("delta",)
        pool.sets.check(set_id)
        names = self.names(pool.sets.disk_path(set_id, "delta"))
        assert "before" in names and "after" not in names
        (image,) = pool.sets.describe(set_id)
        assert image.size_bytes == SIZE_BYTES and 0 < image.content_bytes < SIZE_BYTES
        copy = new_uuid()
        pool.sets.duplicate(set_id, copy)
        pool.sets.verify(copy, (image,))

    def test_one_flipped_bit_and_a_lost_disk_are_damage(self, pool: Pool, captured: tuple[str, str]) -> None:
        _, set_id = captured
        images = pool.sets.describe(set_id)
        path = pool.sets.disk_path(set_id, "delta")
        overwrite(path, SIZE_BYTES // 2, b"\1")
        with pytest.raises(Damaged, match="delta"):
            pool.sets.verify(set_id, images)
        path.unlink()
        with pytest.raises(Damaged, match="lost"):
            pool.sets.verify(set_id, images)

    def test_installing_can_be_repeated_and_taken_back(self, pool: Pool, captured: tuple[str, str]) -> None:
        uuid, set_id = captured
        aside = new_uuid()
        for _ in range(2):
            pool.sets.install(set_id, uuid, aside)
        assert "after" not in self.names(pool.delta_path(uuid))
        assert pool.sets.all() == (aside,)
        for _ in range(2):
            pool.sets.take_back(uuid, aside)
        assert "after" in self.names(pool.delta_path(uuid))
        assert pool.sets.all() == ()

    def test_a_disk_in_use_is_neither_replaced_nor_lost(self, pool: Pool, captured: tuple[str, str]) -> None:
        uuid, set_id = captured
        with held(pool.delta_path(uuid)), pytest.raises(Busy):
            pool.sets.install(set_id, uuid, new_uuid())
        assert "after" in self.names(pool.delta_path(uuid))

    def test_what_was_begun_is_swept_and_only_ids_become_paths(self, pool: Pool) -> None:
        set_id = new_uuid()
        pool.sets.begin(set_id)
        assert pool.sets.all() == ()
        pool.prepare()
        pool.sets.begin(set_id)
        pool.sets.remove(set_id)
        pool.sets.remove(set_id)
        for name in ("", "..", "../x", set_id.upper()):
            with pytest.raises(Invalid):
                pool.sets.path(name)
        with pytest.raises(Invalid):
            pool.sets.disk_path(set_id, "../delta")


class CheckPool(CheckSets, CheckLayers, CheckVolumes, CheckDeltas):
    """The whole contract."""
