"""What the host and the guest's init agree on: names, the configuration file, and the control port's frames.

`init/protocol.h` is the same page for the C side; a test compares the two.

How a VM must be wired for this guest (the driver writes the command line):

- kernel and initrd of the guest pack, `kernel_command_line(config)`, serial port 1 as console;
- one `-fw_cfg name=FW_CFG_KEY` with `encode_config(config)`;
- a `modules` guest has the pack's modules as a read-only virtio-blk disk with serial `MODULES_SERIAL`;
- layers in the order of `GuestConfig.layers`: a `pmem` layer is the next `virtio-pmem-pci` device (in PCI order), a
  `block` layer a read-only virtio-blk disk with serial `layer_serial(index)`; the delta is a virtio-blk disk with
  serial `DELTA_SERIAL`;
- one `virtio-serial-pci` with `virtserialport`s named `AGENT_PORT`, `CONTROL_PORT` and `REPORT_PORT`;
- network cards, if any, are virtio-net ones: the first is `eth0`, further ones are known by their MAC (`GuestCard`);
- a virtio-balloon device with free page reporting, if any: an `attached` guest, which is soon over, heeds none.

The control port carries frames: one type byte, the payload's length as 4 bytes (big endian), the payload.

    host → guest   STDIN data · END_OF_INPUT · RESIZE columns:u16 rows:u16 · STOP
                   ADAPT processors:u32
    guest → host   READY · STDOUT data · STDERR data · CREDIT bytes:u32 · EXIT code:u32 reason · PROBLEM text
                   ADAPTED processors:u32 errno:u32 delta_bytes:u64 memory_bytes:u64

Only an `attached` guest uses the stdio frames. The host may send `STDIN_WINDOW_BYTES` of input ahead; CREDIT says how
many of them the command took, so that input nobody reads never holds up STOP. READY, EXIT and PROBLEM go to the
report port and then to the control port, if someone listens there: give the former a file, and an exit code outlives
the daemon. READY says that the command or the template's init is about to run, EXIT how an `app` command ended,
PROBLEM why the guest gave up. ADAPT has the guest use that many processors (0: those it uses) and all room on the
delta's disk; ADAPTED says, on the control port, what it has then, and the errno with which the filesystem did not
grow, if any.
"""

from __future__ import annotations

import re
import struct
from enum import IntEnum, StrEnum
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface

import msgspec

from triarch.errors import Damaged, Invalid
from triarch.model.driver import Data, EndOfInput, Resize, Stream
from triarch.model.machine import Exit
from triarch.model.names import check_machine_name
from triarch.model.template import Init

AGENT_PORT = "triarch.agent"
CONTROL_PORT = "triarch.control"
REPORT_PORT = "triarch.report"
FW_CFG_KEY = "opt/triarch/config"
DELTA_SERIAL = "delta"
MODULES_SERIAL = "modules"
MAX_LAYERS = 32
MAX_CONFIG_BYTES = 64 << 10
MAX_RECORDS = 4096
MAX_FRAME_BYTES = 64 << 10
STDIN_WINDOW_BYTES = 64 << 10
_MAX_TEXT = 500
_HEADER = struct.Struct(">BI")
_SIZE = struct.Struct(">HH")
_COUNT = struct.Struct(">I")
_ADAPTED = struct.Struct(">IIQQ")
_CARD_NAME = re.compile(r"[a-z][a-z0-9]{0,14}\Z")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}\Z")
_DOMAIN = re.compile(r"[a-z0-9]([a-z0-9.-]{0,62}[a-z0-9])?\Z")

# panic=-1 with QEMU's -no-reboot ends the VM at once; swiotlb=noforce gives back the 64 MiB that maxmem would cost.
# noreplace-smp spares patching the whole kernel for one processor, which translated code pays for and never earns back;
# cryptomgr.notests=1 spares a quarter of a second of self-tests. Auditing and the trace files (9 MiB of entries in
# tracefs) are spared too: a container has neither. Free memory goes back to the host by 64 KiB (2 to the fourth pages).
# Memory that is plugged in is used at once.
_KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet panic=-1 reboot=t tsc=reliable no_timer_check mitigations=off net.ifnames=0 "
    "random.trust_cpu=on swiotlb=noforce noreplace-smp cryptomgr.notests=1 audit=0 "
    "initcall_blacklist=tracer_init_tracefs page_reporting.page_reporting_order=4 memhp_default_state=online"
)

