"""The contract of a storage pool: where template layers and machines' deltas live.

`triarch.testing.check_pool` is this page as tests. All methods are blocking and safe to call in a thread;
the engine calls those on one object one at a time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from triarch.model.template import Layer


class Pool(Protocol):
    """One place for layers and deltas. Names are digests and machine uuids: nothing else becomes a path."""

    name: str

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
