"""What the daemon can ask for about a machine's devices."""

from __future__ import annotations

import asyncio
import posixpath

import msgspec

from triarch.drivers.base import Hotplug, Inspectable
from triarch.engine.device_procedures import AttachDevice, DetachDevice, DeviceArguments
from triarch.engine.operations import Operations
from triarch.engine.services import Services
from triarch.engine.set_machine import plan_change
from triarch.engine.settings import origins_of
from triarch.errors import Exists, Invalid, NotFound, TimedOut, Unsupported, WrongState
from triarch.host.sources import check_source
from triarch.model.device import (
    AddDevice,
    Device,
    DeviceView,
    FolderDevice,
    HardwareInfo,
    NicDevice,
    VolumeDevice,
)
from triarch.model.machine import Machine
from triarch.model.names import check_machine_name
from triarch.model.operation import Operation
from triarch.model.settings import MACHINE_LAYER
from triarch.model.state import State

# Serial numbers of disks that every VM has.
_TAKEN_NAMES = frozenset({"delta", "modules", "layer", "lo", "eth0"})
# A guest that runs tells it at once; one that boots is not waited for.
_TELL_SECONDS = 2.0
_KERNEL_FOLDERS = ("/proc", "/sys", "/dev")


class Devices:
    """Devices of machines. Changes return an `Operation` that already runs and holds the machine."""

    def __init__(self, services: Services, operations: Operations) -> None:
        self._services = services
        self._operations = operations

    def list(self, name: str) -> tuple[DeviceView, ...]:
        """What a machine has, and the volumes that were detached from it and are kept; sorted by name."""
        machine = self._services.machines.get(check_machine_name(name))
        sources = {origin.key: origin.source for origin in origins_of(self._services.profiles, machine)}
        attached = [
            DeviceView(name=device, device=machine.devices[device], origin=sources.get(f"devices.{device}", ""))
            for device in machine.devices
        ]
        kept = [
            DeviceView(name=volume, device=None, origin=MACHINE_LAYER, attached=False)
            for volume in self._services.pool.volumes.all(machine.uuid)
            if volume not in machine.devices
        ]
        return tuple(sorted((*attached, *kept), key=lambda view: view.name))

    async def add(self, name: str, request: AddDevice) -> Operation:
        """Plug in a device, now where the machine runs. Raises what is wrong with it, or with the host's part of it."""
        machine = self._changeable(name)
        if request.name in machine.devices:
            raise Exists(f"machine '{name}' has a device '{request.name}' already", hint=f"triarch device list {name}")
        check_device(machine, request.name, request.device)
        check_source(request.device)
        self._check_live(machine, request.live, request.device)
        own = {**(machine.own.devices or {}), request.name: request.device}
        arguments = DeviceArguments(
            machine=machine,
            after=await self._with(machine, own),
            name=request.name,
            device=request.device,
            live=request.live,
            makes=request.name not in self._services.pool.volumes.all(machine.uuid),
        )
        return self._operations.begin(AttachDevice(self._services, arguments))

    async def remove(self, name: str, device: str, *, purge: bool = False) -> Operation:
        """Unplug a device. A volume is kept, detached, unless `purge` removes it with its data."""
        machine = self._changeable(name)
        own = dict(machine.own.devices or {})
        found = machine.devices.get(device)
        if found is None and not (purge and device in self._services.pool.volumes.all(machine.uuid)):
            raise NotFound(f"machine '{name}' has no device '{device}'", hint=f"triarch device list {name}")
        if found is not None and own.pop(device, None) is None:
            raise Invalid(
                f"device '{device}' of machine '{name}' comes from a profile", hint=f"triarch device list {name}"
            )
        if purge and found is not None and not isinstance(found, VolumeDevice):
            raise Invalid(f"device '{device}' of machine '{name}' is no volume: there is nothing to purge")
        arguments = DeviceArguments(
            machine=machine,
            after=await self._with(machine, own, unplugs=device),
            name=device,
            device=found,
            live=True,
            purge=purge,
        )
        return self._operations.begin(DetachDevice(self._services, arguments))

    async def hardware(self, name: str) -> HardwareInfo:
        """Which virtual hardware a running machine sees."""
        machine = self._services.machines.get(check_machine_name(name))
        if machine.state is not State.RUNNING:
            raise WrongState(
                f"machine '{name}' sees no hardware: it is {machine.state.value}; that needs running",
                hint=f"triarch start {name}",
                machine=name,
            )
        driver = self._services.driver(machine)
        if not isinstance(driver, Inspectable):
            raise self._services.architectures.lacks(machine.architecture, "hardware")
        try:
            async with asyncio.timeout(_TELL_SECONDS):
                return await driver.hardware(self._services.spec(machine))
        except TimeoutError as error:
            raise TimedOut(
                f"machine '{name}' does not tell which hardware it sees: it is busy with its start", machine=name
            ) from error

    def _changeable(self, name: str) -> Machine:
        machine = self._services.machines.get(check_machine_name(name))
        self._operations.check_free(f"machine/{name}")
        if machine.state is State.PAUSED:
            raise WrongState(
                f"cannot change the devices of machine '{name}': it is paused; that needs running or stopped",
                hint=f"triarch resume {name}",
                machine=name,
            )
        return machine

    async def _with(self, machine: Machine, own: dict[str, Device], *, unplugs: str = "") -> Machine:
        """The record as it is with these devices of its own."""
        said = msgspec.structs.replace(machine, own=msgspec.structs.replace(machine.own, devices=own or msgspec.UNSET))
        return (await plan_change(self._services, machine, said, unplugs=unplugs)).after

    def _check_live(self, machine: Machine, live: bool, device: Device) -> None:
        driver = self._services.driver(machine)
        if not live or machine.state is not State.RUNNING or isinstance(driver, Hotplug):
            return
        having = self._services.architectures.having("hotplug")
        raise Unsupported(
            f"architecture '{machine.architecture}' takes no devices while a machine runs"
            + (f"; {', '.join(having)} does" if having else ""),
            hint=f"triarch device add --next-start {machine.name} …",
        )


def check_device(machine: Machine, name: str, device: Device) -> None:
    """Refuse names and places that cannot be in a machine. Raises `Invalid` or `Exists`."""
    if name in _TAKEN_NAMES or name.startswith("layer"):
        raise Invalid(f"a device cannot be called '{name}': every machine has one of that name", device=name)
    if isinstance(device, NicDevice) and not name.isalnum():
        raise Invalid(f"a network card cannot be called '{name}': it needs letters and digits, such as eth1")
    if not isinstance(device, VolumeDevice | FolderDevice):
        return
    path = device.path
    if posixpath.normpath(path) != path or path == "/" or path.startswith("//"):
        raise Invalid(f"illegal path {path}: it needs a directory below /, without . and ..", path=path)
    if any(path == folder or path.startswith(f"{folder}/") for folder in _KERNEL_FOLDERS):
        raise Invalid(f"illegal path {path}: {', '.join(_KERNEL_FOLDERS)} are the kernel's", path=path)
    for other_name, other in machine.devices.items():
        if isinstance(other, VolumeDevice | FolderDevice) and other.path == path and other_name != name:
            raise Exists(f"device '{other_name}' of machine '{machine.name}' is at {path} already", path=path)
