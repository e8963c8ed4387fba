"""`down`: nothing of the instance runs or is left on the host; its state directory stays as it is."""

from __future__ import annotations

import asyncio
import logging
import shutil
from typing import ClassVar

import msgspec

from triarch.engine.machine_procedures import MachineArguments, Stop
from triarch.engine.operations import Operations
from triarch.engine.procedure import Step
from triarch.engine.services import Services
from triarch.errors import Busy, Failed
from triarch.model.operation import Progress
from triarch.model.state import State

log = logging.getLogger(__name__)

STOP_SECONDS = 30.0


class DownArguments(msgspec.Struct, frozen=True):
    """Nothing to choose."""


class Down:
    """Not recovered after a crash: the next `down` does what is left."""

    verb: ClassVar[str] = "down"
    target = "instance/this"
    result: str | None = None

    def __init__(self, services: Services, operations: Operations, finished: asyncio.Event) -> None:
        self.arguments = DownArguments()
        self._services = services
        self._operations = operations
        self._finished = finished

    def steps(self) -> tuple[Step, ...]:
        return (Step("machines", self._stop_machines), Step("host", self._clear_host))

    async def _stop_machines(self) -> None:
        live = [k.value for k in self._services.machines.all() if k.value.state in (State.RUNNING, State.PAUSED)]
        self._services.report(self.target, Progress(step="machines", text=f"stopping {len(live)} machines"))
        await asyncio.gather(*(self._stop(machine.name) for machine in live))
        left = [k.value.name for k in self._services.machines.all() if k.value.state in (State.RUNNING, State.PAUSED)]
        if left:
            raise Failed(f"machines still run: {', '.join(left)}", hint="triarch kill " + " ".join(left))

    async def _stop(self, name: str) -> None:
        """Wait for whatever holds the machine, then stop it; a paused one, which cannot hear, is killed."""
        while (holder := self._operations.holder(f"machine/{name}")) is not None:
            await self._operations.wait(holder)
        kept = self._services.machines.find(name)
        if kept is None or kept.value.state not in (State.RUNNING, State.PAUSED):
            return
        seconds = 0.0 if kept.value.state is State.PAUSED else STOP_SECONDS
        arguments = MachineArguments(machine=kept.value, timeout_seconds=seconds, force=True)
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
