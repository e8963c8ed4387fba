"""Cloning a machine's disks while it runs: still, cloned, and on its way again."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from triarch.drivers.base import FREEZE_SECONDS, Checkpointing, CheckpointProbe, Driver, Freezable
from triarch.engine.machine_actions import MachineActions
from triarch.errors import Error, Unsupported
from triarch.model.snapshot import Consistency
from triarch.model.state import State

MEMORY_FILE = "memory"


class Captured(msgspec.Struct, frozen=True, kw_only=True):
    """How a copy was made; `frozen_seconds` is None where the machine did not run."""

    consistency: Consistency
    frozen_seconds: float | None


async def capture(machine: MachineActions, set_id: str) -> Captured:
    """Make set `set_id` of the machine's disks, which then agree with one another. An existing set is success.

    Raises `Unsupported` where the architecture cannot hold a machine still, `TimedOut` when it could not be held still
    for as long as the copy took; the caller undoes with `let_go`.
    """
    sets, uuid = machine.services.pool.sets, machine.machine.uuid
    if machine.current.state not in (State.RUNNING, State.PAUSED):
        await to_the_end(lambda: sets.capture(uuid, set_id))
        return Captured(consistency=Consistency.STOPPED, frozen_seconds=None)
    driver, spec = machine.driver, machine.spec
    if not isinstance(driver, Freezable):
        raise Unsupported(
            f"architecture '{driver.name}' cannot hold a running machine still; "
            f"machine '{spec.machine.name}' has to be stopped for this",
            hint=f"triarch stop {spec.machine.name}",
        )
    if not sets.path(set_id).exists():
        # Everything that can be done before is.
        await asyncio.to_thread(sets.begin, set_id)
    consistency = await driver.freeze(spec)

    async def hold() -> None:
        while True:
            await asyncio.sleep(FREEZE_SECONDS / 3)
            await driver.freeze(spec)

    holding = asyncio.create_task(hold())
    try:
        await to_the_end(lambda: sets.capture(uuid, set_id))
    finally:
        holding.cancel()
        await asyncio.gather(holding, return_exceptions=True)
    return Captured(consistency=consistency, frozen_seconds=await driver.thaw(spec))


async def check_checkpoint(machine: MachineActions) -> Checkpointing:
    """The driver, if it can keep this machine's memory. Raises `Unsupported` with the reason."""
    if isinstance(machine.driver, CheckpointProbe):
        await machine.driver.check_checkpoint(machine.spec)
    return need_checkpointing(machine)


def need_checkpointing(machine: MachineActions) -> Checkpointing:
    """The driver, if it has the capability."""
    driver = machine.driver
    if not isinstance(driver, Checkpointing):
        raise Unsupported(
            f"architecture '{driver.name}' cannot keep the memory of machine '{machine.machine.name}'",
            hint=f"triarch snapshot create {machine.machine.name}",
        )
    return driver


async def capture_with_memory(machine: MachineActions, set_id: str) -> Captured:
    """As `capture`, with the memory as the file `memory` of the set."""
    sets, uuid = machine.services.pool.sets, machine.machine.uuid
    driver, spec = await check_checkpoint(machine), machine.spec
    if sets.path(set_id).exists():
        return Captured(consistency=Consistency.FROZEN, frozen_seconds=None)
    draft: Path = await asyncio.to_thread(sets.begin, set_id)
    await driver.save(spec, str(draft / MEMORY_FILE))
    await to_the_end(lambda: sets.capture(uuid, set_id))
    seconds = await driver.thaw(spec) if isinstance(driver, Freezable) else None
    return Captured(consistency=Consistency.FROZEN, frozen_seconds=seconds)


async def let_go(machine: MachineActions, set_id: str) -> None:
    """Undo of a capture: the machine goes on, the set is gone."""
    driver: Driver = machine.driver
    if isinstance(driver, Freezable):
        with suppress(Error):
            await driver.thaw(machine.spec)
    await asyncio.to_thread(machine.services.pool.sets.remove, set_id)


async def to_the_end(work: Callable[[], None]) -> None:
    """Do it in a thread and return when it has ended, also when this is cancelled: nothing writes behind our back."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise
