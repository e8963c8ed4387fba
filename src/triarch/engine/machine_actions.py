"""What is done to one machine, each piece idempotent; the procedures put the pieces in order."""

from __future__ import annotations

import asyncio
import shutil
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from triarch.drivers.base import Driver
from triarch.engine.cards import check_host_port, ports_of
from triarch.engine.first_boot import FirstBootWork
from triarch.engine.services import Services
from triarch.host.grow import grow_at_rest
from triarch.model.device import VolumeDevice
from triarch.model.driver import MachineSpec, Observation
from triarch.model.machine import Exit, Machine
from triarch.model.operation import Progress
from triarch.model.state import State


class MachineActions:
    """Bound to one machine by uuid; the record is read afresh whenever it is changed."""

    def __init__(self, services: Services, machine: Machine) -> None:
        self.services = services
        self.machine = machine

    @property
    def target(self) -> str:
        return f"machine/{self.machine.name}"

    @property
    def current(self) -> Machine:
        """The record as it is now, or as it was when the operation began if it is not stored."""
        return self.services.machines.find_uuid(self.machine.uuid) or self.machine

    @property
    def driver(self) -> Driver:
        return self.services.driver(self.current)

    @property
    def boots_first(self) -> bool:
        """Whether the first boot's work was still to be done when the operation began."""
        return self.machine.first_boot is not None and not self.machine.first_booted

    @property
    def first_boot(self) -> FirstBootWork:
        return FirstBootWork(self.services, self)

    @property
    def spec(self) -> MachineSpec:
        return self.services.spec(self.current)

    def publish(self, kind: str, **fields: str | int | None) -> None:
        self.services.events.publish(f"machine-{kind}", self.target, fields)

    # -- the record

    async def add_record(self) -> None:
        await self.services.machines.add(self.machine)

    async def remove_record(self) -> None:
        await self.services.machines.remove(self.machine)

    async def update(self, **changes: object) -> None:
        """Store the record with some fields changed; a machine that is gone stays gone."""
        machine = self.services.machines.find_uuid(self.machine.uuid)
        if machine is not None:
            await self.services.machines.put(msgspec.structs.replace(machine, **changes))

    async def record_running(self, restarts: int = 0) -> None:
        await self.update(
            state=State.RUNNING,
            desired=State.RUNNING,
            started_at=datetime.now(UTC),
            running_resources=None,
            last_exit=None,
            restarts=restarts,
        )
        self.publish("started", architecture=self.current.architecture)

    async def record_ended(self, observation: Observation | None, *, desired: State | None = None) -> None:
        """Store how the run ended; a failed one keeps its reason."""
        ended = observation.exit if observation is not None else None
        failed = observation is not None and observation.failed
        await self.update(
            state=State.FAILED if failed else State.STOPPED,
            desired=desired or self.current.desired,
            last_exit=ended or Exit(code=None, reason="" if observation is None else observation.detail),
        )
        self.publish("failed" if failed else "stopped", exit_code=ended.code if ended else None)

    # -- the delta

    async def create_delta(self) -> None:
        Path(self.spec.state_dir).mkdir(mode=0o700, parents=True, exist_ok=True)
        size_bytes = self.machine.resources.disk_bytes
        await asyncio.to_thread(
            self.services.pool.create_delta, self.machine.uuid, size_bytes, durable=not self.machine.ephemeral
        )

    async def remove_delta(self) -> None:
        await asyncio.to_thread(self.services.pool.remove_delta, self.machine.uuid)
        await asyncio.to_thread(self.services.pool.volumes.remove_all, self.machine.uuid)
        shutil.rmtree(self.services.instance.machine_state_dir(self.machine.uuid), ignore_errors=True)

    async def remove_snapshots(self) -> None:
        for snapshot in self.services.snapshots.of(self.machine.uuid):
            await self.services.snapshots.remove(snapshot)
            await asyncio.to_thread(self.services.pool.sets.remove, snapshot.id)

    async def check_delta(self) -> None:
        """The volumes too: what left the delta dirty left them so."""
        await asyncio.to_thread(self.services.pool.check_delta, self.machine.uuid)
        for name in self.services.pool.volumes.all(self.machine.uuid):
            await asyncio.to_thread(self.services.pool.volumes.check, self.machine.uuid, name)

    async def prepare_volumes(self) -> None:
        """Those that a profile or `set` asked for are made, or given the size that they are to have."""
        for name, device in self.current.devices.items():
            if isinstance(device, VolumeDevice):
                volumes = self.services.pool.volumes
                await asyncio.to_thread(volumes.create, self.machine.uuid, name, device.size_bytes)

    # -- running

    async def need_dependencies(self) -> None:
        await self.services.need(self.current)

    async def prepare(self) -> None:
        """Everything that a start reads is there and whole: layers, guest pack, and a delta that a crash left."""
        await self.verify_layers()
        if self.current.state is State.FAILED:
            await self.check_delta()
        # Where it could not grow while the machine ran, it does now.
        await asyncio.to_thread(grow_at_rest, self.services.pool.delta_path(self.machine.uuid))
        await self.prepare_volumes()
        if self.driver.needs_guest_pack:
            await self.need_guest_pack()

    async def verify_layers(self) -> None:
        for layer in self.services.template_of(self.current).layers:
            await asyncio.to_thread(self.services.pool.verify_layer, layer)

    async def need_guest_pack(self) -> None:
        """The first VM of a host has it built, which is reported as this operation's progress."""
        from triarch.guest.pack import ensure_pack

        def report(progress: Progress) -> None:
            self.services.report(self.target, progress)

        hardware = self.current.hardware
        self.services.guest_packs[hardware] = await ensure_pack(report, hardware=hardware)

    async def plug(self) -> None:
        """Networks, names, filters and forwards are there before the machine is."""
        machine = self.current
        for forward in machine.forwards:
            await asyncio.to_thread(check_host_port, machine.name, forward)
        for port in ports_of(self.services, machine):
            await self.services.network.plug(await self.services.networks.need(port.network), port)

    async def unplug(self) -> None:
        for port in ports_of(self.services, self.current):
            await self.services.network.unplug(port.host_interface)

    async def replug(self) -> None:
        """What the record says of names, labels, forwards and rates holds on the host now, if it runs."""
        await self.services.network.refresh(ports_of(self.services, self.current))

    async def make_run_dir(self) -> None:
        run_dir = Path(self.spec.run_dir)
        run_dir.parent.mkdir(mode=0o711, parents=True, exist_ok=True)
        run_dir.mkdir(mode=0o700, exist_ok=True)

    async def boot(self) -> None:
        self.services.architectures.listen(self.current.architecture)
        await self.make_run_dir()
        await self.prepare_volumes()
        await self.driver.create(self.spec)
        await self.driver.start(self.spec)

    async def forget_run(self) -> None:
        """Nothing of a run is left on the host; not even its exit status, which is recorded by then."""
        await self.driver.delete(self.spec)
        shutil.rmtree(self.spec.run_dir, ignore_errors=True)

    async def end_run(self) -> None:
        """Undo of `boot`: end it without asking, and forget it."""
        await self.driver.kill(self.spec)
        await self.forget_run()
