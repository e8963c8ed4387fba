"""The command line of QEMU and the configuration of its guest: pure functions of a `MachineSpec`.

QEMU opens nothing by name that the machine owns: whatever it may touch is an open descriptor that it inherits. A
descriptor is given as `/dev/fdset/N` where QEMU can take it so, and as `/proc/self/fd/N` where it insists on a path;
the latter is opened again, with QEMU's own rights.
"""

from __future__ import annotations

import math
from enum import StrEnum

import msgspec

from triarch.guest.devices import card_row, disk_row, folder_row, volume_row
from triarch.guest.protocol import (
    AGENT_PORT,
    CONTROL_PORT,
    DELTA_SERIAL,
    FW_CFG_KEY,
    MODULES_SERIAL,
    REPORT_PORT,
    GuestCard,
    GuestConfig,
    GuestNetwork,
    Medium,
    kernel_command_line,
)
from triarch.model.device import DiskDevice, FolderDevice, Hardware, NicDevice, VolumeDevice
from triarch.model.driver import MachineSpec, Resize, ResolvedDevice
from triarch.model.network import BridgeLink, Link, MacvlanLink, NoLink, UserLink
from triarch.model.resources import Resources
from triarch.model.template import Init

PROGRAM = "qemu-system-x86_64"
BRIDGE, SHARED_MEMORY = "bridge", "ram"
DEFAULT_MEMORY_BYTES = 512 << 20
MIN_MEMORY_BYTES = 128 << 20
MAX_PROCESSORS = 255  # of q35 without an interrupt-remapping IOMMU

# Lines on standard error by which QEMU's end can be told from its death: why it shuts down (a restart gives no
# reason), and that it did.
REASON_TRACE = "qemu_system_shutdown_request"
STATE_TRACE = "runstate_set"

_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
_MIB = 1 << 20
_PMEM_ALIGNMENT_BYTES = 1 << 30
# Each change above what the machine has had takes one.
MEMORY_SLOTS = 16
_ROOM_PROCESSORS = 8
# QEMU's processors address 1 TiB by default, and layers and devices are there too.
_MAX_PLUGGED_BYTES = 512 << 30


class Accelerator(StrEnum):
    """What executes the guest's instructions. The value is QEMU's name."""

    TCG = "tcg"
    KVM = "kvm"


# In less room for translated code (MiB) a booting systemd is translated over and over; every VM keeps all of it.
_ACCELERATION: dict[Accelerator, tuple[str, ...]] = {
    Accelerator.TCG: ("-accel", "tcg,thread=multi,tb-size=32", "-cpu", "max"),
    Accelerator.KVM: ("-accel", "kvm", "-cpu", "host"),
}


class Wiring(msgspec.Struct, frozen=True, kw_only=True):
    """The descriptors that QEMU inherits, by number.

    `console`, `agent`, `control` and `monitor` are listening unix sockets; `log` and `report` are open for writing.
    """

    kernel: int
    initrd: int
    config: int
    delta: int
    log: int
    report: int
    monitor: int
    console: int
    agent: int
    control: int
    layers: tuple[int, ...]
    modules: int | None = None
    tap: int | None = None


def guest_config(
    spec: MachineSpec, host_key: bytes, authorized_key: str, *, attached: bool = False, terminal: Resize | None = None
) -> GuestConfig:
    """What the guest's init must know of this start."""
    machine = spec.machine
    return GuestConfig(
        hostname=machine.name,
        init=machine.init,
        layers=(Medium.PMEM,) * len(spec.layers),
        host_key=host_key,
        authorized_key=authorized_key,
        command=spec.command,
        environment={**spec.template.environment, **machine.environment},
        network=_guest_network(spec.link),
        cards=_guest_cards(spec),
        attached=attached,
        terminal=terminal,
        modules=machine.init is Init.SYSTEM,
        devices=rows_of(spec),
        emulated=_emulated(spec),
    )


def rows_of(spec: MachineSpec) -> tuple[bytes, ...]:
    """What the guest's init does about devices that are there from the start; cards are configured on their own."""
    rows = (row_of(device) for device in spec.devices if not isinstance(device.device, NicDevice))
    return tuple(row for row in rows if row is not None)


def row_of(device: ResolvedDevice) -> bytes | None:
    """What the guest does to take the device up; None for nothing."""
    link = device.link
    match device.device:
        case VolumeDevice(path=path):
            return volume_row(device.name, path)
        case FolderDevice(path=path, read_only=read_only):
            return folder_row(device.name, path, read_only=read_only)
        case DiskDevice():
            return disk_row(device.name)
        case NicDevice() if isinstance(link, BridgeLink | MacvlanLink):
            nic = link.nic
            return card_row(GuestCard(name=device.name, mac=nic.mac, address=nic.address, address6=nic.address6))
    return None


