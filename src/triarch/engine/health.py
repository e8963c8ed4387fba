"""Health: every running machine that has a check is asked at its interval, and what it answers is told.

Nothing of it is stored: after a restart of the daemon a machine is `starting` until its first answer.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from triarch.engine.probe import ask
from triarch.engine.services import Services
from triarch.model.machine import Machine
from triarch.model.policy import Health, HealthCheck
from triarch.model.state import State

# However many machines there are, so many are asked at once.
MAX_PROBES = 16
# A machine that starts is asked more often than its interval says, so that whoever waits for it goes on soon.
FIRST_DELAY_SECONDS = 0.25


@dataclass(slots=True)
class _Watch:
    """One run of one machine under one check."""

    check: HealthCheck
    started_at: datetime | None
    task: asyncio.Task[None]
    health: Health = Health.STARTING
    reason: str = ""
    bad_answers: int = 0
    judged: asyncio.Event = field(default_factory=asyncio.Event)

    def in_grace(self) -> bool:
        """Whether bad answers do not count yet."""
        if self.health is not Health.STARTING or self.started_at is None:
            return False
        return (datetime.now(UTC) - self.started_at).total_seconds() < self.check.grace_seconds


class HealthMonitor:
    """Told of every record that changes (`heed`); asks by itself."""

    def __init__(
        self, services: Services, busy: Callable[[Machine], bool], unhealthy: Callable[[Machine, str], None]
    ) -> None:
        """A machine that is `busy` with an operation is not asked. `unhealthy` hears of each bad answer that counts."""
        self._services = services
        self._busy = busy
        self._unhealthy = unhealthy
        self._watches: dict[str, _Watch] = {}
        self._slots = asyncio.Semaphore(MAX_PROBES)

    def health(self, uuid: str) -> Health | None:
        watch = self._watches.get(uuid)
        return watch.health if watch is not None else None

    def reason(self, uuid: str) -> str:
        """Why the last answer was a bad one."""
        watch = self._watches.get(uuid)
        return watch.reason if watch is not None else ""

    async def judged(self, uuid: str) -> Health | None:
        """Its health once that is more than `starting`; None when it has no check, or ended meanwhile."""
        watch = self._watches.get(uuid)
        if watch is not None:
            await watch.judged.wait()
        return self.health(uuid)

    def heed(self, uuid: str, machine: Machine | None) -> None:
        """The record as it is now, None when it is gone: begin, go on, or cease to ask."""
        check = machine.health if machine is not None and machine.state is State.RUNNING else None
        watch = self._watches.get(uuid)
        if watch is not None:
            if machine is not None and (watch.check, watch.started_at) == (check, machine.started_at):
                return
            watch.task.cancel()
            watch.judged.set()
            del self._watches[uuid]
        if check is not None and machine is not None:
            task = asyncio.create_task(self._watch(uuid), name=f"health-{machine.name}")
            self._watches[uuid] = _Watch(check=check, started_at=machine.started_at, task=task)

    async def close(self) -> None:
        tasks = [watch.task for watch in self._watches.values()]
        self._watches.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self, uuid: str) -> None:
        watch = self._watches[uuid]
        interval = watch.check.interval_seconds
        # Machines that began together are not asked together.
        delay = min(FIRST_DELAY_SECONDS, interval) * random.uniform(0.5, 1)
        while True:
            await asyncio.sleep(delay)
            await self._ask(uuid, watch)
            delay = min(delay * 2, interval) if watch.health is Health.STARTING else interval

    async def _ask(self, uuid: str, watch: _Watch) -> None:
        machine = self._services.machines.find_uuid(uuid)
        if machine is None or self._busy(machine):
            return
        async with self._slots:
            reason = await ask(self._services, machine, watch.check)
        machine = self._services.machines.find_uuid(uuid)
        # An answer that an operation came between says nothing.
        if machine is not None and not self._busy(machine):
            self._judge(machine, watch, reason)

    def _judge(self, machine: Machine, watch: _Watch, reason: str | None) -> None:
        watch.reason = reason or ""
        if reason is None:
            watch.bad_answers = 0
            self._turn(machine, watch, Health.HEALTHY)
        elif not watch.in_grace():
            watch.bad_answers += 1
            if watch.bad_answers >= watch.check.retries:
                self._turn(machine, watch, Health.UNHEALTHY)
                self._unhealthy(machine, reason)

    def _turn(self, machine: Machine, watch: _Watch, health: Health) -> None:
        if watch.health is not health:
            watch.health = health
            watch.judged.set()
            fields: dict[str, str | int | None] = {"reason": watch.reason} if watch.reason else {}
            self._services.events.publish(f"machine-{health.value}", f"machine/{machine.name}", fields)