# What a VM without hardware of its own does not need. Everything here is also absent in a container.
_MASKED_UNITS = (
    "apt-daily-upgrade.timer",
    "apt-daily.timer",
    "dev-hugepages.mount",
    "dev-mqueue.mount",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "getty@tty1.service",
    "kmod-static-nodes.service",
    "modprobe@configfs.service",
    "modprobe@dm_mod.service",
    "modprobe@drm.service",
    "modprobe@efi_pstore.service",
    "modprobe@fuse.service",
    "modprobe@loop.service",
    "networking.service",
    "serial-getty@ttyS0.service",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "systemd-journald-audit.socket",
    "systemd-journal-flush.service",
    "systemd-modules-load.service",
    "systemd-pstore.service",
    "systemd-random-seed.service",
    "systemd-remount-fs.service",
    "systemd-sysusers.service",
    "systemd-tmpfiles-setup-dev.service",
    "systemd-udev-trigger.service",
    "systemd-udevd-control.socket",
    "systemd-udevd-kernel.socket",
    "systemd-udevd.service",
    "systemd-update-utmp-runlevel.service",
    "systemd-update-utmp.service",
)

# They look for disks, for what only the kernel's arguments could ask for, and for a getty that waits for udev.
_MASKED_GENERATORS = (
    "systemd-cryptsetup-generator",
    "systemd-debug-generator",
    "systemd-getty-generator",
    "systemd-gpt-auto-generator",
    "systemd-hibernate-resume-generator",
    "systemd-integritysetup-generator",
    "systemd-run-generator",
    "systemd-veritysetup-generator",
)

# Below /run, which is neither template nor delta; what an administrator puts into /etc comes before it
# (systemd.unit(5), systemd.generator(7)). A container's getty asks on /dev/console at once.
_SYSTEMD_LINKS = (
    *((f"system/{unit}", "/dev/null") for unit in _MASKED_UNITS),
    *((f"system-generators/{generator}", "/dev/null") for generator in _MASKED_GENERATORS),
    ("system/getty.target.wants/console-getty.service", "/usr/lib/systemd/system/console-getty.service"),
)


class Medium(StrEnum):
    """How the guest gets a layer: `pmem` shares the host's page cache (DAX), `block` copies it."""

    PMEM = "pmem"
    BLOCK = "block"


class GuestNetwork(msgspec.Struct, frozen=True, kw_only=True):
    """What `eth0` gets. Addresses are in CIDR form; what is empty is left out.

    Without any address the card is raised and left to the machine's own DHCP client.
    """

    address: str
    address6: str = ""
    gateway: str = ""
    gateway6: str = ""
    nameserver: str = ""
    domain: str = ""


class GuestCard(msgspec.Struct, frozen=True, kw_only=True):
    """A further card, known by its MAC: its name in the guest and its addresses in CIDR form, or empty ones."""

    name: str
    mac: str
    address: str = ""
    address6: str = ""


class GuestConfig(msgspec.Struct, frozen=True, kw_only=True):
    """All that one start of a guest must know. `layers` are lowest first.

    `host_key` (in dropbear's format) and `authorized_key` come from `guest.keys`. `command` is for `app` guests only.
    `attached` connects the command's input and output to the control port, to a pseudo-terminal of size `terminal`
    if that is given; else its output goes to the console and its input is empty. `modules`: the kernel's modules are
    there too, for whatever the machine itself wants loaded. `devices` are rows of `guest.devices`.
    `emulated`: drivers for the hardware of real machines are loaded.
    """

    hostname: str
    init: Init
    layers: tuple[Medium, ...]
    host_key: bytes
    authorized_key: str
    command: tuple[str, ...] = ()
    environment: dict[str, str] = {}
    network: GuestNetwork | None = None
    cards: tuple[GuestCard, ...] = ()
    devices: tuple[bytes, ...] = ()
    emulated: bool = False
    attached: bool = False
    terminal: Resize | None = None
    modules: bool = False


def layer_serial(index: int) -> str:
    """The serial of the virtio-blk disk that carries layer `index` (from 0, the lowest)."""
    return f"layer{index}"


def kernel_command_line(config: GuestConfig) -> str:
    """The kernel's arguments. It holds no secret: everyone in the guest can read it. Raises `Invalid`."""
    if config.init is Init.APP:
        return _KERNEL_ARGUMENTS
    return f"{_KERNEL_ARGUMENTS} systemd.hostname={check_machine_name(config.hostname)} systemd.show_status=0"