def _guest_network(link: Link) -> GuestNetwork | None:
    match link:
        case BridgeLink() | MacvlanLink():
            return GuestNetwork(
                address=link.nic.address,
                address6=link.nic.address6,
                gateway=link.gateway if link.nic.address else "",
                gateway6=link.gateway6,
                nameserver=link.nameserver,
                domain=link.domain,
            )
        case UserLink():
            return GuestNetwork(
                address=link.address, gateway=link.gateway, nameserver=link.nameserver, domain=link.domain
            )
        case NoLink():
            return None


def _guest_cards(spec: MachineSpec) -> tuple[GuestCard, ...]:
    """Those beside the first one, in the order of the devices' names."""
    links = ((found.name, found.link) for found in spec.devices)
    return tuple(
        GuestCard(name=name, mac=link.nic.mac, address=link.nic.address, address6=link.nic.address6)
        for name, link in links
        if isinstance(link, BridgeLink | MacvlanLink)
    )


def memory_bytes(resources: Resources) -> int:
    """The guest's memory, in whole MiB."""
    wanted = resources.memory_bytes or DEFAULT_MEMORY_BYTES
    return -(-wanted // _MIB) * _MIB


def processors(resources: Resources) -> int:
    """How many virtual processors the guest sees; a fraction is rounded up, its control group enforces the rest."""
    return max(1, math.ceil(resources.cpus or 1))


class Headroom(msgspec.Struct, frozen=True, kw_only=True):
    """How much can be plugged in while the machine runs, beside what it starts with."""

    processors: int = 0
    memory_bytes: int = 0


def headroom(resources: Resources, host_processors: int, host_memory_bytes: int) -> Headroom:
    """Up to the whole host, but for processors: a guest sets room aside for each that may come."""
    count, memory = processors(resources), memory_bytes(resources)
    most = min(max(host_processors, count), max(_ROOM_PROCESSORS, 2 * count), MAX_PROCESSORS)
    return Headroom(
        processors=most - count, memory_bytes=min(max(0, host_memory_bytes - memory), _MAX_PLUGGED_BYTES) // _MIB * _MIB
    )


def qemu_argv(
    spec: MachineSpec, config: GuestConfig, wiring: Wiring, accelerator: Accelerator, room: Headroom
) -> tuple[str, ...]:
    """The whole command line."""
    return (
        PROGRAM,
        *("-name", f"guest={spec.machine.name},debug-threads=on", "-uuid", spec.uuid),
        *("-machine", _machine(spec)),
        *_ACCELERATION[accelerator],
        *_processors(spec, room),
        *_memory(spec, room),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-sandbox", _SANDBOX, "-trace", REASON_TRACE, "-trace", STATE_TRACE),
        *("-kernel", _path(wiring.kernel), "-initrd", _path(wiring.initrd)),
        *("-append", kernel_command_line(config)),
        *("-fw_cfg", f"name={FW_CFG_KEY},file={_path(wiring.config)}"),
        *_monitor(wiring),
        *_console(wiring),
        *_ports(wiring),
        *_delta(spec, wiring),
        *_layers(spec, wiring),
        *_balloon(config),
        *_modules(spec, wiring),
        *_network(spec.link, wiring, "e1000" if _emulated(spec) else "virtio-net-pci"),
        *_room_for_devices(spec, config),
    )


def _machine(spec: MachineSpec) -> str:
    machine = "q35,usb=off,vmport=off" + (",nvdimm=on" if _emulated(spec) else "")
    return f"{machine},memory-backend={SHARED_MEMORY}" if has_folders(spec) else machine


def has_folders(spec: MachineSpec) -> bool:
    """Whether another process, virtiofsd, is to read and write the guest's memory."""
    return any(isinstance(device.device, FolderDevice) for device in spec.devices)


def _room_for_devices(spec: MachineSpec, config: GuestConfig) -> tuple[str, ...]:
    """A bridge whose slots take devices while the VM runs, by ACPI; it costs a boot nothing that can be measured.

    Memory that virtiofsd shares is a memfd. Where there are devices from the start, the VM waits for them.
    """
    bridged = bool(spec.devices) or not config.attached
    bridge = ("-device", f"pci-bridge,id={BRIDGE},chassis_nr=1,addr=0x10") if bridged else ()
    size = memory_bytes(spec.machine.resources)
    memory = ("-object", f"memory-backend-memfd,id={SHARED_MEMORY},size={size},share=on") if has_folders(spec) else ()
    return (*bridge, *memory, *(("-S",) if spec.devices else ()))


def _path(fd: int) -> str:
    return f"/proc/self/fd/{fd}"


def _processors(spec: MachineSpec, room: Headroom) -> tuple[str, ...]:
    count = processors(spec.machine.resources)
    return ("-smp", f"cpus={count},maxcpus={count + room.processors}")


def _memory(spec: MachineSpec, room: Headroom) -> tuple[str, ...]:
    """RAM, and room in the address space for the layers that appear as memory devices and for more RAM."""
    ram = memory_bytes(spec.machine.resources)
    layers = sum(
        -(-layer.size_bytes // _PMEM_ALIGNMENT_BYTES) * _PMEM_ALIGNMENT_BYTES + _PMEM_ALIGNMENT_BYTES
        for layer in spec.layers
    )
    slots, most = MEMORY_SLOTS + len(spec.layers), ram + layers + room.memory_bytes
    return ("-m", f"size={ram // _MIB}M,slots={slots},maxmem={most // _MIB}M")


def _monitor(wiring: Wiring) -> tuple[str, ...]:
    return (
        *("-chardev", f"socket,id=monitor,fd={wiring.monitor},server=on,wait=off"),
        *("-mon", "chardev=monitor,mode=control"),
    )


def _console(wiring: Wiring) -> tuple[str, ...]:
    """QEMU itself appends what the guest says to the log, whether someone is attached or not."""
    log = f"logfile=/dev/fdset/{wiring.log},logappend=on"
    return (
        *("-add-fd", f"fd={wiring.log},set={wiring.log}"),
        *("-chardev", f"socket,id=console,fd={wiring.console},server=on,wait=off,{log}"),
        *("-serial", "chardev:console"),
    )


def _ports(wiring: Wiring) -> tuple[str, ...]:
    def socket_port(name: str, port: str, fd: int) -> tuple[str, ...]:
        return (
            *("-chardev", f"socket,id={name},fd={fd},server=on,wait=off"),
            *("-device", f"virtserialport,chardev={name},name={port}"),
        )

    return (
        *("-device", "virtio-serial-pci"),
        *socket_port("agent", AGENT_PORT, wiring.agent),
        *socket_port("control", CONTROL_PORT, wiring.control),
        *("-add-fd", f"fd={wiring.report},set={wiring.report}"),
        *("-chardev", f"file,id=report,path=/dev/fdset/{wiring.report}"),
        *("-device", f"virtserialport,chardev=report,name={REPORT_PORT}"),
    )


def _emulated(spec: MachineSpec) -> bool:
    return spec.machine.hardware is Hardware.EMULATED


def _delta(spec: MachineSpec, wiring: Wiring) -> tuple[str, ...]:
    """QEMU's own locking is off: our flock is on the very descriptor that it holds."""
    disk = "ide-hd,bus=ide.0" if _emulated(spec) else "virtio-blk-pci"
    file = f"driver=file,node-name=delta-file,filename=/dev/fdset/{wiring.delta},locking=off,discard=unmap"
    return (
        *("-add-fd", f"fd={wiring.delta},set={wiring.delta}"),
        *("-blockdev", file),
        *("-blockdev", "driver=raw,node-name=delta,file=delta-file,discard=unmap"),
        *("-device", f"{disk},drive=delta,serial={DELTA_SERIAL}"),
    )


def _layers(spec: MachineSpec, wiring: Wiring) -> tuple[str, ...]:
    """Each layer is memory shared with the host's page cache, which the guest maps (DAX)."""
    model = "nvdimm,unarmed=on" if _emulated(spec) else "virtio-pmem-pci"
    arguments: list[str] = []
    for number, (layer, fd) in enumerate(zip(spec.layers, wiring.layers, strict=True)):
        backend = f"memory-backend-file,id=layer{number},mem-path={_path(fd)},size={layer.size_bytes}"
        arguments += ("-object", f"{backend},share=on,readonly=on")
        arguments += ("-device", f"{model},memdev=layer{number}")
    return tuple(arguments)


def _balloon(config: GuestConfig) -> tuple[str, ...]:
    """What the guest has freed goes back to the host. An attached command is soon over and is spared the device."""
    return () if config.attached else ("-device", "virtio-balloon-pci,free-page-reporting=on")


def _modules(spec: MachineSpec, wiring: Wiring) -> tuple[str, ...]:
    """A disk of old cannot be read-only, so there they are on a CD."""
    if wiring.modules is None:
        return ()
    disk = "ide-cd,bus=ide.1" if _emulated(spec) else "virtio-blk-pci"
    file = f"driver=file,node-name=modules-file,filename=/dev/fdset/{wiring.modules},read-only=on"
    return (
        *("-add-fd", f"fd={wiring.modules},set={wiring.modules}"),
        *("-blockdev", file),
        *("-blockdev", "driver=raw,node-name=modules,file=modules-file,read-only=on"),
        *("-device", f"{disk},drive=modules,serial={MODULES_SERIAL}"),
    )


def _network(link: Link, wiring: Wiring, card: str) -> tuple[str, ...]:
    match link:
        case BridgeLink() | MacvlanLink():
            backend = f"tap,id=net0,fd={wiring.tap},vhost=off"
        case UserLink():
            forwards = "".join(
                f",hostfwd={forward.protocol.value}:{forward.host_address}:{forward.host_port}-:{forward.machine_port}"
                for forward in link.forwards
            )
            backend = f"user,id=net0,ipv6=off{forwards}"
        case NoLink():
            return ()
    return ("-netdev", backend, "-device", f"{card},netdev=net0,mac={link.nic.mac},romfile=")
