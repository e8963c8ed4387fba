"""A machine's devices as its driver gets them: everything found, nothing opened."""

from __future__ import annotations

from collections.abc import Callable

from triarch.errors import Error
from triarch.host.sources import usb_node
from triarch.model.device import Device, DiskDevice, FolderDevice, HostDevice, NicDevice, UsbDevice, VolumeDevice
from triarch.model.driver import ResolvedDevice
from triarch.model.machine import Machine
from triarch.model.network import Link
from triarch.storage.base import Pool

LinkOf = Callable[[Machine, str], Link]


def resolved_devices(machine: Machine, pool: Pool, link_of: LinkOf) -> tuple[ResolvedDevice, ...]:
    """All of the machine's devices, sorted by name."""
    return tuple(resolved(machine, name, machine.devices[name], pool, link_of) for name in sorted(machine.devices))


def resolved(machine: Machine, name: str, device: Device, pool: Pool, link_of: LinkOf) -> ResolvedDevice:
    """One device. What the host does not have has no path, which its driver refuses when it is to be plugged in."""
    match device:
        case VolumeDevice():
            return ResolvedDevice(name=name, device=device, path=str(pool.volumes.path(machine.uuid, name)))
        case DiskDevice(source=source) | FolderDevice(source=source) | HostDevice(source=source):
            return ResolvedDevice(name=name, device=device, path=source)
        case UsbDevice(id=usb_id):
            return ResolvedDevice(name=name, device=device, path=_usb_path(usb_id))
        case NicDevice():
            return ResolvedDevice(name=name, device=device, link=link_of(machine, name))


def _usb_path(usb_id: str) -> str:
    try:
        return usb_node(usb_id)
    except Error:
        return ""
