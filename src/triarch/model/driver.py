"""What passes between the engine and a driver."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from triarch.model.device import Device
from triarch.model.machine import Exit, Machine
from triarch.model.network import Link, NoLink
from triarch.model.state import Status
from triarch.model.template import Template


class Kind(StrEnum):
    """The three kinds of virtualization architecture."""

    OS_LEVEL = "os-level"
    HOSTED = "hosted"
    BARE_METAL = "bare-metal"


class DriverInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of a successful probe. `capabilities` are the names of the protocols the driver has."""

    name: str
    kind: Kind
    version: str
    capabilities: tuple[str, ...] = ()


class Architecture(msgspec.Struct, frozen=True, kw_only=True):
    """One architecture as the API lists it: `reason` says why it cannot be had on this host."""

    name: str
    kind: Kind
    available: bool
    version: str = ""
    reason: str = ""
    hint: str | None = None
    capabilities: tuple[str, ...] = ()


class LayerFile(msgspec.Struct, frozen=True, kw_only=True):
    """A template layer on this host: an uncompressed EROFS image, padded to 2 MiB."""

    digest: str
    path: str
    size_bytes: int


class GuestPack(msgspec.Struct, frozen=True, kw_only=True):
    """The files that make a tree template boot as a VM; shared by all of them.

    `modules_path` is an EROFS image of the kernel's `/lib/modules/RELEASE`.
    """

    kernel_path: str
    initrd_path: str
    modules_path: str
    kernel_release: str


class ResolvedDevice(msgspec.Struct, frozen=True, kw_only=True):
    """A device with what the engine found for it.

    `path` is the file of a volume, the block device or image of a disk, the directory of a folder, the node of a host
    or USB device; `link` is how a `nic` is plugged in.
    """

    name: str
    device: Device
    path: str = ""
    link: Link = NoLink()


class MachineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a driver needs to run one machine, resolved by the engine: a driver looks nothing up.

    `layers` are lowest first. `delta_path` is a raw ext4 image with `/upper` and `/work`.
    `run_dir` is the driver's own for this machine (on a tmpfs, mode 0700); it may hold whatever adoption needs.
    `log_path` gets the console output. `guest_pack` is None for drivers that do not boot a kernel.
    """

    machine: Machine
    template: Template
    layers: tuple[LayerFile, ...]
    delta_path: str
    link: Link
    run_dir: str
    state_dir: str
    log_path: str
    cgroup: str
    guest_pack: GuestPack | None = None
    devices: tuple[ResolvedDevice, ...] = ()

    @property
    def uuid(self) -> str:
        return self.machine.uuid

    @property
    def command(self) -> tuple[str, ...]:
        """What an `app` machine runs."""
        return self.machine.command or self.template.command


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """What the host says of one machine now. `exit` is there once a run has ended.

    `failed` marks an end that nobody asked for (a hypervisor or an init that was killed or crashed).
    """

    uuid: str
    status: Status
    pid: int | None = None
    exit: Exit | None = None
    failed: bool = False
    detail: str = ""


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What a running machine uses. `memory_bytes` is charged to it alone; `processes` are those inside, if known.

    `disk_bytes` is what its delta and volumes take on disk; the engine adds it to what the driver tells. What was read,
    written, received and sent counts from the start of the run; None where nobody counts it.
    """

    cpu_seconds: float
    memory_bytes: int
    memory_limit_bytes: int | None = None
    swap_bytes: int | None = None
    processes: int | None = None
    disk_bytes: int | None = None
    disk_read_bytes: int | None = None
    disk_written_bytes: int | None = None
    network_received_bytes: int | None = None
    network_sent_bytes: int | None = None


class ExecRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A command for a running machine, or, with `login` and no command, the login shell of its user.

    `user` is `NAME|UID[:GROUP|GID]`: names, supplementary groups, HOME, USER and SHELL are what the machine's own
    passwd and group say. Without a `directory` a command runs in `/` and a login shell at home. With `terminal` stdout
    and stderr are one stream. After `timeout_seconds` the whole session gets SIGTERM, `TIMEOUT_GRACE_SECONDS` later
    SIGKILL, and the exit code is `TIMED_OUT_CODE`, as timeout(1) has it.
    """

    command: tuple[str, ...] = ()
    login: bool = False
    terminal: bool = False
    columns: int = 80
    rows: int = 24
    user: str = "0"
    directory: str | None = None
    environment: dict[str, str] = {}
    timeout_seconds: float | None = None


TIMED_OUT_CODE = 124
TIMEOUT_GRACE_SECONDS = 5.0
# The refusal of a shell: there is such a command, or such a user, but not for this request.
NOT_EXECUTABLE_CODE = 126


class Stream(StrEnum):
    STDOUT = "stdout"
    STDERR = "stderr"


class Data(msgspec.Struct, frozen=True):
    """Bytes for standard input."""

    data: bytes


class Resize(msgspec.Struct, frozen=True):
    """The terminal has another size now."""

    columns: int
    rows: int


class EndOfInput(msgspec.Struct, frozen=True):
    """Standard input ended."""


Input = Data | Resize | EndOfInput
