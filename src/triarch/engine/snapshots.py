"""What the daemon can ask for about snapshots."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime, timedelta

from triarch.engine.capture import check_checkpoint
from triarch.engine.difference import difference
from triarch.engine.machine_actions import MachineActions
from triarch.engine.operations import Operations
from triarch.engine.policies import check_unprotected
from triarch.engine.services import Services
from triarch.engine.snapshot_procedures import (
    DeleteSnapshot,
    RenameSnapshot,
    Restore,
    SnapshotArguments,
    TakeSnapshot,
    check_restorable,
)
from triarch.errors import WrongState
from triarch.model.difference import Difference
from triarch.model.machine import Machine
from triarch.model.names import check_machine_name
from triarch.model.operation import Operation
from triarch.model.snapshot import CreateSnapshot, RestoreSnapshot, Snapshot
from triarch.model.state import State


class Snapshots:
    """Snapshots of machines. Changes return an `Operation` that already runs and holds the machine."""

    def __init__(self, services: Services, operations: Operations) -> None:
        self._services = services
        self._operations = operations

    def list(self, name: str) -> tuple[Snapshot, ...]:
        """Those of a machine, oldest first."""
        return self._services.snapshots.of(self._machine(name).uuid)

    def get(self, name: str, snapshot: str) -> Snapshot:
        return self._services.snapshots.get(self._machine(name), snapshot)

    def _machine(self, name: str) -> Machine:
        return self._services.machines.get(check_machine_name(name))

    def _free_machine(self, name: str) -> Machine:
        """The machine, if nothing holds it."""
        machine = self._machine(name)
        self._operations.check_free(f"machine/{name}")
        return machine

    async def create(self, name: str, request: CreateSnapshot, *, scheduled: bool = False) -> Operation:
        """Take one; a running machine stands still for the moment of the copy."""
        machine = self._free_machine(name)
        now = datetime.now(UTC)
        snapshot_name = request.name or self._free_name(machine, f"auto-{now:%Y%m%d-%H%M}-" if scheduled else "snap")
        self._services.snapshots.check_free(machine, snapshot_name)
        if request.stateful:
            if machine.state is not State.RUNNING:
                raise WrongState(
                    f"machine '{name}' has no memory to keep: it is {machine.state.value}; --stateful needs running",
                    hint=f"triarch start {name}",
                    machine=name,
                )
            await check_checkpoint(MachineActions(self._services, machine))
            if self._free_machine(name) is not machine:
                # It changed while its driver was asked.
                return await self.create(name, request, scheduled=scheduled)
        expires = request.expires_after_seconds
        snapshot = Snapshot(
            id=str(uuid.uuid4()),
            name=snapshot_name,
            machine=machine,
            created_at=now,
            expires_at=None if expires is None else now + timedelta(seconds=expires),
            scheduled=scheduled,
            stateful=request.stateful,
            description=request.description,
        )
        arguments = SnapshotArguments(machine=machine, snapshot=snapshot)
        return self._operations.begin(TakeSnapshot(self._services, arguments))

    def _free_name(self, machine: Machine, stem: str) -> str:
        taken = {snapshot.name for snapshot in self._services.snapshots.of(machine.uuid)}
        return next(name for name in (f"{stem}{number}" for number in range(len(taken) + 1)) if name not in taken)

    async def delete(self, name: str, snapshot: str) -> Operation:
        machine = self._free_machine(name)
        found = self._services.snapshots.get(machine, snapshot)
        return self._operations.begin(
            DeleteSnapshot(self._services, SnapshotArguments(machine=machine, snapshot=found))
        )

    async def rename(self, name: str, snapshot: str, new_name: str) -> Operation:
        machine = self._free_machine(name)
        found = self._services.snapshots.get(machine, snapshot)
        self._services.snapshots.check_free(machine, new_name)
        arguments = SnapshotArguments(machine=machine, snapshot=found, name=new_name)
        return self._operations.begin(RenameSnapshot(self._services, arguments))

    async def restore(self, name: str, request: RestoreSnapshot) -> Operation | None:
        """Bring the machine back. With `check` nothing is done and None says that it would work."""
        await self._services.architectures.need(self._machine(name).architecture)
        machine = self._free_machine(name)
        check_unprotected(machine, "restore")
        snapshot = self._services.snapshots.get(machine, request.snapshot)
        if request.check:
            await check_restorable(self._services, machine, snapshot, stateful=request.stateful)
            return None
        arguments = SnapshotArguments(
            machine=machine,
            snapshot=snapshot,
            stateful=request.stateful,
            staged=str(uuid.uuid4()),
            aside=str(uuid.uuid4()),
        )
        return self._operations.begin(Restore(self._services, arguments))

    async def diff(self, name: str, snapshot: str, other: str | None) -> Difference:
        """What changed from a snapshot to another one, or to what the machine is now."""
        machine = self._free_machine(name)
        old = self._services.snapshots.get(machine, snapshot)
        new = None if other is None else self._services.snapshots.get(machine, other)
        self._services.trees.check()
        return await difference(self._services, machine, old, new)


def expired(snapshot: Snapshot, now: datetime) -> bool:
    return snapshot.expires_at is not None and snapshot.expires_at <= now
