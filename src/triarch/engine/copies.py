"""Copy: a new machine with the same template and settings, a clone of the disks, and an identity of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
from msgspec import UNSET

from triarch.engine.capture import capture, let_go, to_the_end
from triarch.engine.machine_actions import MachineActions
from triarch.engine.machine_procedures import start_steps
from triarch.engine.on_machine import OnMachine
from triarch.engine.procedure import Procedure, Step
from triarch.engine.services import Services
from triarch.model.device import NicDevice
from triarch.model.machine import CreateMachine, Machine
from triarch.model.settings import Settings
from triarch.model.snapshot import DELTA, Snapshot


class CopyArguments(msgspec.Struct, frozen=True, kw_only=True):
    """`machine` is the new one, `source` the one it is a copy of, as it is now or was in `snapshot`.

    `staged` and `aside` are the ids of the sets that the disks pass through.
    """

    machine: Machine
    source: Machine
    snapshot: Snapshot | None = None
    start: bool = False
    staged: str
    aside: str


class Copy(OnMachine[CopyArguments]):
    """Interrupted, it leaves no copy, and an original that goes on. The original is held only until it is cloned."""

    verb = "copy"
    arguments_type = CopyArguments

    def __init__(
        self,
        services: Services,
        arguments: CopyArguments,
        let_source_go: Callable[[Procedure], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__(services, arguments)
        self._source = MachineActions(services, arguments.source)
        self._let_source_go = let_source_go
        self._source_is_free = False

    @property
    def holds(self) -> tuple[str, ...]:
        return (self._source.target,)

    def steps(self) -> tuple[Step, ...]:
        start = self.arguments.start
        return (
            Step("capture", self._capture, self._let_go),
            Step("identity", self._renew),
            Step("record", self._record, self.machine.remove_record),
            Step("disks", self._install, self.machine.remove_delta, commits=not start),
            *(start_steps(self.machine) if start else ()),
        )

    async def _capture(self) -> None:
        snapshot, sets, staged = self.arguments.snapshot, self.services.pool.sets, self.arguments.staged
        if self.services.machines.find_uuid(self.arguments.machine.uuid) is not None:
            # The copy is whole: only what follows was interrupted.
            return
        if snapshot is None:
            await capture(self._source, staged)
        else:
            await to_the_end(lambda: sets.duplicate(snapshot.id, staged))
        if self._let_source_go is not None:
            self._source_is_free = True
            await self._let_source_go(self)

    async def _let_go(self) -> None:
        if self.arguments.snapshot is None and not self._source_is_free:
            await let_go(self._source, self.arguments.staged)
        else:
            await asyncio.to_thread(self.services.pool.sets.remove, self.arguments.staged)

    async def _renew(self) -> None:
        await asyncio.to_thread(
            make_new, self.services, self.arguments.staged, self.arguments.source.name, self.arguments.machine.name
        )

    async def _record(self) -> None:
        await self.machine.add_record()
        self.machine.publish("created", source=self.arguments.source.name)

    async def _install(self) -> None:
        await install_new(self.services, self.arguments.staged, self.machine, self.arguments.aside)


def make_new(services: Services, set_id: str, old_name: str, new_name: str) -> None:
    """Prove the disks of a set whole and give them an identity of their own (blocking)."""
    from triarch.templates.identity import renew_identity

    sets = services.pool.sets
    if not sets.path(set_id).is_dir():
        return
    sets.check(set_id)
    renew_identity(sets.disk_path(set_id, DELTA), old_name, new_name)
    sets.check(set_id)


async def install_new(services: Services, set_id: str, machine: MachineActions, aside_id: str) -> None:
    """Make a set the disks of a machine that had none, durably."""
    sets, uuid = services.pool.sets, machine.machine.uuid
    if sets.path(set_id).is_dir():
        await asyncio.to_thread(sets.describe, set_id)
    await to_the_end(lambda: sets.install(set_id, uuid, aside_id))
    await asyncio.to_thread(sets.remove, aside_id)
    Path(machine.spec.state_dir).mkdir(mode=0o700, parents=True, exist_ok=True)


def copy_request(source: Machine, name: str) -> CreateMachine:
    """What to ask for to get a machine like this one. Addresses and ports of the original stay the original's."""
    return CreateMachine(
        template=str(source.template),
        name=name,
        architecture=source.architecture,
        init=source.init,
        command=source.command,
        profiles=source.profiles,
        settings=without_addresses(source.own),
    )


def without_addresses(settings: Settings) -> Settings:
    """The settings without what only one machine can have."""
    devices = settings.devices
    if devices is not UNSET and devices is not None:
        devices = {
            name: msgspec.structs.replace(each, address=None, address6=None) if isinstance(each, NicDevice) else each
            for name, each in devices.items()
        }
    return msgspec.structs.replace(
        settings, address=UNSET, address6=UNSET, forwards=UNSET, aliases=UNSET, devices=devices
    )
