"""The OCI runtime configuration of a machine: pure functions from what it is to what crun reads.

Specification: https://github.com/opencontainers/runtime-spec (config.md, config-linux.md).
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from triarch.drivers.container.seccomp import Seccomp
from triarch.host.device_rules import node_of
from triarch.model.account import Account
from triarch.model.device import DiskDevice, HostDevice, UsbDevice
from triarch.model.driver import ExecRequest, MachineSpec, Resize
from triarch.model.network import BridgeLink, MacvlanLink
from triarch.model.template import Init

SYSTEM_INIT = ("/sbin/init",)
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
SECCOMP_ANNOTATION = "run.oci.seccomp_bpf_data"

# Podman's default set (containers.conf(5), `default_capabilities`).
APP_CAPABILITIES = tuple(
    f"CAP_{name}"
    for name in [
        "CHOWN",
        "DAC_OVERRIDE",
        "FOWNER",
        "FSETID",
        "KILL",
        "NET_BIND_SERVICE",
        "SETFCAP",
        "SETGID",
        "SETPCAP",
        "SETUID",
        "SYS_CHROOT",
    ]
)
# What an init and its services expect of their own user namespace; none of it reaches beyond that.
SYSTEM_CAPABILITIES = (
    *APP_CAPABILITIES,
    *(
        f"CAP_{name}"
        for name in [
            "AUDIT_WRITE",
            "DAC_READ_SEARCH",
            "IPC_LOCK",
            "IPC_OWNER",
            "LEASE",
            "LINUX_IMMUTABLE",
            "MKNOD",
            "NET_ADMIN",
            "NET_BROADCAST",
            "NET_RAW",
            "SYS_ADMIN",
            "SYS_BOOT",
            "SYS_NICE",
            "SYS_PTRACE",
            "SYS_RESOURCE",
            "SYS_TTY_CONFIG",
        ]
    ),
)

_MASKED_PATHS = (
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/dev/block",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
    "/sys/fs/selinux",
)
_READ_ONLY_PATHS = ("/proc/asound", "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sysrq-trigger")

# null, zero, full, random, urandom, tty, console, ptmx; then every pseudo-terminal.
_DEVICES = ((1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 1), (5, 2), (136, None))


NO_VIEW: Mapping[str, str] = {}


class _Oci(msgspec.Struct, frozen=True, kw_only=True, rename="camel", omit_defaults=True):
    """Fields as OCI spells them; what is not said is not written."""


class Mount(_Oci, frozen=True, kw_only=True):
    destination: str
    type: str
    source: str
    options: tuple[str, ...]


class Namespace(_Oci, frozen=True, kw_only=True):
    type: str
    path: str | None = None


class DeviceRule(_Oci, frozen=True, kw_only=True, omit_defaults=False):
    allow: bool
    access: str = "rwm"


class AllowedDevice(DeviceRule, frozen=True, kw_only=True, omit_defaults=False):
    type: str = "c"
    major: int
    minor: int | msgspec.UnsetType = msgspec.UNSET


class Limits(_Oci, frozen=True, kw_only=True):
    """What cannot change. All other limits are set before the first process begins (`drivers.container.resize`)."""

    devices: tuple[DeviceRule, ...] = ()


class User(_Oci, frozen=True, kw_only=True):
    uid: int
    gid: int
    additional_gids: tuple[int, ...] = ()


class Capabilities(_Oci, frozen=True, kw_only=True, omit_defaults=False):
    bounding: tuple[str, ...]
    effective: tuple[str, ...]
    permitted: tuple[str, ...]
    inheritable: tuple[str, ...] = ()
    ambient: tuple[str, ...] = ()


class ConsoleSize(_Oci, frozen=True, kw_only=True):
    height: int
    width: int


class Process(_Oci, frozen=True, kw_only=True):
    """What runs: the first process of a machine, or one that `exec` adds."""

    terminal: bool
    user: User
    args: tuple[str, ...]
    env: tuple[str, ...]
    cwd: str
    capabilities: Capabilities
    console_size: ConsoleSize | None = None
    no_new_privileges: bool = False


class Root(_Oci, frozen=True, kw_only=True):
    path: str


class Linux(_Oci, frozen=True, kw_only=True):
    namespaces: tuple[Namespace, ...]
    cgroups_path: str
    resources: Limits
    masked_paths: tuple[str, ...]
    readonly_paths: tuple[str, ...]
    sysctl: dict[str, str]
    seccomp: Seccomp | None = None


class Config(_Oci, frozen=True, kw_only=True):
    """`config.json`."""

    oci_version: str
    hostname: str
    root: Root
    process: Process
    mounts: tuple[Mount, ...]
    linux: Linux
    annotations: dict[str, str] = {}


class Paths(msgspec.Struct, frozen=True, kw_only=True):
    """Where the launcher puts what the configuration refers to; `files` by name (`hosts`, …)."""

    root: str
    user_namespace: str
    network_namespace: str
    files: dict[str, str]


def capabilities(init: Init) -> tuple[str, ...]:
    return SYSTEM_CAPABILITIES if init is Init.SYSTEM else APP_CAPABILITIES


def small_files(spec: MachineSpec) -> dict[str, str]:
    """`/etc/hostname`, `/etc/hosts` and `/etc/resolv.conf` by name; they are mounted over the tree's own."""
    name = spec.machine.name
    hosts = ["127.0.0.1 localhost", "::1 localhost ip6-localhost ip6-loopback"]
    files = {"hostname": f"{name}\n"}
    link = spec.link if isinstance(spec.link, BridgeLink | MacvlanLink) else None
    own = [] if link is None else [address for address in (link.nic.ip, link.nic.ip6) if address]
    full = f"{name}.{link.domain} {name}" if link is not None and link.domain else name
    hosts += [f"{address} {full}" for address in own or ["127.0.1.1"]]
    if link is None:
        files["resolv.conf"] = "# this machine has no network\n"
    elif link.nameserver:
        search = f"search {link.domain}\n" if link.domain else ""
        files["resolv.conf"] = f"{search}nameserver {link.nameserver}\n"
    files["hosts"] = "".join(f"{line}\n" for line in hosts)
    return files


