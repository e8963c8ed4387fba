"""What the daemon can ask for about copies and backups of machines."""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import msgspec

from triarch.engine.backup_procedures import Export, ExportArguments, ImportArguments, ImportBackup, spool_of
from triarch.engine.copies import Copy, CopyArguments, copy_request
from triarch.engine.on_machine import OnMachine
from triarch.engine.operations import Operations
from triarch.engine.services import Services
from triarch.engine.snapshot_procedures import find_template
from triarch.engine.spool import Spool
from triarch.errors import Denied, DriverUnavailable, NotFound
from triarch.model.device import DiskDevice, FolderDevice, HostDevice, UsbDevice
from triarch.model.machine import CreateMachine, Machine
from triarch.model.names import check_machine_name
from triarch.model.operation import Operation
from triarch.model.snapshot import (
    Backup,
    BackupManifest,
    CopyMachine,
    ExportMachine,
    ImportMachine,
    Snapshot,
    UploadBackup,
)
from triarch.model.template import Template
from triarch.storage.backup import check_room, read_manifest

# What `Engine` does for every verb that makes a machine: choose all of it, then begin the procedure that makes it.
Resolve = Callable[[CreateMachine], Awaitable[Machine]]
BeginNew = Callable[[OnMachine[Any]], Operation]


