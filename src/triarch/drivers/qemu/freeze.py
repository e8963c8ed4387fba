"""Holding a VM's disks still: by the guest itself, or, where that does not answer, by stopping the whole VM."""

from __future__ import annotations

import time
from pathlib import Path

from triarch.drivers.base import FREEZE_SECONDS
from triarch.drivers.qemu.monitor import is_paused, monitor
from triarch.drivers.qemu.run import Run
from triarch.errors import Failed, TimedOut, Unavailable
from triarch.guest.agent import Agent
from triarch.guest.freeze import GuestFreeze
from triarch.model.driver import MachineSpec
from triarch.model.snapshot import Consistency

# In `run_dir`: this VM stands still because of us, since then, and a later daemon must let it go on.
_HELD = "held"


class Freezes:
    """The freezes of one driver object. One in a guest ends with the daemon; a stopped VM is marked as such."""

    def __init__(self) -> None:
        self._freezes: dict[str, GuestFreeze] = {}

    async def freeze(self, spec: MachineSpec, agent: Agent) -> Consistency:
        held = self._freezes.get(spec.uuid)
        if held is not None:
            await held.go_on()
            return Consistency.FROZEN
        run = Run.of(spec)
        if _mark(run).exists() or await is_paused(run.monitor, spec.machine.name):
            return Consistency.CRASH
        try:
            self._freezes[spec.uuid] = await GuestFreeze.begin(agent, FREEZE_SECONDS)
        except (Failed, TimedOut, Unavailable):
            await hold(run, spec.machine.name)
            return Consistency.CRASH
        return Consistency.FROZEN

    async def thaw(self, spec: MachineSpec) -> float | None:
        held = self._freezes.pop(spec.uuid, None)
        if held is not None:
            return await held.end()
        return await let_go(Run.of(spec), spec.machine.name)

    def forget(self) -> None:
        """Their guests thaw by themselves once nobody is connected."""
        self._freezes.clear()


def _mark(run: Run) -> Path:
    return run.directory / _HELD


async def hold(run: Run, name: str) -> None:
    """Stop the VM's processors; requests that its disks have taken are finished when this returns (QMP `stop`)."""
    _mark(run).write_text(f"{time.time():.6f}\n")
    async with monitor(run.monitor, name) as client:
        await client.execute("stop")


async def let_go(run: Run, name: str) -> float | None:
    """Undo of `hold`, by this daemon or a later one; how long it stood still. One that was not held stays as it is."""
    mark = _mark(run)
    try:
        since = float(mark.read_text())
    except (FileNotFoundError, ValueError):
        return None
    if run.process() is not None:
        async with monitor(run.monitor, name) as client:
            await client.execute("cont")
    mark.unlink(missing_ok=True)
    return max(0.0, time.time() - since)
