"""`down`: nothing of the instance runs or is left on the host; its state directory stays as it is."""

from __future__ import annotations

import asyncio
import logging
import shutil
from typing import ClassVar

import msgspec

from triarch.engine.machine_procedures import MachineArguments, Stop
from triarch.engine.operations import Operations
from triarch.engine.order import best_order, dependencies, dependents
from triarch.engine.procedure import Step
from triarch.engine.services import Services
from triarch.engine.supervise import Supervisor
from triarch.errors import Busy, Failed
from triarch.model.operation import Progress
from triarch.model.state import State

log = logging.getLogger(__name__)


class DownArguments(msgspec.Struct, frozen=True):
    """With `until_boot` the machines that it stops are started again when the host has booted."""

    until_boot: bool = False


class Down:
    """Not recovered after a crash: the next `down` does what is left."""

    verb: ClassVar[str] = "down"
    target = "instance/this"
    result: str | None = None

    def __init__(
        self,
        services: Services,
        operations: Operations,
        supervisor: Supervisor,
        finished: asyncio.Event,
        arguments: DownArguments,
    ) -> None:
        self.arguments = arguments
        self._services = services
        self._supervisor = supervisor
        self._operations = operations
        self._finished = finished

    def steps(self) -> tuple[Step, ...]:
        return (
            Step("hold", self._supervisor.hold, self._supervisor.release),
            Step("machines", self._stop_machines),
            Step("host", self._clear_host),
        )

    async def _stop_machines(self) -> None:
        live = [k.value for k in self._services.machines.all() if k.value.state in (State.RUNNING, State.PAUSED)]
        self._services.report(self.target, Progress(step="machines", text=f"stopping {len(live)} machines"))
        await self._stop_in_order({machine.name for machine in live})
        left = [k.value.name for k in self._services.machines.all() if k.value.state in (State.RUNNING, State.PAUSED)]
        if left:
            raise Failed(f"machines still run: {', '.join(left)}", hint="triarch kill " + " ".join(left))

        if not self.arguments.until_boot:
            for kept in self._services.machines.all():
                if kept.value.desired is State.RUNNING:
                    await self._services.machines.put(msgspec.structs.replace(kept.value, desired=State.STOPPED))

    async def _stop_in_order(self, names: set[str]) -> None:
        """All at once, but none before those that depend on it."""
        depends = dependencies(kept.value for kept in self._services.machines.all())
        above = dependents(depends)
        tasks: dict[str, asyncio.Task[None]] = {}
        for name in reversed(best_order(depends)):
            if name in names:
                before = [tasks[other] for other in above[name] if other in tasks]
                tasks[name] = asyncio.create_task(self._stop_after(name, before))
        try:
            await asyncio.gather(*tasks.values())
        finally:
            for task in tasks.values():
                task.cancel()

    async def _stop_after(self, name: str, before: list[asyncio.Task[None]]) -> None:
        await asyncio.gather(*before)
        await self._stop(name)

    async def _stop(self, name: str) -> None:
        """Wait for whatever holds the machine, then stop it; a paused one, which cannot hear, is killed."""
        while (holder := self._operations.holder(f"machine/{name}")) is not None:
            await self._operations.wait(holder)
        kept = self._services.machines.find(name)
        if kept is None or kept.value.state not in (State.RUNNING, State.PAUSED):
            return
        seconds = 0.0 if kept.value.state is State.PAUSED else kept.value.stop_timeout_seconds
        arguments = MachineArguments(
            machine=kept.value, timeout_seconds=seconds, force=True, keep_desired=self.arguments.until_boot
        )
        try:
            operation = self._operations.begin(Stop(self._services, arguments))
        except Busy:
            await self._stop(name)
            return
        await self._operations.wait(operation.id)

    async def _clear_host(self) -> None:
        await self._services.network.teardown()
        await self._services.architectures.close()
        for name in ("m", "network"):
            shutil.rmtree(f"{self._services.instance.run_dir}/{name}", ignore_errors=True)
        self._finished.set()
