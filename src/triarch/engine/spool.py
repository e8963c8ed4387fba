"""Backups on their way in and out: files in `STATE_DIR/backups`. A connection or daemon that breaks leaves them there.

ID.triarch     a backup that is whole
ID.part        one that an export writes now
ID.upload      one that comes in; its whole size is in ID.size
"""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from pathlib import Path

from triarch.errors import Conflict, Exhausted, Invalid, NotFound
from triarch.host.files import free_space_bytes, full_disk_is_exhausted
from triarch.model.resources import format_size
from triarch.model.snapshot import Backup

_ID = re.compile(r"[0-9a-f]{32}\Z")
KEEP_SECONDS = 86_400.0


class Spool:
    """All of it is blocking, and quick but for `append`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def _path(self, backup_id: str, suffix: str) -> Path:
        if not _ID.match(backup_id):
            raise Invalid(f"illegal id of a backup {backup_id[:80]!r}: it needs 32 lower-case hexadecimal digits")
        return self._directory / f"{backup_id}.{suffix}"

    def _prepare(self) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)

    def all(self) -> tuple[Backup, ...]:
        if not self._directory.is_dir():
            return ()
        found = []
        for each in sorted({path.stem for path in self._directory.iterdir() if _ID.match(path.stem)}):
            # The announcement of an upload may be all that there is, and what expires is gone meanwhile.
            with suppress(NotFound):
                found.append(self.get(each))
        return tuple(found)

    def get(self, backup_id: str) -> Backup:
        """Raises `NotFound`."""
        for suffix in ("part", "upload", "triarch"):
            # The last piece of an upload, which another thread adds, makes it another file.
            with suppress(FileNotFoundError):
                received = self._path(backup_id, suffix).stat().st_size
                size = {"triarch": received, "part": None, "upload": self._announced(backup_id)}[suffix]
                return Backup(id=backup_id, size_bytes=size, received_bytes=received)
        raise NotFound(f"there is no backup '{backup_id}' in the daemon's spool", backup=backup_id)

    # -- out

    def draft(self, backup_id: str) -> Path:
        """Where an export writes; what an earlier try left is gone."""
        self._prepare()
        path = self._path(backup_id, "part")
        path.unlink(missing_ok=True)
        return path

    def publish(self, backup_id: str) -> None:
        """The draft is whole."""
        self._path(backup_id, "part").rename(self._path(backup_id, "triarch"))

    def whole(self, backup_id: str) -> Path:
        """The file of a backup that is whole. Raises `NotFound`, or `Conflict` for one that is not."""
        path = self._path(backup_id, "triarch")
        if not path.exists():
            found = self.get(backup_id)
            raise Conflict(f"backup '{backup_id}' is not whole: {found.received_bytes} bytes are there")
        os.utime(path)
        return path

    # -- in

    def begin(self, backup_id: str, size_bytes: int) -> Backup:
        """Announce an upload, or find out how far an earlier one of it came. Raises `Exhausted`."""
        self._prepare()
        if self._path(backup_id, "triarch").exists():
            return self.get(backup_id)
        path = self._path(backup_id, "upload")
        if path.exists() and self._announced(backup_id) != size_bytes:
            path.unlink()
        there, free = path.stat().st_size if path.exists() else 0, free_space_bytes(self._directory)
        if size_bytes - there > free:
            raise Exhausted(
                f"no room for the backup: it has {format_size(size_bytes)}, "
                f"{self._directory} has {format_size(free)} free",
                hint=f"df -h {self._directory}",
            )
        self._path(backup_id, "size").write_text(str(size_bytes))
        path.touch(mode=0o600)
        return self.get(backup_id)

    def _announced(self, backup_id: str) -> int:
        try:
            return int(self._path(backup_id, "size").read_text())
        except (FileNotFoundError, ValueError):
            return 0

    def append(self, backup_id: str, offset: int, data: bytes) -> Backup:
        """Add what comes next. Raises `Conflict` when it is not what comes next, `Invalid` for more than announced."""
        path, size_bytes = self._path(backup_id, "upload"), self._announced(backup_id)
        there = self.get(backup_id).received_bytes
        if offset != there:
            raise Conflict(f"backup '{backup_id}' has {there} bytes, so it cannot go on at {offset}", offset=there)
        if there + len(data) > size_bytes:
            raise Invalid(f"backup '{backup_id}' was announced with {size_bytes} bytes; this is more")
        with full_disk_is_exhausted("the backup", self._directory), path.open("ab", buffering=0) as file:
            view = memoryview(data)
            while view:
                view = view[file.write(view) :]
        if there + len(data) == size_bytes:
            path.rename(self._path(backup_id, "triarch"))
            self._path(backup_id, "size").unlink(missing_ok=True)
        return self.get(backup_id)

    # -- away

    def remove(self, backup_id: str) -> None:
        """Absent is success."""
        for suffix in ("triarch", "part", "upload", "size"):
            self._path(backup_id, suffix).unlink(missing_ok=True)

    def expire(self, now: float | None = None) -> None:
        """Remove what nobody has touched for a day."""
        limit = (time.time() if now is None else now) - KEEP_SECONDS
        for path in self._directory.iterdir() if self._directory.is_dir() else ():
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < limit:
                    path.unlink()
