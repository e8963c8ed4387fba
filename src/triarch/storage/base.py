"""The contract of a storage pool: where template layers and machines' deltas live.

`triarch.testing.check_pool` is this page as tests. All methods are blocking and safe to call in a thread;
the engine calls those on one object one at a time.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from triarch.model.snapshot import DiskImage
from triarch.model.template import Layer


class DiskSets(Protocol):
    """Whole copies of machines' disks: snapshots, and what restore, copy and backup work with.

    A set has an id of its own, in the form of a uuid, and holds a disk `delta` and one `volume-NAME` for each volume;
    beside them it may hold files of other names. It is there whole or not at all.
    """

    def prepare(self) -> None:
        """Make the place and sweep what was being made or removed. Idempotent."""
        ...

    def path(self, set_id: str) -> Path:
        """The directory of the set. Raises `Invalid` for what is no id."""
        ...

    def disk_path(self, set_id: str, disk: str) -> Path:
        """Where a disk of the set is or would be."""
        ...

    def all(self) -> tuple[str, ...]:
        """The ids of all sets."""
        ...

    def disks(self, set_id: str) -> tuple[str, ...]:
        """The names of the set's disks, sorted. Raises `NotFound`."""
        ...

    def machine_disks(self, uuid: str) -> dict[str, Path]:
        """The files of a machine's own disks by name."""
        ...

    def capture(self, uuid: str, set_id: str) -> None:
        """Clone a machine's disks, whose content the caller holds still, as fast as can be: not durable yet.

        They join what the caller put into a set that it began. An existing set is success. Raises `Exhausted`, leaving
        nothing, and `NotFound` for a disk that is lost.
        """
        ...

    def duplicate(self, source_id: str, set_id: str) -> None:
        """As `capture`, from another set."""
        ...

    def begin(self, set_id: str) -> Path:
        """A directory in which the caller makes the files of a new set, until `finish` or `remove`. Raises `Exists`."""
        ...

    def finish(self, set_id: str) -> None:
        """What was begun is a set."""
        ...

    def check(self, set_id: str) -> None:
        """Replay journals and prove every disk clean. Raises `Damaged`."""
        ...

    def describe(self, set_id: str) -> tuple[DiskImage, ...]:
        """Make the set durable and say what it holds; reads all of it."""
        ...

    def verify(self, set_id: str, images: Iterable[DiskImage]) -> None:
        """Raises `Damaged` that names the first disk which is not what it was."""
        ...

    def install(self, set_id: str, uuid: str, aside_id: str) -> None:
        """Make the set's disks those of the machine; those that were there become the set `aside_id`.

        Volumes that the set knows nothing of stay. Begun and interrupted, it is finished by calling it again, or undone
        by `take_back`. Raises `Busy` when something holds a disk.
        """
        ...

    def take_back(self, uuid: str, aside_id: str) -> None:
        """Put back the disks that were put aside; what took their place is gone then. Absent is success."""
        ...

    def remove(self, set_id: str) -> None:
        """Absent is success."""
        ...

    def written_at(self, uuid: str) -> float:
        """When one of the machine's own disks was last written, in seconds since 1970."""
        ...

    def allocated_bytes(self, set_id: str) -> int:
        """What the set takes on disk, shared blocks included."""
        ...


class Volumes(Protocol):
    """Filesystems of machines' own beside their deltas, by the machine's uuid and the device's name."""

    def prepare(self) -> None:
        """Make the place and sweep what was being made. Idempotent."""
        ...

    def path(self, uuid: str, name: str) -> Path:
        """Where the volume is or would be. Raises `Invalid`."""
        ...

    def all(self, uuid: str) -> tuple[str, ...]:
        """The names of a machine's volumes, attached or not."""
        ...

    def create(self, uuid: str, name: str, size_bytes: int) -> Path:
        """A new empty volume: a sparse raw image of ext4. One that is there keeps its data, and grows if it has to.

        Raises `Exhausted`, leaving nothing, and `Busy` when one that has to grow is in use.
        """
        ...

    def check(self, uuid: str, name: str) -> None:
        """As `Pool.check_delta`."""
        ...

    def remove(self, uuid: str, name: str) -> None:
        """Absent is success. Raises `Busy` when something holds it."""
        ...

    def remove_all(self, uuid: str) -> None:
        """Every volume of a machine. Raises `Busy`."""
        ...


class Pool(Protocol):
    """One place for layers and deltas. Names are digests and machine uuids: nothing else becomes a path."""

    name: str
    sets: DiskSets
    volumes: Volumes

    def prepare(self) -> None:
        """Make the pool's own directories. Idempotent."""
        ...

    def layer_path(self, digest: str) -> Path:
        """Where the layer is or would be. Raises `Invalid` for what is no digest."""
        ...

    def add_layer(self, source: Path) -> Layer:
        """Move a finished image into the pool under its sha256; the same content twice is success.

        Durable when it returns (fsync, rename). Raises `Exhausted` when the disk is full, leaving nothing.
        """
        ...

    def verify_layer(self, layer: Layer) -> Path:
        """The path of a layer whose size is right, and its digest, if it may have changed since last verified.

        Raises `Damaged` (naming the file and the template command that mends it) or `NotFound`.
        """
        ...

    def remove_layer(self, digest: str) -> None:
        """Absent is success."""
        ...

    def layers(self) -> tuple[Layer, ...]:
        """Every layer in the pool."""
        ...

    def delta_path(self, uuid: str) -> Path:
        """Where the delta of a machine is or would be."""
        ...

    def create_delta(self, uuid: str, size_bytes: int, *, durable: bool = True) -> Path:
        """A new empty delta: a sparse raw image of `size_bytes` holding ext4 with `/upper` (0755) and `/work`.

        One that is not `durable` need not outlive the host.

        Existing is success when it is whole (idempotent after a crash). Raises `Exhausted`, leaving nothing.
        """
        ...

    def check_delta(self, uuid: str) -> None:
        """Replay the journal if a kill left one, then prove the filesystem clean. Takes the delta's lock.

        Raises `Damaged` when e2fsck finds more than it may mend by itself, `Busy` when something holds the delta.
        """
        ...

    def remove_delta(self, uuid: str) -> None:
        """Absent is success; its room may come back a moment later. Raises `Busy` when something holds the delta."""
        ...

    def deltas(self) -> tuple[str, ...]:
        """The uuids of all deltas in the pool."""
        ...

    def allocated_bytes(self, uuid: str) -> int:
        """What the delta takes on disk now."""
        ...

    def free_bytes(self) -> int:
        """Room left for ordinary writers."""
        ...
