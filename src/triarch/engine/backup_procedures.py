"""Export and import of whole machines as procedures."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar

import msgspec

import triarch
from triarch.engine.capture import capture, let_go, to_the_end
from triarch.engine.copies import install_new, make_new
from triarch.engine.machine_actions import MachineActions
from triarch.engine.machine_procedures import start_steps
from triarch.engine.on_machine import OnMachine
from triarch.engine.procedure import Procedure, Step
from triarch.engine.services import Services
from triarch.engine.spool import Spool
from triarch.engine.template_procedures import remove_unused_layers
from triarch.errors import Damaged
from triarch.host.erofs import check_image
from triarch.model.machine import Machine
from triarch.model.operation import Progress
from triarch.model.settings import add_up
from triarch.model.snapshot import BackupManifest, Snapshot
from triarch.model.template import Layer, Template
from triarch.storage.backup import FORMAT, LAYER, expected_parts, read_backup, write_backup


def spool_of(services: Services) -> Spool:
    return Spool(Path(services.instance.state_dir) / "backups")


class ExportArguments(msgspec.Struct, frozen=True, kw_only=True):
    """`backup` is the id of what will be in the spool, `staged` that of the set that it is written from."""

    machine: Machine
    snapshot: Snapshot | None = None
    with_template: bool = False
    backup: str
    staged: str


class Export(Procedure):
    """The machine is held only until it is cloned. Interrupted, it leaves nothing."""

    verb: ClassVar[str] = "export"
    arguments_type: ClassVar[type[msgspec.Struct]] = ExportArguments

    def __init__(
        self,
        services: Services,
        arguments: ExportArguments,
        let_machine_go: Callable[[Procedure], Awaitable[None]] | None = None,
    ) -> None:
        self.services = services
        self._arguments = arguments
        self._machine = MachineActions(services, arguments.machine)
        self._let_machine_go = let_machine_go
        self._machine_is_free = False
        self._cancelled = threading.Event()

    @property
    def arguments(self) -> ExportArguments:
        return self._arguments

    @property
    def target(self) -> str:
        return f"backup/{self.arguments.backup}"

    @property
    def holds(self) -> tuple[str, ...]:
        return (self._machine.target,)

    @property
    def result(self) -> str | None:
        return self.arguments.backup

    def steps(self) -> tuple[Step, ...]:
        return (
            Step("capture", self._capture, self._let_go),
            Step("write", self._write, self._discard),
            Step("tidy", self._tidy),
        )

    async def _capture(self) -> None:
        arguments, sets = self.arguments, self.services.pool.sets
        snapshot = arguments.snapshot
        if snapshot is None:
            await capture(self._machine, arguments.staged)
        else:
            await to_the_end(lambda: sets.duplicate(snapshot.id, arguments.staged))
        if self._let_machine_go is not None:
            self._machine_is_free = True
            await self._let_machine_go(self)
        await asyncio.to_thread(sets.check, arguments.staged)

    async def _let_go(self) -> None:
        if self.arguments.snapshot is None and not self._machine_is_free:
            await let_go(self._machine, self.arguments.staged)
        else:
            await self._tidy()

    async def _tidy(self) -> None:
        await asyncio.to_thread(self.services.pool.sets.remove, self.arguments.staged)

    async def _write(self) -> None:
        arguments, sets, pool = self.arguments, self.services.pool.sets, self.services.pool
        machine = arguments.machine if arguments.snapshot is None else arguments.snapshot.machine
        template = self.services.template_of(machine)
        manifest = BackupManifest(
            format=FORMAT,
            version=triarch.__version__,
            created_at=datetime.now(UTC),
            machine=machine,
            settings=add_up((*self.services.profiles.layers(machine.profiles), machine.own)),
            template=template,
            disks=await asyncio.to_thread(sets.describe, arguments.staged),
            with_template=arguments.with_template,
        )
        layers = {f"{LAYER}{layer.digest}": layer for layer in template.layers}
        files = {}
        for name in expected_parts(manifest):
            layer = layers.get(name)
            files[name] = (
                sets.disk_path(arguments.staged, name)
                if layer is None
                else await asyncio.to_thread(pool.verify_layer, layer)
            )
        spool = spool_of(self.services)
        draft = spool.draft(arguments.backup)
        tell = teller(self.services, self.target, "write")
        await in_thread(self._cancelled, lambda: write_backup(draft, manifest, files, tell, self._cancelled.is_set))
        spool.publish(arguments.backup)

    async def _discard(self) -> None:
        spool_of(self.services).remove(self.arguments.backup)


class ImportArguments(msgspec.Struct, frozen=True, kw_only=True):
    """`machine` is the new one, `old_name` what it was called, `renew` whether it gets an identity of its own.

    `template` is one that comes with the backup and is to be recorded; None where it is here already.
    """

    machine: Machine
    backup: str
    old_name: str
    renew: bool
    template: Template | None = None
    start: bool = False
    staged: str
    aside: str
    workspace: str


class ImportBackup(OnMachine[ImportArguments]):
    """Interrupted before the machine is whole, it leaves the uploaded file; refused for good, not even that."""

    verb = "import-machine"
    arguments_type = ImportArguments

    def __init__(self, services: Services, arguments: ImportArguments) -> None:
        super().__init__(services, arguments)
        self._cancelled = threading.Event()

    @property
    def holds(self) -> tuple[str, ...]:
        """The file, and who the machine was: two imports of one machine would both be it."""
        return (f"backup/{self.arguments.backup}", f"identity/{self.arguments.machine.uuid}")

    def steps(self) -> tuple[Step, ...]:
        start = self.arguments.start
        return (
            Step("unpack", self._unpack, self._discard),
            Step("identity", self._renew),
            Step("template", self._add_template, self._forget_template),
            Step("record", self._record, self.machine.remove_record),
            Step("disks", self._install, self.machine.remove_delta, commits=not start),
            *(start_steps(self.machine) if start else ()),
            Step("tidy", self._tidy),
        )

    async def _unpack(self) -> None:
        arguments, sets = self.arguments, self.services.pool.sets
        if self.services.machines.find_uuid(arguments.machine.uuid) is not None:
            return
        spool = spool_of(self.services)
        path, workspace = spool.whole(arguments.backup), Path(arguments.workspace)
        workspace.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft = await asyncio.to_thread(sets.begin, arguments.staged)

        def place(name: str) -> Path:
            return workspace / name if name.startswith(LAYER) else draft / f"{name}.raw"

        tell = teller(self.services, self.target, "unpack")
        try:
            await in_thread(self._cancelled, lambda: read_backup(path, place, tell, self._cancelled.is_set))
        except Damaged:
            spool.remove(arguments.backup)
            raise
        sets.finish(arguments.staged)
        await asyncio.to_thread(sets.check, arguments.staged)

    async def _discard(self) -> None:
        await asyncio.to_thread(self.services.pool.sets.remove, self.arguments.staged)
        await asyncio.to_thread(shutil.rmtree, self.arguments.workspace, ignore_errors=True)

    async def _renew(self) -> None:
        if self.arguments.renew:
            names = self.arguments.old_name, self.arguments.machine.name
            await asyncio.to_thread(make_new, self.services, self.arguments.staged, *names)

    async def _add_template(self) -> None:
        template = self.arguments.template
        if template is None:
            return
        templates, digests = self.services.templates, {layer.digest for layer in template.layers}
        templates.coming |= digests
        try:
            for layer in template.layers:
                await self._add_layer(layer)
            await templates.add(template)
        finally:
            templates.coming -= digests
        self.services.events.publish("template-created", f"template/{template.name}", {"digest": template.digest})

    async def _add_layer(self, layer: Layer) -> None:
        """Its content was found right when it was unpacked; what it is like inside was not yet."""
        path = Path(self.arguments.workspace) / f"{LAYER}{layer.digest}"
        if path.exists():
            await check_image(path)
            await asyncio.to_thread(self.services.pool.add_layer, path)

    async def _forget_template(self) -> None:
        """Unless other machines stand on it by now."""
        template = self.arguments.template
        stand_on = {kept.value.template.digest for kept in self.services.machines.all()}
        if template is not None and template.digest not in stand_on:
            await self.services.templates.remove((template,))
            await asyncio.to_thread(remove_unused_layers, self.services)

    async def _record(self) -> None:
        await self.machine.add_record()
        self.machine.publish("created", backup=self.arguments.backup)

    async def _install(self) -> None:
        await install_new(self.services, self.arguments.staged, self.machine, self.arguments.aside)

    async def _tidy(self) -> None:
        await self._discard()
        spool_of(self.services).remove(self.arguments.backup)


def teller(services: Services, target: str, step: str) -> Callable[[str, float | None], None]:
    """Progress from a thread."""
    loop = asyncio.get_running_loop()

    def tell(text: str, fraction: float | None) -> None:
        progress = Progress(step=step, text=text[:40], fraction=fraction)
        loop.call_soon_threadsafe(services.report, target, progress)

    return tell


async def in_thread(cancelled: threading.Event, work: Callable[[], object]) -> None:
    """As `to_the_end`, but the work is told to end early."""
    task = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        cancelled.set()
        await asyncio.wait({task})
        raise
