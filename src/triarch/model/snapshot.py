"""Snapshots of machines and backups of them."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated

import msgspec

from triarch.model.machine import Machine
from triarch.model.names import MACHINE_NAME_PATTERN
from triarch.model.settings import Settings
from triarch.model.template import Template

SNAPSHOT_PATTERN = MACHINE_NAME_PATTERN[:-1] + r"$(?!\n)"
SnapshotName = Annotated[str, msgspec.Meta(pattern=SNAPSHOT_PATTERN)]


DELTA = "delta"


class DiskImage(msgspec.Struct, frozen=True, kw_only=True):
    """One disk as it was when its copy was finished: `delta` or `volume-NAME`.

    `size_bytes` is what the machine sees, `allocated_bytes` what the copy took on disk, `content_bytes` what is left of
    it without blocks of zeros. `digest` is that of the content
    (`host.sparse.ContentDigest`): holes count as the zeros that they read as.
    """

    name: str
    size_bytes: int
    allocated_bytes: int
    content_bytes: int
    digest: str


class Consistency(StrEnum):
    """What a copy of a machine's disks is like.

    `stopped`: nobody wrote. `frozen`: everything that was written is in it, as after an orderly end. `crash`: as after
    a power cut, from which the journal of the filesystem brings it back; programs may have had more to say.
    """

    STOPPED = "stopped"
    FROZEN = "frozen"
    CRASH = "crash"


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """A machine as it was: the record (template digest, settings and all) and its disks, which belong together.

    `id` names the set of disks in the pool. `frozen_seconds` is how long the machine's filesystems stood still for it
    (None: it did not run). `stateful` ones hold the memory too, with `memory_digest` the sha256 of that file. The
    digests are what `restore` checks before it changes anything; `size_bytes` is what all of it took on disk.
    """

    id: str
    name: str
    machine: Machine
    created_at: datetime
    expires_at: datetime | None = None
    scheduled: bool = False
    stateful: bool = False
    consistency: Consistency = Consistency.STOPPED
    frozen_seconds: float | None = None
    size_bytes: int = 0
    disks: tuple[DiskImage, ...] = ()
    memory_digest: str = ""
    description: str = ""


class CreateSnapshot(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of snapshot. Without a name it is `snap0`, `snap1`, …"""

    name: SnapshotName | None = None
    stateful: bool = False
    description: Annotated[str, msgspec.Meta(max_length=1000)] = ""
    expires_after_seconds: Annotated[int, msgspec.Meta(ge=1, le=3660 * 86_400)] | None = None


class RenameSnapshot(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of rename of a snapshot."""

    name: SnapshotName


class RestoreSnapshot(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of restore: template digest, delta and settings come back together. `check` changes nothing.

    A running machine is stopped first and started again; with `stateful` it goes on where it was.
    """

    snapshot: SnapshotName
    stateful: bool = False
    check: bool = False


class CopyMachine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of copy: a new machine with the same template and settings, its own identity and a clone of the delta."""

    name: SnapshotName
    snapshot: SnapshotName | None = None
    start: bool = False


class ExportMachine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of export: the machine as it is, or as it was in a snapshot; its template's layers only if asked for."""

    snapshot: SnapshotName | None = None
    with_template: bool = False


class ImportMachine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of import: the machine in a backup that was uploaded, under its old name unless another is given.

    `host_devices` lets it have the folders, disks and devices of this host that the backup asks for.
    """

    name: SnapshotName | None = None
    architecture: str | None = None
    start: bool = False
    host_devices: bool = False


BACKUP_ID_PATTERN = r"^[0-9a-f]{32}$(?!\n)"
BackupId = Annotated[str, msgspec.Meta(pattern=BACKUP_ID_PATTERN)]


class UploadBackup(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of an upload's beginning. The same id and size again goes on where it broke off."""

    id: BackupId
    size_bytes: Annotated[int, msgspec.Meta(ge=1, le=1 << 60)]


class Backup(msgspec.Struct, frozen=True, kw_only=True):
    """A backup in the daemon's spool: one that was exported, or one that is being uploaded.

    `size_bytes` is what it has when it is whole, None while it is still being written; `received_bytes` what is there.
    It is removed once it was imported, and a day after the last that was done with it.
    """

    id: str
    size_bytes: int | None
    received_bytes: int


class BackupManifest(msgspec.Struct, frozen=True, kw_only=True):
    """The first part of a backup: what it holds, and from which Triarch. `format` is 1.

    `settings` is the sum of the machine's profiles and its own: it counts where those profiles are not there.
    """

    format: int
    version: str
    created_at: datetime
    machine: Machine
    settings: Settings
    template: Template
    disks: tuple[DiskImage, ...]
    with_template: bool = False
