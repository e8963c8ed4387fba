"""Snapshots as procedures: taken, renamed, deleted, restored."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import msgspec
from msgspec import UNSET

from triarch.engine.capture import (
    MEMORY_FILE,
    Captured,
    capture,
    capture_with_memory,
    let_go,
    need_checkpointing,
    to_the_end,
)
from triarch.engine.on_machine import OnMachine
from triarch.engine.policies import check_policies
from triarch.engine.procedure import Step
from triarch.engine.services import Services
from triarch.errors import Damaged, Exhausted, Failed, NotFound, TimedOut, Unsupported
from triarch.host.files import sha256_of
from triarch.model.device import Device, NicDevice
from triarch.model.machine import Machine
from triarch.model.operation import Progress
from triarch.model.resources import format_size
from triarch.model.snapshot import Snapshot
from triarch.model.state import State, Status
from triarch.model.template import TemplateRef

# Where a machine is found is part of who it is.
_NETWORK_KEYS = ("network", "address", "address6", "aliases", "forwards")


class SnapshotArguments(msgspec.Struct, frozen=True, kw_only=True):
    """`machine` is the record as it was when the operation began, `snapshot` the one to make or to use.

    `aside` and `staged` are the ids of the sets that a restore works with, `name` is a snapshot's new one.
    """

    machine: Machine
    snapshot: Snapshot
    name: str = ""
    stateful: bool = False
    staged: str = ""
    aside: str = ""


class SnapshotProcedure(OnMachine[SnapshotArguments]):
    """What all verbs of a snapshot share. They hold the machine."""

    arguments_type = SnapshotArguments

    def __init__(self, services: Services, arguments: SnapshotArguments) -> None:
        super().__init__(services, arguments)
        self.snapshot = arguments.snapshot

    @property
    def result(self) -> str | None:
        return self.arguments.name or self.snapshot.name

    def report(self, step: str, text: str) -> None:
        self.services.report(self.target, Progress(step=step, text=text))

    def tell(self, kind: str) -> None:
        self.services.events.publish(f"snapshot-{kind}", self.target, {"snapshot": self.result})


class TakeSnapshot(SnapshotProcedure):
    """Interrupted, it leaves no snapshot and a machine that goes on."""

    verb = "snapshot"

    def __init__(self, services: Services, arguments: SnapshotArguments) -> None:
        super().__init__(services, arguments)
        self._captured: Captured | None = None
        self._finished: Snapshot | None = None

    def steps(self) -> tuple[Step, ...]:
        return (
            Step("capture", self._capture, self._let_go),
            Step("seal", self._seal),
            Step("record", self._record, self._forget),
        )

    async def _capture(self) -> None:
        take = capture_with_memory if self.snapshot.stateful else capture
        self._captured = await take(self.machine, self.snapshot.id)

    async def _let_go(self) -> None:
        await let_go(self.machine, self.snapshot.id)

    async def _seal(self) -> None:
        """Prove it whole and take its digests; the machine goes on meanwhile."""
        if self._captured is None:
            raise Failed(f"snapshot '{self.snapshot.name}' was not taken")
        sets, snapshot_id = self.services.pool.sets, self.snapshot.id
        self.report("seal", "checking the copy")
        if not self.snapshot.stateful:
            await asyncio.to_thread(sets.check, snapshot_id)
        disks = await asyncio.to_thread(sets.describe, snapshot_id)
        memory = sets.path(snapshot_id) / MEMORY_FILE
        self._finished = msgspec.structs.replace(
            self.snapshot,
            consistency=self._captured.consistency,
            frozen_seconds=self._captured.frozen_seconds,
            disks=disks,
            size_bytes=await asyncio.to_thread(sets.allocated_bytes, snapshot_id),
            memory_digest=await asyncio.to_thread(sha256_of, memory) if self.snapshot.stateful else "",
        )

    async def _record(self) -> None:
        assert self._finished is not None
        await self.services.snapshots.put(self._finished)
        self.tell("created")

    async def _forget(self) -> None:
        await self.services.snapshots.remove(self.snapshot)


class DeleteSnapshot(SnapshotProcedure):
    """The record goes first: what is half removed is no snapshot."""

    verb = "delete-snapshot"

    def steps(self) -> tuple[Step, ...]:
        return (Step("forget", self._forget, commits=True), Step("disks", self._remove))

    async def _forget(self) -> None:
        await self.services.snapshots.remove(self.snapshot)
        self.tell("deleted")

    async def _remove(self) -> None:
        await asyncio.to_thread(self.services.pool.sets.remove, self.snapshot.id)


class RenameSnapshot(SnapshotProcedure):
    """One write in the store."""

    verb = "rename-snapshot"

    def steps(self) -> tuple[Step, ...]:
        return (Step("rename", self._rename, commits=True),)

    async def _rename(self) -> None:
        await self.services.snapshots.put(msgspec.structs.replace(self.snapshot, name=self.arguments.name))
        self.tell("renamed")


class Restore(SnapshotProcedure):
    """Template, disks and settings come back together. Until the machine is what it was, all of it can be undone.

    A record that names this restore's `aside` is one whose disks are in place already: what a crash interrupted after
    the commit point then only goes on.
    """

    verb = "restore"

    def __init__(self, services: Services, arguments: SnapshotArguments) -> None:
        super().__init__(services, arguments)
        self._installed = False

    def steps(self) -> tuple[Step, ...]:
        runs = self.arguments.machine.state in (State.RUNNING, State.PAUSED)
        starts = runs or self.arguments.stateful
        return (
            Step("validate", self._validate),
            Step("stage", self._stage, self._unstage),
            *((Step("stop", self._stop, self._start_again),) if runs else ()),
            Step("disks", self._install, self._take_back),
            Step("settings", self._take_settings, self._keep_settings, commits=not starts),
            *(
                (
                    Step("network", self.machine.plug, self.machine.unplug),
                    Step("boot", self._boot, self.machine.end_run),
                    Step("running", self._running, commits=True),
                )
                if starts
                else ()
            ),
            Step("tidy", self._tidy),
        )

    @property
    def _is_done(self) -> bool:
        return self.machine.current.restored == self.arguments.aside

    async def _validate(self) -> None:
        if self._is_done:
            return
        self.report("validate", f"checking snapshot {self.snapshot.name}")
        await check_restorable(self.services, self.arguments.machine, self.snapshot, stateful=self.arguments.stateful)
        # What comes back is taken from now on; others are made meanwhile.
        self.services.claims.claim(restored_record(self.services, self.machine.current, self.snapshot))
        if self.machine.driver.needs_guest_pack:
            await self.machine.need_guest_pack()

    async def _stage(self) -> None:
        """A copy of the snapshot that is whole, and takes the place of the machine's disks in a moment."""
        if self._is_done:
            return
        sets, staged = self.services.pool.sets, self.arguments.staged
        await to_the_end(lambda: sets.duplicate(self.snapshot.id, staged))
        if not self.arguments.stateful:
            await asyncio.to_thread(sets.check, staged)

    async def _unstage(self) -> None:
        await asyncio.to_thread(self.services.pool.sets.remove, self.arguments.staged)

    async def _stop(self) -> None:
        """In good order, because the way back leads through what it leaves; only one that cannot is killed."""
        if self._is_done:
            return
        driver, spec = self.machine.driver, self.machine.spec
        try:
            if self.machine.current.state is State.PAUSED:
                raise TimedOut("a paused machine cannot hear")
            await driver.stop(spec, self.machine.current.stop_timeout_seconds)
        except TimedOut:
            await driver.kill(spec)
        await self.machine.forget_run()
        await self.machine.unplug()

    async def _start_again(self) -> None:
        """One that was not stopped yet still runs or is paused, with its cards where they were."""
        status = (await self.machine.driver.observe(self.machine.spec)).status
        if status is Status.PAUSED:
            return
        if status is not Status.RUNNING:
            await self.machine.plug()
            await self.machine.boot()
        await self.machine.update(state=State.RUNNING)

    async def _install(self) -> None:
        if not self._is_done:
            arguments, sets = self.arguments, self.services.pool.sets
            await to_the_end(lambda: sets.install(arguments.staged, arguments.machine.uuid, arguments.aside))
            self._installed = True

    async def _take_back(self) -> None:
        arguments = self.arguments
        await asyncio.to_thread(self.services.pool.sets.take_back, arguments.machine.uuid, arguments.aside)

    async def _take_settings(self) -> None:
        record = restored_record(self.services, self.machine.current, self.snapshot)
        await self.services.machines.put(msgspec.structs.replace(record, restored=self.arguments.aside))
        if self.arguments.machine.state is State.FAILED:
            await self.machine.update(state=State.STOPPED)

    async def _keep_settings(self) -> None:
        if self._is_done:
            await self.services.machines.put(
                msgspec.structs.replace(self.arguments.machine, name=self.machine.current.name)
            )

    async def _boot(self) -> None:
        if not self.arguments.stateful or not self._installed:
            # What went on from the memory has written to the disks since: what a crash interrupted boots afresh.
            await self.machine.boot()
            return
        checkpointing = need_checkpointing(self.machine)
        self.services.architectures.listen(self.machine.current.architecture)
        await self.machine.make_run_dir()
        await self.machine.driver.create(self.machine.spec)
        await checkpointing.load(self.machine.spec, str(self.services.pool.sets.path(self.snapshot.id) / MEMORY_FILE))

    async def _running(self) -> None:
        await self.machine.record_running()

    async def _tidy(self) -> None:
        for set_id in (self.arguments.aside, self.arguments.staged):
            await asyncio.to_thread(self.services.pool.sets.remove, set_id)
        self.tell("restored")


