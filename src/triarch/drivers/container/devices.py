"""Devices of a container: mounts and nodes that the launcher moves into it, cards, and rules of its control group.

At a start they come after the container was made and before its first process runs, by the very same way as later.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from triarch.drivers.container.cards import interface_of_link
from triarch.drivers.container.record import Record
from triarch.drivers.container.run import until_free
from triarch.errors import Busy, InUse, NotFound, Unavailable, Unsupported
from triarch.host import cgroup
from triarch.host.device_rules import allow_device, can_change_rules, deny_device
from triarch.host.launcher.client import Launcher
from triarch.host.launcher.connect import configure_card, make_card, remove_card
from triarch.host.launcher.protocol import Plug, PlugKind, Unplug
from triarch.host.netlink import Netlink
from triarch.host.pidfd import is_alive
from triarch.host.sources import check_source, is_block_device
from triarch.model.device import DiskDevice, FolderDevice, HostDevice, NicDevice, UsbDevice, VolumeDevice
from triarch.model.driver import MachineSpec, ResolvedDevice

DISK_FOLDER = "/dev/disk/by-name"
_KINDS = {VolumeDevice: PlugKind.VOLUME, FolderDevice: PlugKind.FOLDER}
_FREE_SECONDS = 5.0


async def attach(launcher: Launcher, record: Record, spec: MachineSpec, device: ResolvedDevice, *, new: bool) -> None:
    """Plug it in. A `new` container has its cards since it was made, and rules where those cannot be changed later."""
    if isinstance(device.device, NicDevice):
        if not new:
            await asyncio.to_thread(_connect, record, device)
        return
    await asyncio.to_thread(_check, spec, device, new)
    await launcher.plug(
        Plug(
            id=0,
            first=record.first,
            kind=_KINDS.get(type(device.device), PlugKind.NODE),
            source=device.path,
            path=place_of(device),
            read_only=_read_only(device),
            id_base=spec.machine.ids.base,
        )
    )


async def detach(launcher: Launcher, record: Record, spec: MachineSpec, device: ResolvedDevice) -> None:
    if isinstance(device.device, NicDevice):
        await asyncio.to_thread(_disconnect, record, device)
        return
    if is_node(device):
        await asyncio.to_thread(_take_back, spec, device)
    await launcher.unplug(
        Unplug(
            id=0,
            first=record.first,
            kind=_KINDS.get(type(device.device), PlugKind.NODE),
            source=device.path,
            path=place_of(device),
        )
    )
    if isinstance(device.device, VolumeDevice):
        try:
            await until_free(device.path, _FREE_SECONDS)
        except Busy as error:
            raise InUse(
                f"something in machine '{spec.machine.name}' still uses volume '{device.name}' at another place"
            ) from error


async def until_volumes_free(spec: MachineSpec) -> None:
    """After the end of a run: the kernel undoes its mounts a little later."""
    for device in spec.devices:
        if isinstance(device.device, VolumeDevice):
            await until_free(device.path)


def place_of(device: ResolvedDevice) -> str:
    """Where it is in the machine."""
    match device.device:
        case VolumeDevice(path=path) | FolderDevice(path=path):
            return path
        case DiskDevice():
            return f"{DISK_FOLDER}/{device.name}"
        case _:
            return device.path


def is_node(device: ResolvedDevice) -> bool:
    """Whether the machine needs a rule to open it."""
    return isinstance(device.device, DiskDevice | HostDevice | UsbDevice)


def node_access(device: ResolvedDevice) -> str:
    return "r" if _read_only(device) else "rw"


def _read_only(device: ResolvedDevice) -> bool:
    return isinstance(device.device, FolderDevice | DiskDevice) and device.device.read_only


def _check(spec: MachineSpec, device: ResolvedDevice, new: bool) -> None:
    """What a container cannot have, and what the host does not have (any more)."""
    name = spec.machine.name
    if isinstance(device.device, DiskDevice) and os.path.isfile(device.path):  # noqa: PTH113
        raise Unsupported(
            f"machine '{name}' cannot have the image {device.path} as a disk: a container takes block devices only; "
            "hosted and kvm take images",
            machine=name,
        )
    check_source(device.device)
    if not is_node(device):
        return
    if not device.path:
        raise NotFound(f"device '{device.name}' of machine '{name}' is not on this host", machine=name)
    if can_change_rules():
        allow_device(spec.cgroup, device.path, node_access(device))
    elif cgroup.can_filter_devices() and not new:
        raise Unsupported(
            f"machine '{name}' cannot be given {device.path} while it runs: on this host that takes a restart",
            hint="triarch device add --next-start …",
            machine=name,
        )


def _take_back(spec: MachineSpec, device: ResolvedDevice) -> None:
    if can_change_rules() and (isinstance(device.device, HostDevice) or is_block_device(device.path)):
        deny_device(spec.cgroup, device.path)


def _connect(record: Record, device: ResolvedDevice) -> None:
    interface = interface_of_link(device.name, device.link)
    if interface is None:
        return
    # The machine's first card alone is its way out.
    interface = msgspec.structs.replace(interface, gateway="", gateway6="")
    with _network_of(record) as network_fd:
        with Netlink(network_fd) as inside:
            if inside.index_of(interface.name) is not None:
                return
        try:
            make_card(interface, network_fd)
            with Netlink(network_fd) as inside:
                configure_card(inside, interface)
        except BaseException:
            remove_card(interface, network_fd)
            raise


def _disconnect(record: Record, device: ResolvedDevice) -> None:
    interface = interface_of_link(device.name, device.link)
    if interface is not None:
        with _network_of(record) as network_fd:
            remove_card(interface, network_fd)


@contextmanager
def _network_of(record: Record) -> Iterator[int]:
    fd = os.open(f"/proc/{record.first.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if not is_alive(record.first):
            raise Unavailable("the machine has ended")
        yield fd
    finally:
        os.close(fd)