def make_config(
    spec: MachineSpec,
    paths: Paths,
    seccomp: Seccomp,
    compiled: str | None,
    terminal: Resize | None,
    *,
    device_rules: bool = True,
    view: Mapping[str, str] = NO_VIEW,
) -> Config:
    """All of `config.json`. Without `device_rules` the user namespace and `nodev` mounts alone keep devices away.
    `view` are files that tell the machine of its own limits, by what they are mounted over (`host.lxcfs`).

    `compiled` is the finished filter, if there is one; `terminal` gives an app machine one."""
    machine = spec.machine
    system = machine.init is Init.SYSTEM
    return Config(
        oci_version="1.0.0",
        hostname=machine.name,
        root=Root(path=paths.root),
        process=Process(
            terminal=system or terminal is not None,
            user=User(uid=0, gid=0),
            args=SYSTEM_INIT if system else spec.command,
            env=environment(spec, {}, terminal=system or terminal is not None),
            cwd="/",
            capabilities=_granted(capabilities(machine.init), uid=0),
            console_size=None if terminal is None else ConsoleSize(height=terminal.rows, width=terminal.columns),
        ),
        mounts=_mounts(system, paths, view),
        linux=Linux(
            namespaces=(
                *(Namespace(type=name) for name in ("pid", "ipc", "uts", "mount", "cgroup")),
                Namespace(type="user", path=paths.user_namespace),
                Namespace(type="network", path=paths.network_namespace),
            ),
            cgroups_path=spec.cgroup,
            resources=_limits(spec, device_rules),
            masked_paths=_MASKED_PATHS,
            # The kernel guards /proc/sys against other user namespaces; an init sets its own network's values there.
            readonly_paths=_READ_ONLY_PATHS if system else (*_READ_ONLY_PATHS, "/proc/sys"),
            sysctl={"net.ipv4.ping_group_range": f"0 {machine.ids.count - 1}"},
            seccomp=seccomp if compiled is None else None,
        ),
        annotations={} if compiled is None else {SECCOMP_ANNOTATION: compiled},
    )


