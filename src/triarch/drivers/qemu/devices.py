"""Devices of a VM: plugged into QEMU over its monitor, then taken up by the guest's agent.

At a start QEMU waits (`-S`) until all are plugged in, by the same commands as later; the guest's init then takes them
up from its configuration. QEMU opens nothing by name: it is handed open descriptors.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any

from qemu.qmp import ExecuteError, QMPClient

from triarch.drivers.qemu.cmdline import BRIDGE, SHARED_MEMORY, row_of
from triarch.drivers.qemu.launch import limits_of, owner_of, tap_of
from triarch.drivers.qemu.monitor import monitor
from triarch.drivers.qemu.run import FOLDER_FILES, Run
from triarch.errors import Failed, InUse, Unavailable, Unsupported
from triarch.guest.agent import Agent
from triarch.guest.devices import BUSY, release_row, unmount_row
from triarch.host.limits import make_limited_group
from triarch.host.locks import lock_file
from triarch.host.pidfd import ProcessId, wait_for_end
from triarch.host.sources import is_block_device, open_disk
from triarch.host.spawn import allow_longer_files, reap
from triarch.host.virtiofs import share_folder
from triarch.model.device import DiskDevice, FolderDevice, NicDevice, VolumeDevice
from triarch.model.driver import MachineSpec, ResolvedDevice
from triarch.model.network import BridgeLink, MacvlanLink

_REMOVE_SECONDS = 20.0
_POLL_SECONDS = 0.05
_FOLDER_DRIVER = "vhost-user-fs-pci"
_PRELAUNCH = "prelaunch"


class Devices:
    """The devices of one driver object's machines. What must outlive it is in QEMU itself."""

    def __init__(self) -> None:
        self._reapers: set[asyncio.Task[None]] = set()

    def close(self) -> None:
        """Nobody waits for the ends of processes any more; init does."""
        for task in self._reapers:
            task.cancel()

    async def plug_all(self, spec: MachineSpec, run: Run, process: ProcessId, *, go_on: bool) -> None:
        """Everything that the machine has, before the guest's first instruction; with `go_on` let that come."""
        async with monitor(run.monitor, spec.machine.name) as client:
            for device in spec.devices:
                await self._plug(client, spec, run, process, device)
            if go_on:
                await client.execute("cont")

    async def attach(
        self, spec: MachineSpec, run: Run, process: ProcessId, agent: Agent, device: ResolvedDevice
    ) -> None:
        async with monitor(run.monitor, spec.machine.name) as client:
            if isinstance(device.device, FolderDevice) and not await has_shared_memory(client):
                raise Unsupported(
                    f"machine '{spec.machine.name}' takes a restart for its first folder: "
                    "its memory is not shared with the program that serves folders",
                    hint=f"triarch mount --next-start … && triarch restart {spec.machine.name}",
                    machine=spec.machine.name,
                )
            await self._plug(client, spec, run, process, device)
        row = row_of(device)
        if row is not None:
            await _ask(agent, spec, device, row)

    async def detach(self, spec: MachineSpec, run: Run, agent: Agent, device: ResolvedDevice) -> None:
        match device.device:
            case VolumeDevice(path=path) | FolderDevice(path=path):
                row: bytes | None = unmount_row(path)
            case DiskDevice():
                row = release_row(device.name)
            case _:
                row = None
        async with monitor(run.monitor, spec.machine.name) as client:
            there = await _is_plugged(client, device.name)
        if there and row is not None:
            await _ask(agent, spec, device, row)
        async with monitor(run.monitor, spec.machine.name) as client:
            await _unplug(client, spec, device.name)

    async def _plug(
        self, client: QMPClient, spec: MachineSpec, run: Run, process: ProcessId, device: ResolvedDevice
    ) -> None:
        if await _is_plugged(client, device.name):
            return
        # What an attach left that was broken off.
        await _remove_backend(client, device.name)
        try:
            with ExitStack() as held:
                match device.device:
                    case VolumeDevice():
                        await _plug_disk(client, spec, process, device, _held(held, lock_file(device.path)), False)
                    case DiskDevice(read_only=read_only):
                        fd = _held(held, open_disk(device.path, read_only=read_only))
                        await _plug_disk(client, spec, process, device, fd, read_only)
                    case FolderDevice():
                        await self._plug_folder(client, spec, run, device, held)
                    case NicDevice():
                        await _plug_card(client, device, held)
                    case _:
                        raise Unsupported(
                            f"machine '{spec.machine.name}' cannot have device '{device.name}': a VM's kernel has no "
                            "driver for devices of the host; container passes them on",
                            machine=spec.machine.name,
                        )
        except BaseException:
            with suppress(ExecuteError, Failed):
                await _remove_backend(client, device.name)
            raise

    async def _plug_folder(
        self, client: QMPClient, spec: MachineSpec, run: Run, device: ResolvedDevice, held: ExitStack
    ) -> None:
        assert isinstance(device.device, FolderDevice)
        groups: Sequence[int] = ()
        with suppress(Unavailable):
            groups = make_limited_group(spec.cgroup, limits_of(spec.machine))
            for fd in groups:
                held.callback(os.close, fd)
        connection, process = await asyncio.to_thread(
            share_folder,
            device.path,
            run.directory,
            f"{FOLDER_FILES}{device.name}",
            read_only=device.device.read_only,
            cgroup_fds=groups,
        )
        held.callback(connection.close)
        self._reap(process)
        backend = _id(device.name)
        await _hand_over(client, backend, connection.fileno())
        address = {"type": "fd", "data": {"str": backend}}
        socket = {"type": "socket", "data": {"addr": address, "server": False}}
        await client.execute("chardev-add", {"id": backend, "backend": socket})
        await _add_device(client, device.name, _FOLDER_DRIVER, chardev=backend, tag=device.name)

    def _reap(self, process: ProcessId) -> None:
        async def wait() -> None:
            await wait_for_end(process)
            reap(process.pid)

        task = asyncio.create_task(wait())
        self._reapers.add(task)
        task.add_done_callback(self._reapers.discard)