class Backups:
    """Copy, export, import, and the spool that backups go through."""

    def __init__(self, services: Services, operations: Operations, resolve: Resolve, begin_new: BeginNew) -> None:
        self._services = services
        self._operations = operations
        self._resolve = resolve
        self._begin_new = begin_new

    @property
    def spool(self) -> Spool:
        return spool_of(self._services)

    def _source(self, name: str, snapshot: str | None) -> tuple[Machine, Snapshot | None]:
        """The machine, if nothing holds it, and its snapshot."""
        machine = self._services.machines.get(check_machine_name(name))
        self._operations.check_free(f"machine/{name}")
        return machine, None if snapshot is None else self._services.snapshots.get(machine, snapshot)

    async def copy(self, name: str, request: CopyMachine) -> Operation:
        """A new machine like this one, from what it is now or was in a snapshot."""
        machine, snapshot = self._source(name, request.snapshot)
        source = machine if snapshot is None else snapshot.machine
        source = msgspec.structs.replace(
            source, name=machine.name, template=find_template(self._services, source.template)
        )
        new = await self._resolve(copy_request(source, request.name))
        new = msgspec.structs.replace(new, first_booted=source.first_booted)
        arguments = CopyArguments(
            machine=new,
            source=machine,
            snapshot=snapshot,
            start=request.start,
            staged=str(uuid.uuid4()),
            aside=str(uuid.uuid4()),
        )

        async def let_go(procedure: Any) -> None:
            await self._operations.let_go(f"machine/{name}", procedure)

        return self._begin_new(Copy(self._services, arguments, let_go))

    # -- out

    async def export(self, name: str, request: ExportMachine) -> Operation:
        """Write a backup into the spool; the operation's result is its id."""
        machine, snapshot = self._source(name, request.snapshot)
        source = machine if snapshot is None else snapshot.machine
        find_template(self._services, source.template)
        arguments = ExportArguments(
            machine=machine,
            snapshot=snapshot,
            with_template=request.with_template,
            backup=secrets.token_hex(16),
            staged=str(uuid.uuid4()),
        )

        async def let_go(procedure: Any) -> None:
            await self._operations.let_go(f"machine/{name}", procedure)

        return self._operations.begin(Export(self._services, arguments, let_go))

    def remove(self, backup_id: str) -> None:
        """Absent is success. Raises `Busy` for one that is being written or read."""
        self._operations.check_free(f"backup/{backup_id}")
        self.spool.remove(backup_id)

    # -- in

    def begin_upload(self, request: UploadBackup) -> Backup:
        return self.spool.begin(request.id, request.size_bytes)

    async def import_(self, backup_id: str, request: ImportMachine) -> Operation:
        """Make the machine of a backup that was uploaded whole."""
        self._operations.check_free(f"backup/{backup_id}")
        path = self.spool.whole(backup_id)
        try:
            manifest = await asyncio.to_thread(read_manifest, path)
        except Exception:
            self.spool.remove(backup_id)
            raise
        check_room(manifest, self._services.pool.free_bytes())
        name = request.name or manifest.machine.name
        template, is_new = self._template(manifest)
        known = self._services.machines.find_uuid(manifest.machine.uuid) is not None
        wanted = self._request(manifest, template, name, request, copy=known)
        with self._services.templates.promised(template) if is_new else nullcontext():
            machine = await self._resolve_somewhere(wanted, request)
        if not request.host_devices:
            _check_host_devices(machine)
        machine = msgspec.structs.replace(
            machine,
            uuid=machine.uuid if known else manifest.machine.uuid,
            first_booted=manifest.machine.first_booted,
            created_at=manifest.machine.created_at,
        )
        arguments = ImportArguments(
            machine=machine,
            backup=backup_id,
            old_name=manifest.machine.name,
            renew=known,
            template=template if is_new else None,
            start=request.start,
            staged=str(uuid.uuid4()),
            aside=str(uuid.uuid4()),
            workspace=str(Path(self._services.instance.state_dir) / "work" / secrets.token_hex(6)),
        )
        return self._begin_new(ImportBackup(self._services, arguments))

    def _template(self, manifest: BackupManifest) -> tuple[Template, bool]:
        """The template that the machine will stand on, and whether it comes with the backup.

        Raises `NotFound` that names the digest when it is neither here nor there.
        """
        wanted = manifest.template
        for template in self._services.templates.all():
            if template.digest == wanted.digest:
                return template, False
        if not manifest.with_template:
            raise NotFound(
                f"machine '{manifest.machine.name}' stands on template '{wanted.ref}' with digest {wanted.digest}, "
                "which is neither here nor in the backup",
                hint=f"triarch export {manifest.machine.name} FILE --with-template (where it came from)",
                digest=wanted.digest,
            )
        taken = {template.ref for template in self._services.templates.all()}
        if wanted.ref not in taken:
            return wanted, True
        # Another template has that name: this one goes by its digest, too.
        return msgspec.structs.replace(wanted, name=f"{wanted.name[:50]}-{wanted.digest[:8]}", level=1), True

    def _request(
        self, manifest: BackupManifest, template: Template, name: str, request: ImportMachine, *, copy: bool
    ) -> CreateMachine:
        machine = manifest.machine
        known = {profile.name for profile in self._services.profiles.all()}
        if not known.issuperset(machine.profiles):
            # Profiles that are not here count as settings of its own.
            machine = msgspec.structs.replace(machine, profiles=(), own=manifest.settings)
        wanted = copy_request(machine, check_machine_name(name))
        return msgspec.structs.replace(
            wanted,
            template=template.ref,
            architecture=request.architecture or machine.architecture,
            settings=wanted.settings if copy else machine.own,
        )

    async def _resolve_somewhere(self, wanted: CreateMachine, request: ImportMachine) -> Machine:
        """Under the architecture that it had, or where that cannot be had, under the best that can."""
        try:
            return await self._resolve(wanted)
        except DriverUnavailable:
            if request.architecture is not None:
                raise
            return await self._resolve(msgspec.structs.replace(wanted, architecture=None))


def _check_host_devices(machine: Machine) -> None:
    """What a file asks for of this host, its `/` perhaps, nobody here has said yet. Raises `Denied`."""
    wanted = [
        each.id if isinstance(each, UsbDevice) else each.source
        for each in machine.devices.values()
        if isinstance(each, DiskDevice | FolderDevice | HostDevice | UsbDevice)
    ]
    if wanted:
        raise Denied(
            f"machine '{machine.name}' in the backup asks for {', '.join(wanted)[:300]} of this host",
            hint="triarch import FILE --host-devices",
            machine=machine.name,
        )
