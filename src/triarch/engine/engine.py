"""The engine: everything that the daemon can ask for, behind one class."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Collection, Mapping
from pathlib import Path
from typing import Any

import msgspec

from triarch.drivers.base import DriverFactory, Metered, Stdio
from triarch.engine.architectures import Architectures
from triarch.engine.backups import Backups
from triarch.engine.cards import check_aliases, check_network
from triarch.engine.devices import Devices
from triarch.engine.down import Down, DownArguments
from triarch.engine.events import EventBus
from triarch.engine.files import Files
from triarch.engine.journal import Journal
from triarch.engine.lifecycle import Lifecycle
from triarch.engine.machine_procedures import (
    Create,
    Delete,
    Kill,
    Launch,
    MachineArguments,
    Pause,
    Rename,
    Restart,
    Resume,
    Run,
    Start,
    Stop,
    Switch,
)
from triarch.engine.network_records import Claims, NetworkRecords
from triarch.engine.networks import Networks
from triarch.engine.on_machine import OnMachine
from triarch.engine.operations import Operations
from triarch.engine.policies import check_unneeded, check_unprotected
from triarch.engine.profiles import Profiles
from triarch.engine.records import Kept, MachineRecords, ProfileRecords, TemplateRecords
from triarch.engine.resolve import resolve
from triarch.engine.schedule import Schedule
from triarch.engine.services import Services
from triarch.engine.set_machine import SetMachineProcedure, plan_set
from triarch.engine.settings import origins_of
from triarch.engine.snapshot_records import SnapshotRecords
from triarch.engine.snapshots import Snapshots
from triarch.engine.spool import Spool
from triarch.engine.supervise import Supervisor
from triarch.engine.template_procedures import BuildTree, DeleteTemplate, ImportTree, TemplateArguments
from triarch.engine.terminals import Terminals
from triarch.engine.trees import Trees
from triarch.engine.usage import Usages
from triarch.engine.waiting import wait_until
from triarch.errors import Cancelled, Denied, Exists, InUse, Invalid, WrongState
from triarch.model.driver import Architecture, Observation, Resize, Usage
from triarch.model.event import Event
from triarch.model.instance import Instance
from triarch.model.machine import (
    CreateMachine,
    Exit,
    Machine,
    MachineView,
    RenameMachine,
    SetMachine,
    SettingChange,
    StopMachine,
    SwitchMachine,
)
from triarch.model.names import check_machine_name, check_template_name, some_of
from triarch.model.operation import Operation
from triarch.model.request import BuildTemplate, Check
from triarch.model.state import State, Verb, next_state
from triarch.model.template import Template, parse_template_name
from triarch.network.host import HostNetworks
from triarch.storage.base import Pool
from triarch.store.base import Store


class Engine:
    """One instance's machines and templates.

    Changes return an `Operation` that already runs; what is wrong with the request itself is raised at once, and so is
    `Busy` when another operation holds the object. All methods belong to one event loop.
    """

    def __init__(
        self,
        instance: Instance,
        store: Store,
        pool: Pool,
        network: HostNetworks,
        factories: Mapping[str, DriverFactory] | None = None,
    ) -> None:
        """`factories` replaces the table of drivers (tests)."""
        self.instance = instance
        self.down_finished = asyncio.Event()
        self._events = EventBus()
        self._store = store
        journal = Journal(store)
        self._operations = Operations(journal, self._events, self._released)
        machines = MachineRecords(store)
        self._services = Services(
            instance=instance,
            store=store,
            pool=pool,
            network=network,
            networks=NetworkRecords(store, network),
            claims=Claims(machines),
            architectures=Architectures(instance, self._hear, factories),
            events=self._events,
            machines=machines,
            templates=TemplateRecords(store),
            profiles=ProfileRecords(store),
            snapshots=SnapshotRecords(store),
            report=self._operations.report,
            trees=Trees(instance),
            need=self._need,
        )
        self._supervisor = Supervisor(self._services, self._operations)
        self.profiles = Profiles(self._services, self._operations)
        self._services.machines.heed = self._supervisor.heed
        self._lifecycle = Lifecycle(self._services, self._operations, journal, self._supervisor)
        self.snapshots = Snapshots(self._services, self._operations)
        self._schedule = Schedule(
            self._services, self._operations, self.snapshots, Spool(Path(instance.state_dir) / "backups")
        )
        self.backups = Backups(self._services, self._operations, self._resolve, self._begin_new)
        self.networks = Networks(self._services, self._operations)
        self.devices = Devices(self._services, self._operations)
        self.files = Files(self._services, self._operations)
        self.terminals = Terminals(self._services)
        self.usages = Usages(self._services, self._operations)
        # Machines that are being made: name and index.
        self._reserved: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def _hear(self, architecture: str, observation: Observation) -> None:
        self._lifecycle.hear(architecture, observation)

    async def _need(self, machine: Machine) -> None:
        await self._supervisor.need(machine)

    async def _released(self, target: str) -> None:
        self._services.claims.release(target)
        await self._lifecycle.released(target)
        if target.startswith("profile/"):
            # One that a daemon's death interrupted is stored by now, and its machines follow.
            self.profiles.reconcile()

    async def open(self) -> None:
        """Load the records, finish or undo what the last daemon left, adopt what runs.

        Raises `Denied` where the state directory cannot be made, and what the store raises.
        """
        try:
            Path(self.instance.state_dir).mkdir(mode=0o711, parents=True, exist_ok=True)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise Denied(
                f"cannot make the state directory {self.instance.state_dir}: {reason}", hint="triarch --root DIR …"
            ) from error
        await self._store.open()
        await asyncio.to_thread(self._services.pool.prepare)
        await self._services.networks.load()
        await self._services.templates.load()
        await self._services.profiles.load()
        await self._services.snapshots.load()
        await self._services.machines.load()
        await self._lifecycle.recover()
        self._services.network.start_watch()
        self.profiles.reconcile()
        await self._supervisor.begin()
        await self._schedule.begin()
        await self.usages.begin()

    async def close(self) -> None:
        """Let go: machines keep running, operations past their commit point stay in the journal."""
        await self.usages.close()
        await self._schedule.close()
        await self._supervisor.close()
        self.terminals.close()
        await self.profiles.close()
        await self._operations.close()
        await self._services.network.close()
        await self._services.trees.close()
        await self._services.architectures.close()
        await self._store.close()

    # -- looking

    def machines(self) -> tuple[MachineView, ...]:
        return tuple(self._view(kept) for kept in self._services.machines.all())

    def machine(self, name: str) -> MachineView:
        """One machine, with where each of its settings comes from."""
        kept = self._services.machines.kept(name)
        return msgspec.structs.replace(self._view(kept), origins=origins_of(self._services.profiles, kept.value))

    async def wait_machine(self, name: str, words: Collection[str], timeout_seconds: float) -> MachineView:
        """The machine once its state or its health is one of `words`, or as it is after the timeout."""
        check_machine_name(name)
        return await wait_until(self._events, lambda: self.machine(name), words, timeout_seconds)

    def _view(self, kept: Kept[Machine]) -> MachineView:
        machine = kept.value
        return MachineView(
            name=machine.name,
            uuid=machine.uuid,
            state=machine.state,
            desired=machine.desired,
            health=self._supervisor.health.health(machine.uuid),
            architecture=machine.architecture,
            template=machine.template,
            init=machine.init,
            address=(machine.nic.ip or None) if machine.nic is not None else None,
            address6=(machine.nic.ip6 or None) if machine.nic is not None else None,
            mac=machine.nic.mac if machine.nic is not None else None,
            resources=machine.resources,
            network=machine.network,
            nics=machine.nics,
            aliases=machine.aliases,
            forwards=machine.forwards,
            hardware=machine.hardware,
            devices=machine.devices,
            command=machine.command,
            labels=machine.labels,
            snapshot_count=self._services.snapshots.count(machine.uuid),
            description=machine.description,
            profiles=machine.profiles,
            own=machine.own,
            restart=machine.restart,
            autostart=machine.autostart,
            depends_on=machine.depends_on,
            protected=machine.protected,
            ephemeral=machine.ephemeral,
            restarts=machine.restarts,
            next_start_at=self._supervisor.next_start_at(machine.uuid),
            last_exit=machine.last_exit,
            created_at=machine.created_at,
            started_at=machine.started_at,
            operation=self._operations.holder(f"machine/{machine.name}"),
            etag=str(kept.revision),
        )

    def templates(self) -> tuple[Template, ...]:
        return self._services.templates.all()

    def template(self, ref: str) -> Template:
        return self._services.templates.get(ref)

    async def architectures(self, *, refresh: bool = False) -> tuple[Architecture, ...]:
        return await self._services.architectures.probe_all(refresh=refresh)

    def events(self) -> AsyncIterator[Event]:
        return self._events.subscribe()

    async def doctor(self) -> tuple[Check, ...]:
        from triarch.engine.doctor import run_checks

        architectures = self._services.architectures
        return await run_checks(self.instance, {name: architectures.driver(name) for name in architectures.names()})

    # -- operations

    def operations(self) -> tuple[Operation, ...]:
        return self._operations.all()

    def operation(self, operation_id: str) -> Operation:
        return self._operations.get(operation_id)

    async def wait(self, operation_id: str, timeout_seconds: float | None = None) -> Operation:
        return await self._operations.wait(operation_id, timeout_seconds)

    def cancel(self, operation_id: str) -> Operation:
        return self._operations.cancel(operation_id)

    # -- machines

    async def create(self, request: CreateMachine) -> Operation:
        """Create a machine, and start it too if the request says so (then the verb is `launch`)."""
        machine = await self._resolve(request)
        procedure = Launch if request.start else Create
        arguments = MachineArguments(machine=machine, start=request.start)
        return self._begin_new(procedure(self._services, arguments))

    async def _resolve(self, request: CreateMachine) -> Machine:
        if request.name is not None:
            self._check_name_free(request.name)
        machine = await resolve(self._services, request, self._reserved)
        self._check_name_free(machine.name)
        self._operations.check_free(f"machine/{machine.name}")
        self._reserved[machine.name] = machine.index
        self._services.claims.claim(machine)
        return machine

    def _check_name_free(self, name: str) -> None:
        if self._services.machines.find(name) is not None:
            raise Exists(f"machine '{name}' exists already", hint=f"triarch info {name}", machine=name)

    def _begin_new(self, procedure: OnMachine[Any]) -> Operation:
        """From the first step on name and index are held by the record; until then by the reservation."""
        machine = procedure.arguments.machine
        try:
            operation = self._operations.begin(procedure)
        except BaseException:
            self._release(machine)
            raise
        task = asyncio.create_task(self._release_after(operation.id, machine))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return operation

    async def _release_after(self, operation_id: str, machine: Machine) -> None:
        await self._operations.wait(operation_id)
        self._release(machine)

    def _release(self, machine: Machine) -> None:
        """Unless another machine that is being made has the name by now."""
        if self._reserved.get(machine.name) == machine.index:
            del self._reserved[machine.name]
            self._services.claims.release(f"machine/{machine.name}")

    def _checked(self, name: str, verb: Verb) -> Machine:
        """The machine, if nothing holds it and its state allows `verb`."""
        machine = self._services.machines.get(check_machine_name(name))
        self._operations.check_free(f"machine/{name}")
        next_state(name, machine.state, verb)
        return machine

    async def start(self, name: str) -> Operation:
        await self._check_startable(self._checked(name, Verb.START))
        # Asking the host may have taken a while.
        machine = self._checked(name, Verb.START)
        return self._operations.begin(Start(self._services, MachineArguments(machine=machine)))

    async def stop(self, name: str, request: StopMachine) -> Operation:
        """Of a machine that waits for its next start, that start is called off."""
        machine = self._services.machines.get(check_machine_name(name))
        if self._supervisor.next_start_at(machine.uuid) is not None:
            return self._operations.begin(Stop(self._services, MachineArguments(machine=machine)))
        return self._operations.begin(Stop(self._services, self._stop_arguments(name, Verb.STOP, request)))

    async def restart(self, name: str, request: StopMachine) -> Operation:
        """What could not start again is not stopped."""
        await self._check_startable(self._checked(name, Verb.RESTART))
        arguments = self._stop_arguments(name, Verb.RESTART, request)
        return self._operations.begin(Restart(self._services, arguments))

    async def _check_startable(self, machine: Machine) -> None:
        """Raise what this host lacks for it: its architecture or its network."""
        await self._services.architectures.need(machine.architecture)
        check_network(self._services, machine)

    def _stop_arguments(self, name: str, verb: Verb, request: StopMachine) -> MachineArguments:
        machine = self._checked(name, verb)
        seconds = machine.stop_timeout_seconds if request.timeout_seconds is None else request.timeout_seconds
        return MachineArguments(machine=machine, timeout_seconds=seconds, force=request.force)

    async def kill(self, name: str) -> Operation:
        return self._operations.begin(Kill(self._services, MachineArguments(machine=self._checked(name, Verb.KILL))))

    async def pause(self, name: str) -> Operation:
        return self._operations.begin(Pause(self._services, MachineArguments(machine=self._checked(name, Verb.PAUSE))))

    async def resume(self, name: str) -> Operation:
        machine = self._checked(name, Verb.RESUME)
        return self._operations.begin(Resume(self._services, MachineArguments(machine=machine)))

    async def delete(self, name: str, *, force: bool = False) -> Operation:
        """With `force` also one that runs, which is killed first, and one that others depend on."""
        machine = self._services.machines.get(check_machine_name(name))
        check_unprotected(machine, "delete")
        if not force:
            self._checked(name, Verb.DELETE)
            check_unneeded(self._services, machine, "delete")
        return self._operations.begin(Delete(self._services, MachineArguments(machine=machine, force=force)))

    async def rename(self, name: str, request: RenameMachine) -> Operation:
        machine = self._checked(name, Verb.RENAME)
        check_machine_name(request.name)
        self._check_name_free(request.name)
        check_unneeded(self._services, machine, "rename")
        check_aliases(self._services, msgspec.structs.replace(machine, name=request.name))
        return self._operations.begin(Rename(self._services, MachineArguments(machine=machine, name=request.name)))

    async def set(self, name: str, request: SetMachine) -> Operation | tuple[SettingChange, ...]:
        """Change what is said of a machine; what is wrong with it is raised at once. With `check` only what it does."""
        while True:
            machine = self._services.machines.get(check_machine_name(name))
            if not request.check:
                self._operations.check_free(f"machine/{name}")
            arguments = await plan_set(self._services, machine, request)
            # Planning may wait, and somebody else change it meanwhile.
            if self._services.machines.find(name) is not None and self._services.machines.get(name) is machine:
                break
        if request.check:
            return arguments.changes
        return self._operations.begin(SetMachineProcedure(self._services, arguments))

    async def switch(self, name: str, request: SwitchMachine) -> Operation | None:
        """Run the machine under another architecture. With `check` nothing is done and None says that it would work."""
        if request.architecture == self._checked(name, Verb.SWITCH).architecture:
            raise Invalid(f"machine '{name}' is already under architecture '{request.architecture}'", machine=name)
        driver = await self._services.architectures.need(request.architecture)
        machine = self._checked(name, Verb.SWITCH)
        driver.validate(msgspec.structs.replace(machine, architecture=request.architecture))
        if request.check:
            return None
        arguments = MachineArguments(
            machine=machine, architecture=request.architecture, timeout_seconds=request.timeout_seconds
        )
        return self._operations.begin(Switch(self._services, arguments))

    # -- streams

    async def usage(self, name: str) -> Usage:
        """What a running machine uses now. Raises `WrongState` when it does not run."""
        machine = self._services.machines.get(check_machine_name(name))
        if machine.state is not State.RUNNING:
            raise WrongState(f"machine '{name}' uses nothing: it is {machine.state.value}", machine=name)
        driver = self._services.driver(machine)
        if not isinstance(driver, Metered):
            raise self._services.architectures.lacks(machine.architecture, "usage")
        used = await driver.usage(self._services.spec(machine))
        disk_bytes = await asyncio.to_thread(self._services.pool.allocated_bytes, machine.uuid)
        return msgspec.structs.replace(used, disk_bytes=disk_bytes)

    async def run(self, request: CreateMachine, stdio: Stdio, terminal: Resize | None) -> Exit:
        """A throw-away machine with the caller's input and output; returns its command's exit when all is removed.

        Cancelling this call removes the machine.
        """
        if request.settings.first_boot:
            raise Invalid("a throw-away machine has no first boot", hint=f"triarch launch {request.template}")
        machine = await self._resolve(msgspec.structs.replace(request, ephemeral=True))
        procedure = Run(self._services, MachineArguments(machine=machine), stdio, terminal)
        operation = self._begin_new(procedure)
        try:
            await self._operations.outcome(operation.id)
        except asyncio.CancelledError:
            self._operations.cancel(operation.id)
            raise
        if procedure.exit is None:
            raise Cancelled(f"machine '{machine.name}' ended without an exit code")
        return procedure.exit

    # -- templates

    async def build_template(self, request: BuildTemplate) -> Operation:
        self._check_template_free(request.name)
        arguments = TemplateArguments(name=request.name, workspace=self._workspace(), request=request)
        return self._operations.begin(BuildTree(self._services, arguments))

    async def import_template(self, name: str, archive: Path) -> Operation:
        """`archive` becomes the engine's: it is removed when the operation ends, whatever comes of it."""
        self._check_template_free(name)
        arguments = TemplateArguments(name=name, workspace=self._workspace(), archive=str(archive))
        return self._operations.begin(ImportTree(self._services, arguments))

    def _check_template_free(self, name: str) -> None:
        check_template_name(name)
        if self._services.templates.levels(name):
            raise Exists(f"template '{name}' exists already", hint=f"triarch template info {name}", template=name)

    def _workspace(self) -> str:
        return str(Path(self.instance.state_dir) / "work" / secrets.token_hex(6))

    async def delete_template(self, ref: str) -> Operation:
        """One level, or all of a template. Raises `InUse` that names machines standing on it."""
        name, level = parse_template_name(ref)
        templates = self._services.templates.levels(name) if level is None else (self.template(ref),)
        if not templates:
            self.template(ref)
        # Not by digest: two names may stand for the same tree.
        levels = {template.level for template in templates}
        machines = self._services.claims.others("")
        users = sorted({m.name for m in machines if m.template.name == name and m.template.level in levels})
        if users:
            raise InUse(
                f"template '{ref}' is in use by {some_of(users)}", hint=f"triarch delete {users[0]}", template=ref
            )
        return self._operations.begin(DeleteTemplate(self._services, TemplateArguments(name=name, templates=templates)))

    # -- the end

    async def down(self, *, until_boot: bool = False) -> Operation:
        """Stop every machine and remove what the instance has on the host; `down_finished` is set when that is done.

        With `until_boot` those that ran are started again when the host has booted.
        """
        arguments = DownArguments(until_boot=until_boot)
        return self._operations.begin(
            Down(self._services, self._operations, self._supervisor, self.down_finished, arguments)
        )


async def open_engine(instance: Instance, factories: Mapping[str, DriverFactory] | None = None) -> Engine:
    """The engine on its usual parts: sqlite, a directory pool, a NAT bridge, the drivers of this host."""
    from triarch.storage.directory import DirectoryPool
    from triarch.store.sqlite import SqliteStore

    state_dir = Path(instance.state_dir)
    engine = Engine(
        instance,
        SqliteStore(state_dir / "triarch.db"),
        DirectoryPool("default", state_dir / "pool"),
        HostNetworks(instance),
        factories,
    )
    await engine.open()
    return engine