async def check_restorable(services: Services, machine: Machine, snapshot: Snapshot, *, stateful: bool) -> None:
    """Everything that a restore needs is there and whole; changes nothing.

    Raises `Damaged` that names the snapshot, `NotFound` for a template that is gone, `Exhausted` without room, and
    `Unsupported` for what this architecture cannot run.
    """
    record = restored_record(services, machine, snapshot)
    services.driver(record).validate(record)
    check_policies(services, record)
    what = f"snapshot '{snapshot.name}' of machine '{machine.name}'"
    for layer in services.template_of(record).layers:
        await asyncio.to_thread(services.pool.verify_layer, layer)
    if stateful:
        await _check_memory(services, machine, snapshot)
    needed, free = sum(disk.allocated_bytes for disk in snapshot.disks), services.pool.free_bytes()
    if needed > free:
        raise Exhausted(
            f"cannot restore {what}: it takes {format_size(needed)}, {format_size(free)} are free",
            hint=f"triarch snapshot list {machine.name}",
        )
    try:
        await asyncio.to_thread(services.pool.sets.verify, snapshot.id, snapshot.disks)
    except (Damaged, NotFound) as error:
        raise Damaged(
            f"{what} is damaged: {error.message}",
            hint=f"triarch snapshot delete {machine.name} {snapshot.name}",
            machine=machine.name,
            snapshot=snapshot.name,
        ) from error


