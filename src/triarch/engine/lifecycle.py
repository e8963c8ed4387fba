"""Machines that change by themselves, and the start of a daemon after whatever ended the last one."""

from __future__ import annotations

import asyncio
import logging
import shutil
from pathlib import Path

import msgspec

from triarch.engine.cards import ports_of
from triarch.engine.down import Down
from triarch.engine.journal import Journal, JournalRecord
from triarch.engine.machine_procedures import Delete, MachineArguments, Settle
from triarch.engine.operations import Operations
from triarch.engine.registry import rebuild
from triarch.engine.services import Services
from triarch.engine.supervise import Supervisor
from triarch.engine.template_procedures import remove_unused_layers
from triarch.errors import Damaged, Error
from triarch.model.driver import Observation
from triarch.model.machine import Exit, Machine
from triarch.model.state import State, Status

log = logging.getLogger(__name__)

ENDED = (Status.STOPPED, Status.ABSENT)


class Lifecycle:
    """Keeps records true to what drivers see. `hear` never blocks; what follows from it runs as operations."""

    def __init__(self, services: Services, operations: Operations, journal: Journal, supervisor: Supervisor) -> None:
        self._services = services
        self._supervisor = supervisor
        self._operations = operations
        self._journal = journal
        self._checks: set[asyncio.Task[None]] = set()

    # -- while running

    def hear(self, architecture: str, observation: Observation) -> None:
        """A driver tells of a machine. While an operation holds it, that waits for `released`, which looks anyway."""
        machine = self._services.machines.find_uuid(observation.uuid)
        if machine is None or machine.architecture != architecture or observation.status not in ENDED:
            return
        task = asyncio.create_task(self._recheck(machine, observation))
        self._checks.add(task)
        task.add_done_callback(self._checks.discard)

    async def released(self, target: str) -> None:
        """An operation let go of `target`: it may have ended meanwhile, even before its start was recorded."""
        kind, _, name = target.partition("/")
        kept = self._services.machines.find(name) if kind == "machine" else None
        if kept is None or self._operations.holder(target) is not None:
            # Whatever holds it by now lets go of it, too.
            return
        machine = kept.value
        if machine.state is State.RUNNING:
            await self._recheck(machine)
        elif machine.ephemeral and machine.started_at is not None and machine.state in (State.STOPPED, State.FAILED):
            self._operations.begin(Delete(self._services, MachineArguments(machine=machine)))
        else:
            await self._supervisor.consider(machine)

    async def _recheck(self, machine: Machine, heard: Observation | None = None) -> None:
        """What was heard may speak of an earlier run: the host decides."""
        try:
            observation = await self._services.driver(machine).observe(self._services.spec(machine))
        except Error:
            log.exception("cannot observe machine '%s'", machine.name)
            return
        if observation.status in ENDED:
            if observation.exit is None and heard is not None:
                observation = heard
            self._settle(machine, observation)

    def _settle(self, machine: Machine, observation: Observation) -> None:
        free = self._operations.holder(f"machine/{machine.name}") is None
        if free and machine.state in (State.RUNNING, State.PAUSED):
            self._operations.begin(Settle(self._services, MachineArguments(machine=machine), observation))

    # -- at the start of the daemon

    async def recover(self) -> None:
        """Finish or undo what was under way, adopt what runs, record what ended unseen, sweep what nobody owns."""
        await self._mend_network()
        unfinished = await self._journal.unfinished()
        for record in unfinished:
            await self._take_up(record)
        for kept in self._services.machines.all():
            if self._operations.holder(f"machine/{kept.value.name}") is None:
                await self._adopt(kept.value)
        if not unfinished:
            await asyncio.to_thread(self._sweep)

    async def _take_up(self, record: JournalRecord) -> None:
        if record.operation.verb == Down.verb:
            # Whoever asked for it asks again; the machines that it had stopped are recorded as such.
            await self._journal.end(record.operation.id)
            return
        try:
            self._operations.recover(record, rebuild(self._services, record))
        except (Damaged, msgspec.MsgspecError):
            log.exception("cannot read the journal of operation %s; it is left as it is", record.operation.id)

    async def _adopt(self, machine: Machine) -> None:
        if machine.state not in (State.RUNNING, State.PAUSED):
            return
        try:
            observation = await self._services.driver(machine).observe(self._services.spec(machine))
        except Error:
            log.exception("cannot observe machine '%s'; its record stays %s", machine.name, machine.state.value)
            return
        if observation.status in ENDED:
            if observation.exit is None:
                reason = "it ended while no daemon watched (the host restarted?)"
                observation = msgspec.structs.replace(observation, exit=Exit(code=None, reason=reason))
            self._operations.begin(Settle(self._services, MachineArguments(machine=machine), observation))
            return
        self._services.architectures.listen(machine.architecture)

    async def _mend_network(self) -> None:
        """Machines that run keep their networks even if a name server or firewall rules went with the last daemon."""
        live = [k.value for k in self._services.machines.all() if k.value.state in (State.RUNNING, State.PAUSED)]
        ports = [port for machine in live for port in ports_of(self._services, machine)]
        await self._services.network.restore(self._services.networks.all(), ports)

    def _sweep(self) -> None:
        """Layers, sets of disks and scratch space that no record names (blocking)."""
        remove_unused_layers(self._services)
        kept = {snapshot.id for snapshot in self._services.snapshots.all()}
        for set_id in self._services.pool.sets.all():
            if set_id not in kept:
                self._services.pool.sets.remove(set_id)
        work = Path(self._services.instance.state_dir) / "work"
        for path in work.iterdir() if work.is_dir() else ():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