async def was_interrupted(run: Run, name: str) -> bool:
    """Whether QEMU still waits for devices of a start that a daemon's death broke off."""
    async with monitor(run.monitor, name) as client:
        answer: Any = await client.execute("query-status")
    return bool(answer["status"] == _PRELAUNCH)


def _held(held: ExitStack, fd: int) -> int:
    held.callback(os.close, fd)
    return fd


def _id(name: str) -> str:
    return f"device-{name}"


async def _plug_disk(
    client: QMPClient, spec: MachineSpec, process: ProcessId, device: ResolvedDevice, fd: int, read_only: bool
) -> None:
    """Its locking is off: our own claim is on the very descriptor that QEMU gets."""
    if not read_only and not is_block_device(device.path):
        await asyncio.to_thread(allow_longer_files, process, owner_of(spec), os.fstat(fd).st_size)
    backend = _id(device.name)
    client.send_fd_scm(fd)
    answer: Any = await client.execute("add-fd", {"opaque": backend})
    file: dict[str, object] = {
        "driver": "host_device" if is_block_device(device.path) else "file",
        "filename": f"/dev/fdset/{answer['fdset-id']}",
        "locking": "off",
    }
    common: dict[str, object] = {"read-only": read_only, "discard": "unmap"}
    await client.execute("blockdev-add", {"driver": "raw", "node-name": backend, "file": {**file, **common}, **common})
    await _add_device(client, device.name, "virtio-blk-pci", drive=backend, serial=device.name)


async def _plug_card(client: QMPClient, device: ResolvedDevice, held: ExitStack) -> None:
    link = device.link
    fd = await asyncio.to_thread(tap_of, link)
    if fd is None or not isinstance(link, BridgeLink | MacvlanLink):
        return
    _held(held, fd)
    backend = _id(device.name)
    await _hand_over(client, backend, fd)
    await client.execute("netdev_add", {"type": "tap", "id": backend, "fd": backend, "vhost": False})
    await _add_device(client, device.name, "virtio-net-pci", netdev=backend, mac=link.nic.mac, romfile="")


async def _hand_over(client: QMPClient, name: str, fd: int) -> None:
    client.send_fd_scm(fd)
    await client.execute("getfd", {"fdname": name})


async def _add_device(client: QMPClient, name: str, driver: str, **properties: object) -> None:
    # Without the ports of old, of which a bridge has few; a folder never had any.
    modern = {} if driver == _FOLDER_DRIVER else {"disable-legacy": "on"}
    await client.execute("device_add", {"driver": driver, "id": _id(name), "bus": BRIDGE, **modern, **properties})


async def _is_plugged(client: QMPClient, name: str) -> bool:
    listing: Any = await client.execute("qom-list", {"path": "/machine/peripheral"})
    return any(entry["name"] == _id(name) for entry in listing)


async def has_shared_memory(client: QMPClient) -> bool:
    """Whether virtiofsd can share the guest's memory: a VM that had a folder at its start."""
    listing: Any = await client.execute("qom-list", {"path": "/objects"})
    return any(entry["name"] == SHARED_MEMORY for entry in listing)


async def _unplug(client: QMPClient, spec: MachineSpec, name: str) -> None:
    """The guest's kernel is asked to let go; only then is it gone."""
    if await _is_plugged(client, name):
        with suppress(ExecuteError):
            # Asked already, it is refused; what counts is whether it goes.
            await client.execute("device_del", {"id": _id(name)})
        try:
            async with asyncio.timeout(_REMOVE_SECONDS):
                while await _is_plugged(client, name):
                    await asyncio.sleep(_POLL_SECONDS)
        except TimeoutError as error:
            raise InUse(f"machine '{spec.machine.name}' does not let go of device '{name}'") from error
    await _remove_backend(client, name)


async def _remove_backend(client: QMPClient, name: str) -> None:
    """Whatever of it there is: block node, card's backend, connection, descriptors. Absent is success."""
    backend = _id(name)
    for command, arguments in (
        ("blockdev-del", {"node-name": backend}),
        ("netdev_del", {"id": backend}),
        ("chardev-remove", {"id": backend}),
        ("closefd", {"fdname": backend}),
    ):
        with suppress(ExecuteError):
            await client.execute(command, arguments)
    sets: Any = await client.execute("query-fdsets")
    for each in sets:
        if any(fd.get("opaque") == backend for fd in each["fds"]):
            with suppress(ExecuteError):
                await client.execute("remove-fd", {"fdset-id": each["fdset-id"]})


async def _ask(agent: Agent, spec: MachineSpec, device: ResolvedDevice, row: bytes) -> None:
    """Have the guest do its part. Raises `InUse` or `Failed` with its words."""
    answer = await agent.ask(f"d:{row.decode()}")
    if answer.code == BUSY:
        raise InUse(f"something in machine '{spec.machine.name}' still uses device '{device.name}'")
    if answer.code != 0:
        said = answer.errors.decode(errors="replace").strip()[:500]
        shown = "".join(letter if letter.isprintable() else "?" for letter in said)
        why = shown or "it does not say why"
        raise Failed(f"machine '{spec.machine.name}' does not take device '{device.name}': {why}")