async def _check_memory(services: Services, machine: Machine, snapshot: Snapshot) -> None:
    if not snapshot.stateful:
        raise Unsupported(
            f"snapshot '{snapshot.name}' of machine '{machine.name}' holds no memory: it was not made with --stateful",
            hint=f"triarch restore {machine.name} {snapshot.name}",
        )
    if snapshot.machine.architecture != machine.architecture:
        raise Unsupported(
            f"snapshot '{snapshot.name}' holds the memory of a machine under '{snapshot.machine.architecture}'; "
            f"machine '{machine.name}' is '{machine.architecture}' now",
            hint=f"triarch switch {machine.name} --to {snapshot.machine.architecture}",
        )
    memory = services.pool.sets.path(snapshot.id) / MEMORY_FILE
    with suppress(FileNotFoundError):
        if await asyncio.to_thread(sha256_of, memory) == snapshot.memory_digest:
            return
    raise Damaged(
        f"snapshot '{snapshot.name}' of machine '{machine.name}' is damaged: its memory in {memory} is not what it was",
        hint=f"triarch restore {machine.name} {snapshot.name}",
    )


def restored_record(services: Services, machine: Machine, snapshot: Snapshot) -> Machine:
    """The machine with the settings and the template of the snapshot. Who it is, and how it is run, stays its own.

    Raises `NotFound` for a template or a profile that is gone.
    """
    past = snapshot.machine
    for profile in past.profiles:
        services.profiles.get(profile)
    return msgspec.structs.replace(
        past,
        own=msgspec.structs.replace(
            past.own,
            **{key: getattr(machine.own, key) for key in _NETWORK_KEYS},
            devices=_with_cards(past.own.devices or {}, machine.own.devices or {}) or UNSET,
        ),
        devices=_with_cards(past.devices, machine.devices),
        template=find_template(services, past.template),
        name=machine.name,
        uuid=machine.uuid,
        index=machine.index,
        architecture=machine.architecture,
        network=machine.network,
        nic=machine.nic,
        nics=machine.nics,
        aliases=machine.aliases,
        forwards=machine.forwards,
        ids=machine.ids,
        state=machine.state,
        desired=machine.desired,
        last_exit=machine.last_exit,
        ephemeral=machine.ephemeral,
        created_at=machine.created_at,
        started_at=machine.started_at,
        restored=machine.restored,
    )


def _with_cards(past: dict[str, Device], now: dict[str, Device]) -> dict[str, Device]:
    """The devices of the past with the cards of now."""
    cards = {name: each for name, each in now.items() if isinstance(each, NicDevice)}
    return {name: each for name, each in past.items() if not isinstance(each, NicDevice)} | cards


def find_template(services: Services, wanted: TemplateRef) -> TemplateRef:
    """By its digest, whatever it is called now."""
    templates = services.templates.all()
    for template in sorted(templates, key=lambda each: each.ref != str(wanted)):
        if template.digest == wanted.digest:
            return TemplateRef(name=template.name, level=template.level, digest=template.digest)
    raise NotFound(
        f"template '{wanted}' with digest {wanted.digest[:12]} is gone: what stands on it cannot be brought back",
        hint="triarch template list",
        digest=wanted.digest,
    )


SNAPSHOT_PROCEDURES: tuple[type[SnapshotProcedure], ...] = (TakeSnapshot, DeleteSnapshot, RenameSnapshot, Restore)
