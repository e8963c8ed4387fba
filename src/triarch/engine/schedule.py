"""Scheduled snapshots: made when they are due, deleted when they expire, whatever became of the daemon meanwhile.

When one is due follows from when the last was, which is in the store: a restart forgets nothing, and what was missed
while no daemon ran is made once.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import msgspec

from triarch.engine.operations import Operations
from triarch.engine.services import Services
from triarch.engine.snapshots import Snapshots, expired
from triarch.engine.spool import Spool
from triarch.errors import Busy, Error, NotFound
from triarch.model.machine import Machine
from triarch.model.operation import Operation
from triarch.model.policy import SnapshotSchedule
from triarch.model.snapshot import CreateSnapshot, Snapshot
from triarch.model.state import State

log = logging.getLogger(__name__)

LOOK_SECONDS = 15.0
PREFIX = "schedules/"


class Considered(msgspec.Struct, frozen=True, kw_only=True):
    """When a machine's schedule was last due, whether a snapshot came of it or not."""

    at: datetime


class Schedule:
    """Looks at all machines every `LOOK_SECONDS`, as one task of the daemon."""

    def __init__(self, services: Services, operations: Operations, snapshots: Snapshots, spool: Spool) -> None:
        self._services = services
        self._operations = operations
        self._snapshots = snapshots
        self._spool = spool
        self._considered: dict[str, datetime] = {}
        self._task: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        for entry in await self._services.store.list(PREFIX):
            with suppress(msgspec.MsgspecError):
                considered = msgspec.json.decode(entry.value, type=Considered)
                self._considered[entry.key.removeprefix(PREFIX)] = considered.at
        self._task = asyncio.create_task(self._run(), name="schedule")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            try:
                await self.look(datetime.now(UTC))
            except Exception:
                log.exception("cannot look after scheduled snapshots; looking again")
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self, now: datetime) -> None:
        """Do all that is due at `now`; returns when it is done."""
        for kept in self._services.machines.all():
            machine = kept.value
            try:
                if machine.snapshots is not None:
                    await self._make(machine, machine.snapshots, now)
                await self._expire(machine, now)
            except Busy:
                # Whatever holds it ends, and then it is as due as now.
                continue
            except Error as error:
                log.warning("scheduled snapshots of machine '%s': %s", machine.name, error.message)
        await self._forget_gone()
        await asyncio.to_thread(self._spool.expire)

    async def _make(self, machine: Machine, schedule: SnapshotSchedule, now: datetime) -> None:
        if now < self._due(machine, schedule):
            return
        if not await self._changed(machine):
            await self._remember(machine, now)
            return
        request = CreateSnapshot(expires_after_seconds=schedule.keep_seconds)
        operation = await self._snapshots.create(machine.name, request, scheduled=True)
        # Also when it fails: then the next one is due when the next one is due.
        await self._remember(machine, now)
        await self._finish(operation)

    def _due(self, machine: Machine, schedule: SnapshotSchedule) -> datetime:
        last = self._considered.get(machine.uuid, machine.created_at)
        return last + timedelta(seconds=schedule.every_seconds)

    async def _changed(self, machine: Machine) -> bool:
        """Whether there is anything new: it runs, or was written since the newest scheduled snapshot."""
        made = [snapshot for snapshot in self._services.snapshots.of(machine.uuid) if snapshot.scheduled]
        if machine.state in (State.RUNNING, State.PAUSED) or not made:
            return True
        written = await asyncio.to_thread(self._services.pool.sets.written_at, machine.uuid)
        return written > made[-1].created_at.timestamp()

    async def _remember(self, machine: Machine, at: datetime) -> None:
        self._considered[machine.uuid] = at
        await self._services.store.put(PREFIX + machine.uuid, msgspec.json.encode(Considered(at=at)))

    async def _expire(self, machine: Machine, now: datetime) -> None:
        for snapshot in self._superfluous(machine, now):
            await self._finish(await self._snapshots.delete(machine.name, snapshot.name))

    def _superfluous(self, machine: Machine, now: datetime) -> list[Snapshot]:
        """Those whose time is over, and scheduled ones beyond the number that is kept, oldest first."""
        snapshots = self._services.snapshots.of(machine.uuid)
        over = [snapshot for snapshot in snapshots if expired(snapshot, now)]
        if machine.snapshots is not None:
            left = [snapshot for snapshot in snapshots if snapshot.scheduled and snapshot not in over]
            over += left[: -machine.snapshots.keep]
        return over

    async def _finish(self, operation: Operation) -> None:
        ended = await self._operations.wait(operation.id)
        if ended.error is not None:
            log.warning("%s of %s failed: %s", ended.verb, ended.target, ended.error.message)

    async def _forget_gone(self) -> None:
        there = {kept.value.uuid for kept in self._services.machines.all()}
        for uuid in [uuid for uuid in self._considered if uuid not in there]:
            del self._considered[uuid]
            with suppress(NotFound):
                await self._services.store.delete(PREFIX + uuid)
