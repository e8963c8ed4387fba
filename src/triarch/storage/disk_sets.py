"""Sets of disks as files: `ROOT/sets/ID/delta.raw`, and `volume-NAME.raw` for each volume.

A set that is being made or removed has a name that starts with a dot and is swept by `prepare`.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from triarch.errors import Damaged, Exists, Invalid, NotFound
from triarch.host.ext4 import check_filesystem
from triarch.host.files import (
    copy_sparse,
    free_space_bytes,
    full_disk_is_exhausted,
    share_blocks,
    sync_directory,
)
from triarch.host.locks import lock_file
from triarch.host.sparse import read_content
from triarch.model.snapshot import DELTA, DiskImage

ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")
DISK_NAME = re.compile(r"(delta|volume-[a-z]([a-z0-9-]{0,13}[a-z0-9])?)\Z")
_VOLUME = "volume-"


class DirectorySets:
    """See `triarch.storage.base.DiskSets`. `deltas` and `volumes` are where the pool has those of machines."""

    def __init__(self, root: Path, deltas: Path, volumes: Path) -> None:
        self._root = root
        self._deltas = deltas
        self._volumes = volumes

    def prepare(self) -> None:
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for leftover in self._root.glob(".*"):
            shutil.rmtree(leftover)

    def path(self, set_id: str) -> Path:
        return self._root / _checked(set_id)

    def disk_path(self, set_id: str, disk: str) -> Path:
        if not DISK_NAME.match(disk):
            raise Invalid(f"illegal name of a disk {disk[:80]!r}: it needs 'delta' or 'volume-NAME'")
        return self.path(set_id) / f"{disk}.raw"

    def all(self) -> tuple[str, ...]:
        return tuple(sorted(path.name for path in self._root.glob("[!.]*")))

    def disks(self, set_id: str) -> tuple[str, ...]:
        path = self.path(set_id)
        if not path.is_dir():
            raise NotFound(f"there is no set of disks {path}", path=str(path))
        return tuple(sorted(disk.stem for disk in path.glob("*.raw")))

    # -- making

    def machine_disks(self, uuid: str) -> dict[str, Path]:
        _checked(uuid)
        volumes = sorted((self._volumes / uuid).glob("[!.]*.raw"))
        return {DELTA: self._deltas / f"{uuid}.raw"} | {f"{_VOLUME}{path.stem}": path for path in volumes}

    def capture(self, uuid: str, set_id: str) -> None:
        self._make(set_id, self.machine_disks(uuid))

    def duplicate(self, source_id: str, set_id: str) -> None:
        self._make(set_id, {disk: self.disk_path(source_id, disk) for disk in self.disks(source_id)})

    def begin(self, set_id: str) -> Path:
        path = self.path(set_id)
        if path.exists():
            raise Exists(f"the set of disks {path} exists already", path=str(path))
        draft = self._draft(set_id)
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(mode=0o700)
        return draft

    def finish(self, set_id: str) -> None:
        self._draft(set_id).rename(self.path(set_id))

    def _draft(self, set_id: str) -> Path:
        return self._root / f".{_checked(set_id)}"

    def _make(self, set_id: str, sources: dict[str, Path]) -> None:
        if self.path(set_id).exists():
            return
        draft = self._draft(set_id)
        if not draft.is_dir():
            self.begin(set_id)
        try:
            with full_disk_is_exhausted("a copy of the machine's disks", self._root):
                for disk, source in sources.items():
                    if not source.exists():
                        raise NotFound(
                            f"the machine's disk '{disk}' is lost: there is no file {source}", path=str(source)
                        )
                    _clone(source, draft / f"{disk}.raw")
            self.finish(set_id)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise

    # -- proving

    def check(self, set_id: str) -> None:
        for disk in self.disks(set_id):
            path = self.disk_path(set_id, disk)
            fd = lock_file(path)
            try:
                check_filesystem(path, is_delta=disk == DELTA)
            finally:
                os.close(fd)

    def describe(self, set_id: str) -> tuple[DiskImage, ...]:
        images = tuple(self._describe(set_id, disk) for disk in self.disks(set_id))
        sync_directory(self.path(set_id))
        sync_directory(self._root)
        return images

    def _describe(self, set_id: str, disk: str) -> DiskImage:
        path = self.disk_path(set_id, disk)
        with full_disk_is_exhausted("a copy of the machine's disks", self._root), path.open("rb") as file:
            os.fsync(file.fileno())
        status = path.stat()
        content = read_content(path)
        return DiskImage(
            name=disk,
            size_bytes=status.st_size,
            allocated_bytes=status.st_blocks * 512,
            content_bytes=content.content_bytes,
            digest=content.digest,
        )

    def verify(self, set_id: str, images: Iterable[DiskImage]) -> None:
        for image in images:
            path = self.disk_path(set_id, image.name)
            if not path.is_file():
                raise Damaged(f"its disk '{image.name}' is lost: there is no file {path}", path=str(path))
            found = path.stat().st_size
            if found != image.size_bytes:
                raise Damaged(
                    f"its disk '{image.name}' has {found} bytes instead of {image.size_bytes}", path=str(path)
                )
            if read_content(path).digest != image.digest:
                raise Damaged(f"its disk '{image.name}' is not what it was: {path} was changed", path=str(path))

    # -- using

    def install(self, set_id: str, uuid: str, aside_id: str) -> None:
        aside = self.path(aside_id)
        if not self.path(set_id).is_dir():
            return
        aside.mkdir(mode=0o700, exist_ok=True)
        for disk in self.disks(set_id):
            place, kept = self._machine_disk(uuid, disk), aside / f"{disk}.raw"
            if place.exists() and not kept.exists():
                # Whatever runs on it must not go on writing to what was put aside.
                os.close(lock_file(place))
                place.rename(kept)
            place.parent.mkdir(mode=0o700, exist_ok=True)
            self.disk_path(set_id, disk).rename(place)
            sync_directory(place.parent)
        sync_directory(aside)
        self.path(set_id).rmdir()

    def take_back(self, uuid: str, aside_id: str) -> None:
        if not self.path(aside_id).is_dir():
            return
        for disk in self.disks(aside_id):
            place = self._machine_disk(uuid, disk)
            if place.exists():
                os.close(lock_file(place))
            self.disk_path(aside_id, disk).replace(place)
            sync_directory(place.parent)
        self.path(aside_id).rmdir()

    def _machine_disk(self, uuid: str, disk: str) -> Path:
        _checked(uuid)
        if disk == DELTA:
            return self._deltas / f"{uuid}.raw"
        return self._volumes / uuid / f"{disk.removeprefix(_VOLUME)}.raw"

    def remove(self, set_id: str) -> None:
        path, removed = self.path(set_id), self._root / f".removed-{set_id}"
        shutil.rmtree(self._draft(set_id), ignore_errors=True)
        if path.exists():
            path.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)

    def written_at(self, uuid: str) -> float:
        return max((path.stat().st_mtime for path in self.machine_disks(uuid).values() if path.exists()), default=0.0)

    def allocated_bytes(self, set_id: str) -> int:
        return sum(path.stat().st_blocks * 512 for path in self.path(set_id).glob("*"))


def _checked(name: str) -> str:
    if not ID.match(name):
        raise Invalid(f"illegal id {name[:80]!r}: it needs 8-4-4-4-12 lower-case hex digits")
    return name


def _clone(source: Path, target: Path) -> None:
    """Not durable yet: whoever waits for the clone holds a machine still meanwhile."""
    with source.open("rb") as original, target.open("xb") as clone:
        os.fchmod(clone.fileno(), 0o600)
        if share_blocks(original.fileno(), clone.fileno()):
            return
        if source.stat().st_blocks * 512 > free_space_bytes(target.parent):
            # Known before: the disk need not be filled to the last byte under all the others to find out.
            raise OSError(errno.ENOSPC, "the disk has not the room")
        copy_sparse(original.fileno(), clone.fileno())
