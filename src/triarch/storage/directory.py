"""The `directory` pool: plain files in one directory of any filesystem.

    ROOT/layers/DIGEST.erofs       read-only layers
    ROOT/layers/DIGEST.verified    what the layer's inode looked like when its digest was last found right
    ROOT/deltas/UUID.raw           deltas
    ROOT/sets/ID/                  copies of a machine's disks (`storage.disk_sets`)
    ROOT/volumes/UUID/NAME.raw     volumes
    ROOT/blank/SIZE.raw            one ready-made empty delta per size, cloned for every new machine

Whatever is being made or removed has a name that starts with a dot and is swept by `prepare`.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec

from triarch.errors import Damaged, Exists, Invalid, NotFound
from triarch.host.ext4 import check_filesystem, make_delta_image, read_superblock
from triarch.host.files import copy_sparse, free_space_bytes, full_disk_is_exhausted, sha256_of, sync_directory
from triarch.host.locks import lock_file
from triarch.model.template import Layer, check_digest
from triarch.storage.base import DiskSets, Volumes
from triarch.storage.disk_sets import DirectorySets
from triarch.storage.volumes import DirectoryVolumes

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")
_SECTOR_BYTES = 4096
_MAX_BLANKS = 16
# The same tree makes the same layer under any name; the template's own is taken.
_MEND_HINT = "triarch template import mended FILE (the archive that it came from)"


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """The inode of a layer whose digest was right. Any write since then shows in it.

    It counts for one boot: a power cut can lose data of a file without a trace in its inode.
    """

    size_bytes: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    device: int
    boot_id: str


class DirectoryPool:
    """See `triarch.storage.base.Pool`. `root` belongs to the pool alone."""

    def __init__(self, name: str, root: Path) -> None:
        self.name = name
        self.root = root
        self._layers = root / "layers"
        self._deltas = root / "deltas"
        self._blanks = root / "blank"
        self.sets: DiskSets = DirectorySets(root / "sets", self._deltas, root / "volumes")
        self.volumes: Volumes = DirectoryVolumes(root / "volumes")
        self._making = threading.Lock()
        # Python ends when its threads have: what was given to this one is done by then.
        self._unlinking = ThreadPoolExecutor(1, "unlink")

    def prepare(self) -> None:
        for directory in (self.root, self._layers, self._deltas, self._blanks):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for directory in (self._layers, self._deltas, self._blanks):
            for leftover in directory.glob(".*"):
                leftover.unlink()
        self.sets.prepare()
        self.volumes.prepare()

    # Layers

    def layer_path(self, digest: str) -> Path:
        return self._layers / f"{check_digest(digest)}.erofs"

    def add_layer(self, source: Path) -> Layer:
        with full_disk_is_exhausted(f"layer {source.name}", self._layers):
            with self._making, _staged(self._layers / ".new-layer") as staged:
                _move(source, staged)
                staged.chmod(0o444)
                layer = Layer(digest=sha256_of(staged), size_bytes=staged.stat().st_size)
                self._install(staged, layer)
            return layer

    def _install(self, staged: Path, layer: Layer) -> None:
        """Keep a whole layer that is there already (machines may have it mounted); replace a damaged one."""
        with contextlib.suppress(Damaged, NotFound):
            self.verify_layer(layer)
            return
        _sync(staged)
        staged.rename(self.layer_path(layer.digest))
        sync_directory(self._layers)
        self._remember(layer)

    def verify_layer(self, layer: Layer) -> Path:
        path = self.layer_path(layer.digest)
        try:
            found = _inode(path)
        except FileNotFoundError as error:
            raise NotFound(
                f"template layer {layer.digest[:12]} is not in pool '{self.name}': there is no file {path}",
                hint=_MEND_HINT,
                digest=layer.digest,
            ) from error
        if found.size_bytes != layer.size_bytes:
            raise self._damaged(layer, f"it has {found.size_bytes} bytes instead of {layer.size_bytes}")
        if self._remembered(layer.digest) == found:
            return path
        digest = sha256_of(path)
        if digest != layer.digest:
            raise self._damaged(layer, f"its sha256 is {digest}")
        self._remember(layer)
        return path

    def _damaged(self, layer: Layer, finding: str) -> Damaged:
        path = self.layer_path(layer.digest)
        return Damaged(
            f"template layer {path} is damaged: {finding}",
            hint=_MEND_HINT,
            path=str(path),
            digest=layer.digest,
        )

    def _remember(self, layer: Layer) -> None:
        """Only saves time, so that a full disk here is no failure."""
        with contextlib.suppress(OSError), _staged(self._layers / ".new-verified") as staged:
            staged.write_bytes(msgspec.json.encode(_inode(self.layer_path(layer.digest))))
            staged.rename(self._verified_path(layer.digest))

    def _remembered(self, digest: str) -> Verified | None:
        try:
            return msgspec.json.decode(self._verified_path(digest).read_bytes(), type=Verified)
        except (OSError, msgspec.DecodeError):
            return None

    def _verified_path(self, digest: str) -> Path:
        return self.layer_path(digest).with_suffix(".verified")

    def remove_layer(self, digest: str) -> None:
        self._verified_path(digest).unlink(missing_ok=True)
        self.layer_path(digest).unlink(missing_ok=True)

    def layers(self) -> tuple[Layer, ...]:
        paths = sorted(self._layers.glob("[!.]*.erofs"))
        return tuple(Layer(digest=path.stem, size_bytes=path.stat().st_size) for path in paths)

    # Deltas

    def delta_path(self, uuid: str) -> Path:
        if not _UUID.match(uuid):
            raise Invalid(f"illegal machine uuid {uuid[:80]!r}: it needs 8-4-4-4-12 lower-case hex digits")
        return self._deltas / f"{uuid}.raw"

    def create_delta(self, uuid: str, size_bytes: int, *, durable: bool = True) -> Path:
        """As in `Pool`; the size is rounded up to whole sectors of 4,096 bytes, which every hypervisor takes."""
        path = self.delta_path(uuid)
        size_bytes = -(-size_bytes // _SECTOR_BYTES) * _SECTOR_BYTES
        if path.exists():
            _check_is_delta(path, size_bytes)
            return path
        with full_disk_is_exhausted(f"a delta of {size_bytes >> 20} MiB", self._deltas):
            blank = self._blank(size_bytes)
            with _staged(self._deltas / f".{uuid}") as staged:
                _clone(blank, staged, durable=durable)
                staged.rename(path)
                if durable:
                    sync_directory(self._deltas)
        return path

    def _blank(self, size_bytes: int) -> Path:
        """The ready-made empty delta of this size; the first machine of a size has it made while others wait."""
        with self._making:
            return self._make_blank(self._blanks / f"{size_bytes}.raw", size_bytes)

    def _make_blank(self, path: Path, size_bytes: int) -> Path:
        if path.exists():
            return path
        for old in sorted(self._blanks.glob("[!.]*.raw"), key=lambda blank: blank.stat().st_mtime_ns)[
            : 1 - _MAX_BLANKS
        ]:
            old.unlink()
        with _staged(self._blanks / f".{size_bytes}") as staged:
            make_delta_image(staged, size_bytes)
            check_filesystem(staged)
            _sync(staged)
            staged.rename(path)
        return path

    def check_delta(self, uuid: str) -> None:
        with self._locked_delta(uuid) as path:
            check_filesystem(path)

    def remove_delta(self, uuid: str) -> None:
        """As in `Pool`. Giving the blocks back takes the filesystem tens of milliseconds: that happens afterwards."""
        removed = self._deltas / f".removed-{uuid}"
        with contextlib.suppress(NotFound), self._locked_delta(uuid) as path:
            path.rename(removed)
        # Not while it is open here: the blocks go with the last descriptor.
        self._unlinking.submit(removed.unlink, missing_ok=True)

    @contextlib.contextmanager
    def _locked_delta(self, uuid: str) -> Iterator[Path]:
        path = self.delta_path(uuid)
        fd = lock_file(path)
        try:
            yield path
        finally:
            os.close(fd)

    def deltas(self) -> tuple[str, ...]:
        return tuple(sorted(path.stem for path in self._deltas.glob("[!.]*.raw")))

    def allocated_bytes(self, uuid: str) -> int:
        path = self.delta_path(uuid)
        try:
            return path.stat().st_blocks * 512
        except FileNotFoundError as error:
            raise NotFound(f"there is no delta {path}", path=str(path)) from error

    def free_bytes(self) -> int:
        return free_space_bytes(self.root)


@contextlib.contextmanager
def _staged(path: Path) -> Iterator[Path]:
    """A name for something that is being made: absent at first, and gone at the end unless it was renamed."""
    path.unlink(missing_ok=True)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _move(source: Path, target: Path) -> None:
    if source.stat().st_dev == target.parent.stat().st_dev:
        source.rename(target)
        return
    _clone(source, target)
    source.unlink()


def _clone(source: Path, target: Path, *, durable: bool = True) -> None:
    with source.open("rb") as original, target.open("xb") as clone:
        os.fchmod(clone.fileno(), 0o600)
        copy_sparse(original.fileno(), clone.fileno())
        if durable:
            os.fsync(clone.fileno())


def _check_is_delta(path: Path, size_bytes: int) -> None:
    """Images get their name only when whole, so whatever has it may hold a machine's data: it is never replaced."""
    if path.stat().st_size != size_bytes:
        raise Exists(f"{path} exists with {path.stat().st_size} bytes; {size_bytes} were asked for", path=str(path))
    read_superblock(path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _inode(path: Path) -> Verified:
    state = path.stat()
    return Verified(
        size_bytes=state.st_size,
        mtime_ns=state.st_mtime_ns,
        ctime_ns=state.st_ctime_ns,
        inode=state.st_ino,
        device=state.st_dev,
        boot_id=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
    )