def encode_config(config: GuestConfig) -> bytes:
    """The fw_cfg file: one `key length:value` record per line, so that no value can pass for another record.

    Raises `Invalid` for what no program can be given (a NUL byte, a variable without a name) and for sizes that the
    guest does not take.
    """
    _check_config(config)
    records: list[tuple[str, bytes]] = [
        ("hostname", check_machine_name(config.hostname).encode()),
        ("init", config.init.value.encode()),
        ("hostkey", config.host_key),
        ("authorized", _text("authorized key", config.authorized_key)),
        *(("layer", medium.value.encode()) for medium in config.layers),
        *(("argv", _text("command", part)) for part in config.command),
        *(("env", _variable(name, value)) for name, value in config.environment.items()),
        *_network_records(config.network),
        *(("card", encode_card(card)) for card in config.cards),
        *(("device", row) for row in config.devices),
    ]
    if config.init is Init.SYSTEM:
        records += (("link", f"{name} {target}".encode()) for name, target in _SYSTEMD_LINKS)
    if config.modules:
        records.append(("modules", b"1"))
    if config.attached:
        records.append(("attached", b"1"))
    if config.emulated:
        records.append(("emulated", b"1"))
    if config.terminal is not None:
        records.append(("columns", b"%d" % config.terminal.columns))
        records.append(("rows", b"%d" % config.terminal.rows))
    encoded = b"".join(b"%s %d:%s\n" % (key.encode(), len(value), value) for key, value in records)
    if len(encoded) > MAX_CONFIG_BYTES or len(records) > MAX_RECORDS:
        raise Invalid(
            f"the command and environment of machine '{config.hostname}' take {len(encoded)} bytes "
            f"in {len(records)} parts; a VM takes at most {MAX_CONFIG_BYTES} bytes in {MAX_RECORDS} parts"
        )
    return encoded


def _check_config(config: GuestConfig) -> None:
    if not 1 <= len(config.layers) <= MAX_LAYERS:
        raise Invalid(f"machine '{config.hostname}' has {len(config.layers)} layers; a VM needs 1 to {MAX_LAYERS}")
    if config.init is Init.APP and not config.command:
        raise Invalid(f"machine '{config.hostname}' has no command; an app machine needs one")
    if config.terminal is not None and not (
        0 < config.terminal.columns < 1 << 16 and 0 < config.terminal.rows < 1 << 16
    ):
        raise Invalid(f"illegal terminal size {config.terminal.columns}x{config.terminal.rows}: it needs 1 to 65535")


def _network_records(network: GuestNetwork | None) -> list[tuple[str, bytes]]:
    if network is None:
        return []
    records = [("network", b"1")]
    if network.address:
        interface = IPv4Interface(network.address)
        records += [("address", str(interface.ip).encode()), ("netmask", str(interface.netmask).encode())]
    if network.address6:
        records.append(("address6", str(IPv6Interface(network.address6)).encode()))
    if network.gateway:
        records.append(("gateway", str(IPv4Address(network.gateway)).encode()))
    if network.gateway6:
        records.append(("gateway6", str(IPv6Address(network.gateway6)).encode()))
    if network.nameserver:
        records.append(("nameserver", str(IPv4Address(network.nameserver)).encode()))
    if network.domain:
        if not _DOMAIN.match(network.domain):
            raise Invalid(f"illegal domain {network.domain!r}: it needs letters, digits, dots and hyphens")
        records.append(("domain", network.domain.encode()))
    return records


def encode_card(card: GuestCard) -> bytes:
    """`NAME MAC ADDRESS NETMASK ADDRESS6`, with `-` for what there is not."""
    if not _CARD_NAME.match(card.name) or not _MAC.match(card.mac):
        raise Invalid(f"illegal network card {card.name!r} with hardware address {card.mac!r}")
    v4 = IPv4Interface(card.address) if card.address else None
    address, netmask = ("-", "-") if v4 is None else (str(v4.ip), str(v4.netmask))
    address6 = str(IPv6Interface(card.address6)) if card.address6 else "-"
    return f"{card.name} {card.mac} {address} {netmask} {address6}".encode()


def _text(what: str, value: str) -> bytes:
    if "\0" in value:
        raise Invalid(f"the {what} has a NUL character; no program can be given that")
    return value.encode(errors="surrogateescape")


def _variable(name: str, value: str) -> bytes:
    if not name or "=" in name:
        raise Invalid(f"illegal variable name {name!r}: it needs at least one character and no '='")
    return _text("environment", f"{name}={value}")


class FrameType(IntEnum):
    """The first byte of a frame."""

    STDIN = 1
    END_OF_INPUT = 2
    RESIZE = 3
    STOP = 4
    ADAPT = 8
    READY = 16
    STDOUT = 17
    STDERR = 18
    CREDIT = 19
    EXIT = 20
    PROBLEM = 21
    ADAPTED = 24


