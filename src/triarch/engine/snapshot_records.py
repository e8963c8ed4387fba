"""Snapshots as stored: one key `snapshots/MACHINE-UUID/ID` each, with the copy in memory that lists are served from."""

from __future__ import annotations

import msgspec

from triarch.engine.records import decode_entry
from triarch.errors import Exists, NotFound
from triarch.model.machine import Machine
from triarch.model.nearest import did_you_mean, nearest
from triarch.model.snapshot import Snapshot
from triarch.store.base import Store


class SnapshotRecords:
    """Snapshots by their machine's uuid, so that a machine can change its name."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._by_machine: dict[str, dict[str, Snapshot]] = {}

    async def load(self) -> None:
        for entry in await self._store.list("snapshots/"):
            self._keep(decode_entry(entry, Snapshot))

    def _keep(self, snapshot: Snapshot) -> None:
        self._by_machine.setdefault(snapshot.machine.uuid, {})[snapshot.id] = snapshot

    def of(self, uuid: str) -> tuple[Snapshot, ...]:
        """Those of one machine, oldest first."""
        return tuple(sorted(self._by_machine.get(uuid, {}).values(), key=lambda each: (each.created_at, each.name)))

    def all(self) -> tuple[Snapshot, ...]:
        return tuple(snapshot for uuid in sorted(self._by_machine) for snapshot in self.of(uuid))

    def count(self, uuid: str) -> int:
        return len(self._by_machine.get(uuid, {}))

    def find(self, uuid: str, name: str) -> Snapshot | None:
        return next((each for each in self.of(uuid) if each.name == name), None)

    def get(self, machine: Machine, name: str) -> Snapshot:
        """Raises `NotFound` with the nearest name there is."""
        snapshot = self.find(machine.uuid, name)
        if snapshot is None:
            meant = did_you_mean(nearest(name, [each.name for each in self.of(machine.uuid)]))
            raise NotFound(
                f"machine '{machine.name}' has no snapshot '{name}'{meant}",
                hint=f"triarch snapshot list {machine.name}",
                machine=machine.name,
                snapshot=name,
            )
        return snapshot

    def check_free(self, machine: Machine, name: str) -> None:
        """Raises `Exists`."""
        if self.find(machine.uuid, name) is not None:
            raise Exists(
                f"machine '{machine.name}' has a snapshot '{name}' already",
                hint=f"triarch snapshot delete {machine.name} {name}",
                machine=machine.name,
                snapshot=name,
            )

    async def put(self, snapshot: Snapshot) -> None:
        """Write a snapshot as it is now."""
        await self._store.put(_key(snapshot), msgspec.json.encode(snapshot))
        self._keep(snapshot)

    async def remove(self, snapshot: Snapshot) -> None:
        """Absent is success."""
        await self._store.delete(_key(snapshot))
        self._by_machine.get(snapshot.machine.uuid, {}).pop(snapshot.id, None)


def _key(snapshot: Snapshot) -> str:
    return f"snapshots/{snapshot.machine.uuid}/{snapshot.id}"
