"""Plugging a device into a machine and out of it: live where it runs, and in its record."""

from __future__ import annotations

import asyncio

import msgspec

from triarch.drivers.base import Hotplug
from triarch.engine.cards import port_of
from triarch.engine.on_machine import OnMachine
from triarch.engine.plugged import resolved
from triarch.engine.procedure import Step
from triarch.engine.services import Services
from triarch.engine.set_machine import RECORD_FIELDS
from triarch.errors import Unsupported
from triarch.model.device import Device, NicDevice, VolumeDevice
from triarch.model.driver import ResolvedDevice
from triarch.model.machine import Machine
from triarch.model.state import State


class DeviceArguments(msgspec.Struct, frozen=True, kw_only=True):
    """The record before and after. `live`: the running machine is to follow now.

    `device` is None for what is in the pool only. `makes`: the volume did not exist before. `purge`: it is removed.
    """

    machine: Machine
    after: Machine
    name: str
    device: Device | None
    live: bool
    makes: bool = False
    purge: bool = False


class DeviceProcedure(OnMachine[DeviceArguments]):
    """What both verbs share."""

    arguments_type = DeviceArguments

    def __init__(self, services: Services, arguments: DeviceArguments) -> None:
        super().__init__(services, arguments)
        services.claims.claim(arguments.after)

    @property
    def result(self) -> str | None:
        return self.arguments.name

    def _resolved(self, machine: Machine, device: Device) -> ResolvedDevice:
        """With the record that has the device: a card's address is in it."""
        services = self.services
        return resolved(machine, self.arguments.name, device, services.pool, services.link_for)

    @property
    def _hotplug(self) -> Hotplug:
        driver = self.machine.driver
        if not isinstance(driver, Hotplug):
            raise Unsupported(f"architecture '{driver.name}' takes no devices while a machine runs")
        return driver

    @property
    def _runs(self) -> bool:
        return self.arguments.live and self.machine.current.state is State.RUNNING

    async def _plug(self, machine: Machine) -> None:
        device = self.arguments.device
        if self._runs and device is not None:
            await self._wire(machine, device)
            await self._hotplug.attach(self.machine.spec, self._resolved(machine, device))

    async def _unplug(self, machine: Machine) -> None:
        device = self.arguments.device
        if self._runs and device is not None:
            await self._hotplug.detach(self.machine.spec, self._resolved(machine, device))
            if isinstance(device, NicDevice):
                await self.services.network.unplug(port_of(self.services, machine, self.arguments.name).host_interface)

    async def _wire(self, machine: Machine, device: Device) -> None:
        """A card's network, filters and names are there before the card is."""
        if isinstance(device, NicDevice):
            port = port_of(self.services, machine, self.arguments.name)
            await self.services.network.plug(self.services.networks.get(port.network), port)

    async def _put(self, machine: Machine) -> None:
        await self.machine.update(**{field: getattr(machine, field) for field in RECORD_FIELDS})

    async def _release_port(self, machine: Machine) -> None:
        """The host's part of a card that is not there any more."""
        if isinstance(self.arguments.device, NicDevice) and self._runs:
            port = port_of(self.services, machine, self.arguments.name)
            await self.services.network.unplug(port.host_interface)

    async def _remove_volume(self) -> None:
        volumes = self.services.pool.volumes
        await asyncio.to_thread(volumes.remove, self.arguments.machine.uuid, self.arguments.name)


class AttachDevice(DeviceProcedure):
    """What it needs, then into the running machine, then the record. Interrupted before that, nothing is left of it."""

    verb = "attach"

    def steps(self) -> tuple[Step, ...]:
        return (
            Step("prepare", self._prepare, self._forget),
            Step("plug", self._plug_in, self._plug_out),
            Step("record", self._record, commits=True),
        )

    async def _prepare(self) -> None:
        device = self.arguments.device
        if isinstance(device, VolumeDevice):
            volumes, uuid = self.services.pool.volumes, self.arguments.machine.uuid
            await asyncio.to_thread(volumes.create, uuid, self.arguments.name, device.size_bytes)
        if isinstance(device, NicDevice) and self._runs:
            port = port_of(self.services, self.arguments.after, self.arguments.name)
            await self.services.network.plug(await self.services.networks.need(port.network), port)

    async def _forget(self) -> None:
        if isinstance(self.arguments.device, VolumeDevice) and self.arguments.makes:
            await self._remove_volume()
        await self._release_port(self.arguments.after)

    async def _plug_in(self) -> None:
        await self._plug(self.arguments.after)

    async def _plug_out(self) -> None:
        await self._unplug(self.arguments.after)

    async def _record(self) -> None:
        await self._put(self.arguments.after)
        self.machine.publish("attached", device=self.arguments.name)


class DetachDevice(DeviceProcedure):
    """Out of the running machine, then out of the record; a volume's data goes last, and only where that was asked."""

    verb = "detach"

    def steps(self) -> tuple[Step, ...]:
        return (
            Step("unplug", self._plug_out, self._plug_in),
            Step("record", self._record, commits=True),
            *((Step("purge", self._remove_volume),) if self.arguments.purge else ()),
        )

    async def _plug_out(self) -> None:
        await self._unplug(self.arguments.machine)

    async def _plug_in(self) -> None:
        """After a refusal to let go it is still there, and plugging in what is there is success."""
        await self._plug(self.arguments.machine)

    async def _record(self) -> None:
        await self._put(self.arguments.after)
        await self._release_port(self.arguments.machine)
        self.machine.publish("detached", device=self.arguments.name)


DEVICE_PROCEDURES: tuple[type[DeviceProcedure], ...] = (AttachDevice, DetachDevice)
