"""Copies and backups, from the client's side. Uploads and downloads go on where they broke off."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from triarch.client.connection import Upload
from triarch.errors import Conflict, DaemonUnavailable, Invalid, NotFound, TimedOut
from triarch.model.operation import Operation
from triarch.model.snapshot import Backup, CopyMachine, ExportMachine, ImportMachine, UploadBackup

if TYPE_CHECKING:
    from triarch.client.api import Client

PIECE_BYTES = 1 << 20
TRIES = 3
RETRY_SECONDS = 0.3

Tell = Callable[[int, int], None]


class Backups:
    """`client.backups`: raises what `Client` raises, and `OSError` for the caller's own files.

    `tell` hears how many bytes of how many were sent or received.
    """

    def __init__(self, client: Client) -> None:
        self._client = client

    def copy(self, name: str, request: CopyMachine) -> Operation:
        return self._client._change("POST", f"/1/machines/{quote(name, safe='')}/copy", request)

    def export(self, name: str, request: ExportMachine | None = None) -> Operation:
        """The operation's result is the id of a backup in the daemon's spool."""
        target = f"/1/machines/{quote(name, safe='')}/export"
        return self._client._change("POST", target, request or ExportMachine())

    def list(self) -> tuple[Backup, ...]:
        return self._client._get("/1/backups", tuple[Backup, ...])

    def get(self, backup_id: str) -> Backup:
        return self._client._get(_backup(backup_id), Backup)

    def delete(self, backup_id: str) -> None:
        """Absent is success."""
        self._client._connection.request("DELETE", _backup(backup_id))

    def download(self, backup_id: str, path: Path, tell: Tell | None = None) -> None:
        """Write a backup of the spool into `path`. A connection that breaks is tried again, from where it broke.

        Until it is whole it is `path` with `.part` after it; a later call with the same id goes on with that.
        """
        part = Path(f"{path}.part")
        for attempt in range(TRIES):
            try:
                self._receive(backup_id, part, tell)
                break
            except (DaemonUnavailable, TimedOut):
                if attempt == TRIES - 1:
                    raise
        part.replace(path)

    def _receive(self, backup_id: str, part: Path, tell: Tell | None) -> None:
        total = self.get(backup_id).size_bytes or 0
        # Whatever secrets the machine has are in it.
        part.touch(mode=0o600)
        with part.open("ab") as file:
            have = file.tell()
            if have > total:
                file.truncate(have := 0)
            pieces = self._client._connection.stream(
                "GET", f"{_backup(backup_id)}/content", fields=(("Range", f"bytes={have}-"),)
            )
            for piece in pieces:
                file.write(piece)
                have += len(piece)
                if tell is not None:
                    tell(have, total)
            file.flush()
            os.fsync(file.fileno())

    def upload(self, path: Path, tell: Tell | None = None) -> str:
        """Bring a file into the spool and return its id there. What an earlier call brought is not sent again."""
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or not status.st_size:
                raise Invalid(f"cannot import '{path}': it is no ordinary file, or it is empty")
            begin = UploadBackup(id=_id_of(file.read(PIECE_BYTES), status), size_bytes=status.st_size)
            for attempt in range(TRIES):
                try:
                    self._send(file.fileno(), begin, tell)
                    break
                except (Conflict, DaemonUnavailable, TimedOut):
                    # A conflict: what a connection that broke had sent was still on its way.
                    if attempt == TRIES - 1:
                        raise
                    time.sleep(RETRY_SECONDS)
        return begin.id

    def _send(self, fd: int, begin: UploadBackup, tell: Tell | None) -> None:
        body = self._client._send("POST", "/1/backups", begin)
        have = self._client._decode(body, Backup).received_bytes
        if have >= begin.size_bytes:
            return

        def pieces() -> Iterator[bytes]:
            at = have
            while piece := os.pread(fd, min(PIECE_BYTES, begin.size_bytes - at), at):
                at += len(piece)
                yield piece
                if tell is not None:
                    tell(at, begin.size_bytes)

        upload = Upload("application/octet-stream", begin.size_bytes - have, pieces())
        self._client._connection.request("PUT", f"{_backup(begin.id)}/content?offset={have}", upload)

    def import_(self, backup_id: str, request: ImportMachine) -> Operation:
        """Make the machine of a backup that was uploaded; the operation's result is its name."""
        return self._client._change("POST", f"{_backup(backup_id)}/import", request)

    def forget(self, backup_id: str) -> None:
        """As `delete`, for what may be in use or gone."""
        with suppress(NotFound):
            self.delete(backup_id)


def _backup(backup_id: str) -> str:
    return f"/1/backups/{quote(backup_id, safe='')}"


def _id_of(beginning: bytes, status: os.stat_result) -> str:
    """The same for the same file, so that another run of this program finds what the first one sent."""
    text = f"{status.st_size} {status.st_mtime_ns} {status.st_ino}\n".encode()
    return hashlib.sha256(text + beginning).hexdigest()[:32]