class Stop(msgspec.Struct, frozen=True):
    """End in an orderly way: SIGTERM to an `app`'s command, a shutdown of a `system` machine."""


class Adapt(msgspec.Struct, frozen=True):
    """Use that many processors, 0 for those in use, and all room on the delta's disk."""

    processors: int = 0


class Ready(msgspec.Struct, frozen=True):
    """The command, or the template's init, is about to run."""


class Output(msgspec.Struct, frozen=True):
    """Output of an attached command."""

    stream: Stream
    data: bytes


class Credit(msgspec.Struct, frozen=True):
    """The command took this much of its input: as much more may be sent."""

    size_bytes: int


class Ended(msgspec.Struct, frozen=True):
    """The `app` command ended and everything is put away; the VM powers off."""

    exit: Exit


class GuestProblem(msgspec.Struct, frozen=True):
    """The guest could not start the machine, in its own words (one printable line); the VM powers off."""

    text: str


class Adapted(msgspec.Struct, frozen=True):
    """What the guest has after `Adapt`; `error` is an errno of growing the filesystem, 0 for none."""

    processors: int
    error: int
    delta_bytes: int
    memory_bytes: int


HostMessage = Data | EndOfInput | Resize | Stop | Adapt
GuestMessage = Ready | Output | Credit | Ended | GuestProblem | Adapted


def encode_message(message: HostMessage) -> bytes:
    """Frames for the control port. `Data` longer than a frame becomes several."""
    match message:
        case Data(data):
            pieces = range(0, len(data), MAX_FRAME_BYTES)
            return b"".join(_frame(FrameType.STDIN, data[at : at + MAX_FRAME_BYTES]) for at in pieces)
        case EndOfInput():
            return _frame(FrameType.END_OF_INPUT, b"")
        case Resize(columns, rows):
            return _frame(FrameType.RESIZE, _SIZE.pack(*(min(max(size, 0), 0xFFFF) for size in (columns, rows))))
        case Stop():
            return _frame(FrameType.STOP, b"")
        case Adapt(processors):
            return _frame(FrameType.ADAPT, _COUNT.pack(processors))


def _frame(kind: FrameType, payload: bytes) -> bytes:
    return _HEADER.pack(kind, len(payload)) + payload


class GuestDecoder:
    """Turns bytes of the control or report port into messages, piece by piece.

    What a guest sends is hostile input: the decoder never holds more than one frame, and raises `Damaged` at the first
    byte that breaks the protocol; from then on it must not be fed.
    """

    def __init__(self) -> None:
        self._pending = bytearray()

    def feed(self, data: bytes) -> list[GuestMessage]:
        """The messages that `data` completes, in order. Raises `Damaged`."""
        self._pending += data
        messages: list[GuestMessage] = []
        at = 0
        while len(self._pending) - at >= _HEADER.size:
            kind, length = _HEADER.unpack_from(self._pending, at)
            if length > MAX_FRAME_BYTES:
                raise Damaged(f"the guest sent a frame of {length} bytes; at most {MAX_FRAME_BYTES} are allowed")
            end = at + _HEADER.size + length
            if len(self._pending) < end:
                break
            messages.append(_message(kind, bytes(self._pending[at + _HEADER.size : end])))
            at = end
        del self._pending[:at]
        return messages


def _message(kind: int, payload: bytes) -> GuestMessage:
    match kind:
        case FrameType.READY if not payload:
            return Ready()
        case FrameType.STDOUT:
            return Output(Stream.STDOUT, payload)
        case FrameType.STDERR:
            return Output(Stream.STDERR, payload)
        case FrameType.CREDIT if len(payload) == _COUNT.size:
            return Credit(_COUNT.unpack(payload)[0])
        case FrameType.EXIT if len(payload) >= _COUNT.size and payload[:3] == b"\0\0\0":
            return Ended(Exit(code=payload[3], reason=_printable(payload[4:])))
        case FrameType.PROBLEM:
            return GuestProblem(_printable(payload))
        case FrameType.ADAPTED if len(payload) == _ADAPTED.size:
            return Adapted(*_ADAPTED.unpack(payload))
    raise Damaged(f"the guest sent a malformed frame (type {kind}, {len(payload)} bytes)")


def _printable(raw: bytes) -> str:
    text = raw[:_MAX_TEXT].decode(errors="replace")
    return "".join(c if c.isprintable() else "?" for c in text)