def exec_process(spec: MachineSpec, request: ExecRequest, account: Account) -> Process:
    """The process that `crun exec --process` adds to a running machine; `account` is whom the request's user means."""
    return Process(
        terminal=request.terminal,
        user=User(uid=account.uid, gid=account.gid, additional_gids=account.groups),
        args=request.command,
        env=environment(spec, request.environment, terminal=request.terminal, account=account),
        cwd=request.directory or "/",
        capabilities=_granted(capabilities(spec.machine.init), uid=account.uid),
        console_size=ConsoleSize(height=request.rows, width=request.columns) if request.terminal else None,
    )


def environment(
    spec: MachineSpec, extra: dict[str, str], *, terminal: bool, account: Account | None = None
) -> tuple[str, ...]:
    """`NAME=VALUE`, sorted: the template's, then the machine's, then `extra` win over what everything gets."""
    values = {"PATH": PATH, "container": "oci"}
    if spec.machine.init is Init.SYSTEM:
        # systemd takes its machine id from here: the same one under every architecture.
        values["container_uuid"] = spec.uuid
    if terminal:
        values["TERM"] = "xterm"
    values |= account.environment if account is not None else {}
    values |= spec.template.environment | spec.machine.environment | extra
    return tuple(f"{name}={value}" for name, value in sorted(values.items()))


def _granted(names: tuple[str, ...], uid: int) -> Capabilities:
    held = names if uid == 0 else ()
    return Capabilities(bounding=names, effective=held, permitted=held)


def _mounts(system: bool, paths: Paths, view: Mapping[str, str]) -> tuple[Mount, ...]:
    def mount(destination: str, kind: str, *options: str) -> Mount:
        return Mount(destination=destination, type=kind, source=kind, options=("nosuid", *options))

    fixed = (
        mount("/proc", "proc", "noexec", "nodev"),
        mount("/sys", "sysfs", "noexec", "nodev", "ro"),
        mount("/dev", "tmpfs", "strictatime", "mode=755", "size=65536k"),
        mount("/dev/pts", "devpts", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"),
        mount("/dev/shm", "tmpfs", "noexec", "nodev", "mode=1777", "size=65536k"),
        mount("/dev/mqueue", "mqueue", "noexec", "nodev"),
        mount("/sys/fs/cgroup", "cgroup", "noexec", "nodev", "relatime", "rw" if system else "ro"),
    )
    of_init = (
        mount("/run", "tmpfs", "nodev", "mode=755", "size=20%"),
        mount("/run/lock", "tmpfs", "noexec", "nodev", "mode=1777", "size=5m"),
        mount("/tmp", "tmpfs", "nodev", "mode=1777", "size=50%"),
    )
    files = tuple(
        Mount(destination=f"/etc/{name}", type="bind", source=path, options=("bind", "nosuid", "nodev", "noexec"))
        for name, path in sorted(paths.files.items())
    )
    limits = tuple(
        Mount(destination=place, type="bind", source=path, options=("bind", "ro", "nosuid", "nodev", "noexec"))
        for place, path in sorted(view.items())
    )
    return (*fixed, *(of_init if system else ()), *files, *limits)


def _limits(spec: MachineSpec, device_rules: bool) -> Limits:
    allowed = tuple(
        AllowedDevice(allow=True, major=major, minor=msgspec.UNSET if minor is None else minor)
        for major, minor in _DEVICES
    )
    return Limits(devices=(DeviceRule(allow=False), *allowed, *_own_devices(spec)) if device_rules else ())


def _own_devices(spec: MachineSpec) -> tuple[AllowedDevice, ...]:
    """Those that the machine has of the host; one that the host lacks is refused when it is plugged in."""
    found = []
    for device in spec.devices:
        if isinstance(device.device, DiskDevice | HostDevice | UsbDevice) and (node := node_of(device.path)):
            read_only = isinstance(device.device, DiskDevice) and device.device.read_only
            access = "r" if read_only else "rw"
            found.append(AllowedDevice(allow=True, access=access, type=node.kind, major=node.major, minor=node.minor))
    return tuple(found)
