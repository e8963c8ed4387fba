"""The supervisor: machines that should run do, however their last run ended and whoever watched it.

What a machine should be is `desired` in its record, so that all of this outlives the daemon: a machine that is to run
and does not is started again if its policy says so, else the wish is dropped. A `reboot` inside is a restart under any
policy. At the host's boot (told by the kernel's boot id, not by the daemon's start) those start that ran when the host
went down, and those with `autostart`, each after what it depends on.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Coroutine
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from triarch.engine.health import HealthMonitor
from triarch.engine.machine_procedures import MachineArguments, Restart, Start
from triarch.engine.operations import Operations
from triarch.engine.order import best_order, dependencies, start_order
from triarch.engine.services import Services
from triarch.errors import Busy, Failed, NotFound
from triarch.host.facts import boot_id
from triarch.model.machine import Machine
from triarch.model.operation import OperationStatus, Progress
from triarch.model.policy import Health, RestartPolicy
from triarch.model.state import State

log = logging.getLogger(__name__)

FIRST_DELAY_SECONDS, MAX_DELAY_SECONDS = 1.0, 60.0
# A run as long as this was a good one: the next delay is the first one again.
GOOD_RUN_SECONDS = 60.0
REBOOTED = "rebooted"
BOOT_KEY = "host/boot-id"
RESTING = (State.STOPPED, State.FAILED)


def wants_restart(machine: Machine) -> bool:
    """Whether a machine that should run and does not is started again, from how its last run ended."""
    ended = machine.last_exit
    if ended is not None and ended.reason == REBOOTED:
        return True
    match machine.restart:
        case RestartPolicy.ALWAYS:
            return True
        case RestartPolicy.ON_FAILURE:
            return machine.state is State.FAILED or ended is None or ended.code != 0
        case RestartPolicy.NO:
            return False


def delay_seconds(short_runs: int) -> float:
    """The delay after so many short runs in a row, this one included: 1, 2, 4, … 60 seconds."""
    return min(FIRST_DELAY_SECONDS * 2.0 ** max(0, short_runs - 1), MAX_DELAY_SECONDS)


@dataclass(slots=True)
class _Pending:
    """A machine that waits for its next start."""

    task: asyncio.Task[None]
    at: datetime


class _Streak(msgspec.Struct, frozen=True):
    """So many ends without a good run; `started_at` tells the end of a run from a start that failed."""

    count: int
    started_at: datetime | None


class Supervisor:
    """Hears of every machine that nothing holds any more (`consider`), and of every record that changes (`heed`)."""

    def __init__(self, services: Services, operations: Operations) -> None:
        self._services = services
        self._operations = operations
        self.health = HealthMonitor(services, self._busy, self._unhealthy)
        self._pending: dict[str, _Pending] = {}
        self._streaks: dict[str, _Streak] = {}
        self._booting: set[str] = set()
        self._held = False
        self._tasks: set[asyncio.Task[None]] = set()

    def _busy(self, machine: Machine) -> bool:
        return self._operations.holder(f"machine/{machine.name}") is not None

    def next_start_at(self, uuid: str) -> datetime | None:
        """When the machine is started again, if it is to be."""
        pending = self._pending.get(uuid)
        return pending.at if pending is not None else None

    def heed(self, uuid: str, machine: Machine | None) -> None:
        """The record as it is now, None when it is gone."""
        self.health.heed(uuid, machine)
        if machine is None or machine.desired is not State.RUNNING or machine.state not in RESTING:
            self._cancel(uuid)
        if machine is None:
            self._streaks.pop(uuid, None)

    async def close(self) -> None:
        """Start nothing any more; what should run is taken up by the next daemon."""
        await self.hold()
        await self.health.close()

    async def hold(self) -> None:
        """Start nothing until `release`."""
        self._held = True
        tasks = [*self._tasks, *(pending.task for pending in self._pending.values())]
        self._pending.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def release(self) -> None:
        """Go on after a `hold`."""
        self._held = False
        for kept in self._services.machines.all():
            if not self._busy(kept.value):
                await self.consider(kept.value)

    def _cancel(self, uuid: str) -> None:
        pending = self._pending.pop(uuid, None)
        if pending is not None:
            pending.task.cancel()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- restarts

    async def consider(self, machine: Machine) -> None:
        """Nothing holds the machine: if it should run and does not, plan its next start or let it rest."""
        if machine.desired is not State.RUNNING or machine.state not in RESTING or machine.ephemeral:
            return
        if self._held or machine.uuid in self._booting or machine.uuid in self._pending:
            return
        if wants_restart(machine):
            self._plan(machine)
        else:
            await self._services.machines.put(msgspec.structs.replace(machine, desired=State.STOPPED))

    def _plan(self, machine: Machine) -> None:
        count = self._count_end(machine)
        rebooted = machine.last_exit is not None and machine.last_exit.reason == REBOOTED
        delay = 0.0 if rebooted and count == 1 else delay_seconds(count)
        self._pending[machine.uuid] = _Pending(
            task=asyncio.create_task(self._start_later(machine.uuid, delay), name=f"restart-{machine.name}"),
            at=datetime.now(UTC) + timedelta(seconds=delay),
        )
        fields: dict[str, str | int | None] = {"delay": f"{delay:g} s", "restarts": machine.restarts + 1}
        self._services.events.publish("machine-restarting", f"machine/{machine.name}", fields)

    def _count_end(self, machine: Machine) -> int:
        """How many ends in a row this one makes."""
        began, before = machine.started_at, self._streaks.get(machine.uuid)
        ran = began is not None and (before is None or began != before.started_at)
        good = ran and began is not None and (datetime.now(UTC) - began).total_seconds() >= GOOD_RUN_SECONDS
        count = 1 if before is None or good else before.count + 1
        self._streaks[machine.uuid] = _Streak(count, began)
        return count

    async def _start_later(self, uuid: str, delay: float) -> None:
        """A start that fails ends with `consider`, which plans the next one."""
        await asyncio.sleep(delay)
        self._pending.pop(uuid, None)
        machine = self._services.machines.find_uuid(uuid)
        if machine is None or self._busy(machine) or machine.state not in RESTING:
            return
        arguments = MachineArguments(machine=machine, restarts=machine.restarts + 1)
        self._operations.begin(Start(self._services, arguments))

    def _unhealthy(self, machine: Machine, reason: str) -> None:
        if machine.health is None or not machine.health.restart or self._busy(machine):
            return
        log.warning("machine '%s' is unhealthy (%s): restarting it", machine.name, reason)
        arguments = MachineArguments(
            machine=machine, timeout_seconds=machine.stop_timeout_seconds, force=True, restarts=machine.restarts + 1
        )
        operation = self._operations.begin(Restart(self._services, arguments))
        self._spawn(self._see_through(machine.uuid, operation.id))

    async def _see_through(self, uuid: str, operation_id: str) -> None:
        """A restart that nobody asked for must not end as a stop: the machine should still run."""
        await self._operations.wait(operation_id)
        machine = self._services.machines.find_uuid(uuid)
        if machine is not None and machine.state in RESTING and not self._busy(machine):
            await self._services.machines.put(
                msgspec.structs.replace(machine, desired=State.RUNNING, state=State.FAILED)
            )
            await self.consider(self._services.machines.get(machine.name))

    # -- what a machine depends on

    async def need(self, machine: Machine) -> None:
        """Return when everything that `machine` depends on runs, and is healthy where it has a check.

        What does not run is started. Raises `NotFound`, `Invalid` for a cycle, and `Failed` that names the one that did
        not come up.
        """
        start_order(dependencies(kept.value for kept in self._services.machines.all()))
        report = self._services.report
        for name in machine.depends_on:
            report(f"machine/{machine.name}", Progress(step="dependencies", text=f"waiting for machine '{name}'"))
            await self._bring_up(machine, name)

    async def _bring_up(self, machine: Machine, name: str) -> None:
        why = f"machine '{machine.name}' depends on '{name}'"
        while True:
            kept = self._services.machines.find(name)
            if kept is None:
                raise NotFound(f"{why}: there is no such machine", hint=f"triarch set {machine.name} depends-on=")
            needed = kept.value
            holder = self._operations.holder(f"machine/{name}")
            if holder is not None:
                await self._operations.wait(holder)
            elif needed.state is State.PAUSED:
                raise Failed(f"{why}: it is paused", hint=f"triarch resume {name}")
            elif needed.state is not State.RUNNING:
                await self._start_needed(needed, why)
            elif await self.health.judged(needed.uuid) is not Health.UNHEALTHY:
                now = self._services.machines.find_uuid(needed.uuid)
                if now is not None and now.state is State.RUNNING:
                    return
            else:
                reason = self.health.reason(needed.uuid)
                raise Failed(f"{why}: it is unhealthy ({reason})", hint=f"triarch info {name}")

    async def _start_needed(self, machine: Machine, why: str) -> None:
        try:
            operation = self._operations.begin(Start(self._services, MachineArguments(machine=machine)))
        except Busy:
            return
        ended = await self._operations.wait(operation.id)
        if ended.status is not OperationStatus.SUCCEEDED:
            said = ended.error.message if ended.error is not None else ended.status.value
            raise Failed(f"{why}: it did not start: {said}", hint=f"triarch start {machine.name}")

    # -- the start of the daemon and of the host

    async def begin(self) -> None:
        """After recovery: machines that run are watched; on a host that has booted since, start what should run."""
        now = boot_id()
        entry = await self._services.store.get(BOOT_KEY)
        records = [kept.value for kept in self._services.machines.all()]
        for machine in records:
            self.heed(machine.uuid, machine)
        if entry is not None and entry.value.decode() != now:
            self._booting = {machine.uuid for machine in records if self._starts_at_boot(machine)}
            self._spawn(self._boot(now))
            return
        await self._services.store.put(BOOT_KEY, now.encode())
        for machine in records:
            if not self._busy(machine):
                await self.consider(machine)

    @staticmethod
    def _starts_at_boot(machine: Machine) -> bool:
        return not machine.ephemeral and (machine.autostart or machine.desired is State.RUNNING)

    async def _boot(self, now: str) -> None:
        """Start all of `_booting`. Only then the boot counts as seen: a daemon that dies before does it again."""
        machines = {kept.value.name: kept.value for kept in self._services.machines.all()}
        booting = {name for name, machine in machines.items() if machine.uuid in self._booting}
        depends = dependencies(machines.values())
        slots = asyncio.Semaphore(max(2, os.cpu_count() or 2))
        tasks: dict[str, asyncio.Task[None]] = {}
        for name in best_order(depends):
            if name in booting:
                before = [tasks[other] for other in depends[name] if other in tasks]
                tasks[name] = asyncio.create_task(self._boot_one(machines[name].uuid, before, slots))
        try:
            await asyncio.gather(*tasks.values())
        finally:
            for task in tasks.values():
                task.cancel()
        self._booting.clear()
        await self._services.store.put(BOOT_KEY, now.encode())
        for kept in self._services.machines.all():
            if not self._busy(kept.value):
                await self.consider(kept.value)

    async def _boot_one(self, uuid: str, before: list[asyncio.Task[None]], slots: asyncio.Semaphore) -> None:
        await asyncio.gather(*before)
        async with slots:
            while (machine := self._services.machines.find_uuid(uuid)) is not None:
                holder = self._operations.holder(f"machine/{machine.name}")
                if holder is not None:
                    await self._operations.wait(holder)
                    continue
                if machine.state not in RESTING:
                    return
                if machine.desired is not State.RUNNING:
                    machine = msgspec.structs.replace(machine, desired=State.RUNNING)
                    await self._services.machines.put(machine)
                try:
                    operation = self._operations.begin(Start(self._services, MachineArguments(machine=machine)))
                except Busy:
                    continue
                await self._operations.wait(operation.id)
                return
