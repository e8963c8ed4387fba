"""Volumes as files: `ROOT/volumes/UUID/NAME.raw`, one ext4 filesystem each.

A volume that is being made or removed has a name that starts with a dot and is swept by `prepare`.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from triarch.errors import Invalid, NotFound
from triarch.host.ext4 import check_filesystem, make_volume_image
from triarch.host.files import full_disk_is_exhausted, sync_directory
from triarch.host.grow import filesystem_bytes, grow_at_rest
from triarch.host.locks import lock_file

_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,13}[a-z0-9])?\Z")
_SECTOR_BYTES = 4096


class DirectoryVolumes:
    """See `triarch.storage.base.Volumes`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def prepare(self) -> None:
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for leftover in self._root.glob("*/.*"):
            leftover.unlink()

    def path(self, uuid: str, name: str) -> Path:
        if not _NAME.match(name):
            raise Invalid(f"illegal name of a volume {name[:80]!r}: it needs up to 15 lower-case letters and digits")
        return self._folder(uuid) / f"{name}.raw"

    def all(self, uuid: str) -> tuple[str, ...]:
        return tuple(sorted(path.stem for path in self._folder(uuid).glob("[!.]*.raw")))

    def create(self, uuid: str, name: str, size_bytes: int) -> Path:
        path = self.path(uuid, name)
        size_bytes = -(-size_bytes // _SECTOR_BYTES) * _SECTOR_BYTES
        if path.exists():
            self._grow(path, size_bytes)
            return path
        staged = path.with_name(f".{path.name}")
        with full_disk_is_exhausted(f"volume '{name}' of {size_bytes >> 20} MiB", self._root):
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            staged.unlink(missing_ok=True)
            try:
                make_volume_image(staged, size_bytes)
                with staged.open("rb") as file:
                    os.fsync(file.fileno())
                staged.rename(path)
            finally:
                staged.unlink(missing_ok=True)
            sync_directory(path.parent)
        return path

    def _grow(self, path: Path, size_bytes: int) -> None:
        """A volume never shrinks: what is smaller than asked for grows, once nothing uses it."""
        size_bytes = max(size_bytes, path.stat().st_size)
        if filesystem_bytes(path) >= size_bytes:
            return
        with _locked(path):
            os.truncate(path, size_bytes)
            grow_at_rest(path)

    def check(self, uuid: str, name: str) -> None:
        path = self.path(uuid, name)
        with _locked(path):
            check_filesystem(path, is_delta=False)

    def remove(self, uuid: str, name: str) -> None:
        path = self.path(uuid, name)
        with suppress(NotFound), _locked(path):
            path.unlink()
        with suppress(OSError):
            path.parent.rmdir()

    def remove_all(self, uuid: str) -> None:
        for name in self.all(uuid):
            self.remove(uuid, name)
        shutil.rmtree(self._folder(uuid), ignore_errors=True)

    def _folder(self, uuid: str) -> Path:
        if not _UUID.match(uuid):
            raise Invalid(f"illegal machine uuid {uuid[:80]!r}: it needs 8-4-4-4-12 lower-case hex digits")
        return self._root / uuid


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    fd = lock_file(path)
    try:
        yield
    finally:
        os.close(fd)
