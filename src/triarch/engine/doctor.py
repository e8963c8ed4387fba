"""`doctor`: every prerequisite and every architecture of this host, each with its fix.

FAIL is what Triarch promises on every host and cannot do on this one: `needed_for` names the part that is lost. WARN is
what not every host has (KVM, Xen), or what works less well than it could. A check that breaks or does not answer in
its time is a FAIL of its own and never the end of the others.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import threading
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

from triarch.drivers.base import Driver
from triarch.errors import Error, MissingProgram
from triarch.host import facts, iptables, nft, sysctl
from triarch.host.cgroup import cgroup_trees
from triarch.host.lxcfs import own_view
from triarch.host.process import PACKAGES, find_program
from triarch.host.rights import rights
from triarch.model.instance import Instance
from triarch.model.request import Check, CheckStatus
from triarch.model.resources import format_size
from triarch.network.bridges import FORWARDING
from triarch.network.host import HostNetworks

log = logging.getLogger(__name__)

PASS, WARN, FAIL = CheckStatus.PASS, CheckStatus.WARN, CheckStatus.FAIL

CHECK_SECONDS = 10.0
PROBE_SECONDS = 60.0  # a probe runs a real machine for a moment, under emulation where there is nothing else

CONTAINERS = "containers"
VMS = "hosted and kvm machines"
NAT = "network 'nat'"
TEMPLATES = "template build and import"
EVERYTHING = "every machine"

PROMISED_ARCHITECTURES = frozenset({"container", "hosted"})
SECCOMP_PROFILE = Path("/usr/share/containers/seccomp.json")
SECCOMP_PACKAGE = "golang-github-containers-common"
_IDMAPPED_OVERLAY = (5, 19)
_SCARCE_BYTES, _NONE_BYTES = 5 << 30, 512 << 20
_V2_CONTROLLERS = ("cpu", "io", "memory", "pids")
_V1_CONTROLLERS = ("cpu", "cpuset", "devices", "freezer", "memory", "pids")

_PROGRAM_USERS = {
    "cc": VMS,
    "bzip2": TEMPLATES,
    "conmon": CONTAINERS,
    "cpio": VMS,
    "crun": CONTAINERS,
    "debugfs": "deltas",
    "dnsmasq": NAT,
    "dpkg-deb": VMS,
    "dumpe2fs": "deltas",
    "e2fsck": "deltas",
    "fakechroot": f"{TEMPLATES} without root",
    "fakeroot": TEMPLATES,
    "fsck.erofs": TEMPLATES,
    "gzip": TEMPLATES,
    "ip": "looking at networks",
    "lz4": VMS,
    "mkfs.erofs": TEMPLATES,
    "mkfs.ext4": "deltas",
    "mmdebstrap": "template build",
    "modprobe": "loading kernel modules",
    "nft": NAT,
    "qemu-img": VMS,
    "qemu-system-x86_64": VMS,
    "tar": TEMPLATES,
    "xz": TEMPLATES,
    "zstd": TEMPLATES,
}
_SYSTEM_FILES = {
    "/proc/self/status": "mount -t proc proc /proc",
    "/sys/kernel": "mount -t sysfs sysfs /sys",
    "/dev/null": "mount -t devtmpfs devtmpfs /dev",
}
_LEAST_VERSIONS = {"dnsmasq": "2.88"}  # the first that forgets names whose file is gone
_OPTIONAL_PROGRAMS = frozenset({"ip", "modprobe"})

T = TypeVar("T")
HostCheck = Callable[[Instance], Check]


async def run_checks(instance: Instance, drivers: Mapping[str, Driver]) -> tuple[Check, ...]:
    """All checks, in the order in which people should read them. Never raises, and ends in bounded time."""
    host = [
        _bounded(name, needed_for, CHECK_SECONDS, _in_thread(partial(check, instance)))
        for name, needed_for, check in _HOST_CHECKS
    ]
    namespaces = _bounded("user namespaces", CONTAINERS, 2 * CHECK_SECONDS, _user_namespaces())
    programs = [
        _bounded(f"program {name}", _PROGRAM_USERS.get(name, ""), 2 * CHECK_SECONDS, _program(name))
        for name in sorted(PACKAGES)
    ]
    architectures = [
        _bounded(f"architecture {name}", name, PROBE_SECONDS, _architecture(name, driver))
        for name, driver in drivers.items()
    ]
    return tuple(await asyncio.gather(*host, namespaces, *programs, *architectures))


async def _bounded(name: str, needed_for: str, seconds: float, work: Awaitable[Check]) -> Check:
    try:
        return await asyncio.wait_for(work, seconds)
    except TimeoutError:
        return Check(name=name, status=FAIL, detail=f"no answer in {seconds:g} seconds", needed_for=needed_for)
    except Error as error:
        return Check(name=name, status=FAIL, detail=error.message, fix=error.hint, needed_for=needed_for)
    except OSError as error:
        detail = f"{error.filename or 'the system'}: {(error.strerror or str(error)).lower()}"
        return Check(name=name, status=FAIL, detail=detail, needed_for=needed_for)
    except Exception as error:
        log.exception("the check '%s' broke", name)
        return Check(name=name, status=FAIL, detail=f"the check itself broke: {error}", needed_for=needed_for)


async def _in_thread(function: Callable[[], T]) -> T:
    """As `asyncio.to_thread`, in a thread that nobody waits for at the end: a dead NFS server may hold it."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(setter: Callable[[], None]) -> None:
        if not future.done():
            setter()

    def body() -> None:
        try:
            setter = partial(future.set_result, function())
        except Exception as error:  # noqa: BLE001 - handed over
            setter = partial(future.set_exception, error)
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, setter)

    threading.Thread(target=body, daemon=True, name="doctor").start()
    return await future


# -- the host


def _system_files(_: Instance) -> Check:
    """What every other check takes for granted."""
    name = "system files"
    for path, fix in _SYSTEM_FILES.items():
        if not Path(path).exists():
            return Check(name=name, status=FAIL, detail=f"{path} is not there", fix=fix, needed_for=EVERYTHING)
    return Check(name=name, status=PASS, detail="/proc, /sys and /dev are there", needed_for=EVERYTHING)


def _kernel(_: Instance) -> Check:
    version = facts.kernel_version()
    release = os.uname().release
    if version >= _IDMAPPED_OVERLAY:
        detail = f"{release} on {os.uname().machine}; idmapped mounts under overlayfs came with 5.19"
        return Check(name="kernel", status=PASS, detail=detail, needed_for=CONTAINERS)
    return Check(
        name="kernel",
        status=FAIL,
        detail=f"{release}: overlayfs on idmapped mounts needs 5.19",
        fix="install a newer kernel (Debian 12 has 6.1) and reboot",
        needed_for=CONTAINERS,
    )


def _rights(_: Instance) -> Check:
    name, needed_for = "rights", f"{CONTAINERS}, {NAT}"
    obstacle = rights().obstacle
    if obstacle is None:
        return Check(name=name, status=PASS, detail="root, with all that it takes", needed_for=needed_for)
    detail = f"{obstacle.reason}: only hosted machines with network 'user' run"
    return Check(name=name, status=FAIL, detail=detail, fix=obstacle.remedy, needed_for=needed_for)


def _filesystem(kind: str, needed_for: str, _: Instance) -> Check:
    name = f"filesystem {kind}"
    if facts.knows_filesystem(kind):
        return Check(name=name, status=PASS, detail="the kernel has it", needed_for=needed_for)
    return Check(
        name=name,
        status=FAIL,
        detail=f"kernel {os.uname().release} has no {kind}, nor a module of it",
        fix=f"modprobe {kind}",
        needed_for=needed_for,
    )


def _loop_devices(_: Instance) -> Check:
    reason = facts.open_error("/dev/loop-control")
    if reason is None:
        return Check(name="loop devices", status=PASS, detail="/dev/loop-control opens", needed_for=CONTAINERS)
    fix = "modprobe loop" if not Path("/dev/loop-control").exists() else "run triarch as root"
    detail = f"/dev/loop-control: {reason}"
    return Check(name="loop devices", status=FAIL, detail=detail, fix=fix, needed_for=CONTAINERS)


async def _user_namespaces() -> Check:
    reason = await facts.user_namespace_error(CHECK_SECONDS)
    if reason is None:
        return Check(name="user namespaces", status=PASS, detail="one was made and left", needed_for=CONTAINERS)
    blockers = {
        "user.max_user_namespaces": ("0", "15000"),
        "kernel.unprivileged_userns_clone": ("0", "1"),
        "kernel.apparmor_restrict_unprivileged_userns": ("1", "0"),
    }
    fix = "run triarch outside of this container, or allow unshare(2) in its seccomp profile"
    for setting, (bad, good) in blockers.items():
        if sysctl.read(setting) == bad:
            fix = f"sysctl -w {setting}={good}"
            break
    return Check(name="user namespaces", status=FAIL, detail=reason, fix=fix, needed_for=CONTAINERS)


def _control_groups(_: Instance) -> Check:
    name = "control groups"
    trees = cgroup_trees()
    wanted = _V2_CONTROLLERS if trees.version == 2 else _V1_CONTROLLERS
    layout = "version 2" if trees.version == 2 else "version 1" if trees.hybrid_root is None else "hybrid"
    read_only = [root for root in trees.roots if not os.access(root, os.W_OK)]
    if read_only:
        return Check(
            name=name,
            status=FAIL,
            detail=f"{layout}, but {read_only[0]} cannot be written",
            fix="run triarch as root, outside of a container",
            needed_for=CONTAINERS,
        )
    if missing := [controller for controller in wanted if controller not in trees.controllers]:
        return Check(
            name=name,
            status=WARN,
            detail=f"{layout}, without {', '.join(missing)}: such limits are not enforced",
            fix=f"boot with cgroup_enable={missing[0]}",
            needed_for="limits",
        )
    return Check(name=name, status=PASS, detail=f"{layout}, every controller is there", needed_for=CONTAINERS)


def _seccomp(_: Instance) -> Check:
    if os.access(SECCOMP_PROFILE, os.R_OK):
        return Check(name="seccomp profile", status=PASS, detail=str(SECCOMP_PROFILE), needed_for=CONTAINERS)
    return Check(
        name="seccomp profile",
        status=FAIL,
        detail=f"{SECCOMP_PROFILE} is not there",
        fix=f"apt-get install {SECCOMP_PACKAGE}",
        needed_for=CONTAINERS,
    )


def _own_view(_: Instance) -> Check:
    """Containers run without it: they then see the host's memory and processors, whatever their limits are."""
    name = "lxcfs"
    if own_view():
        return Check(name=name, status=PASS, detail="containers see their own limits in /proc", needed_for="limits")
    return Check(
        name=name,
        status=WARN,
        detail="not mounted: containers see the memory and processors of the host in /proc",
        fix="apt-get install lxcfs",
        needed_for="limits",
    )


def _rcu(_: Instance) -> Check:
    """Never worse than PASS: it is host-wide and costs others time, so it is the operator's choice."""
    switch = Path("/sys/kernel/rcu_expedited")
    try:
        expedited = switch.read_text().strip() != "0"
    except OSError:
        detail = "this kernel does not tell"
    else:
        detail = "on" if expedited else f"off; container starts get some 12 ms faster with: echo 1 > {switch}"
    return Check(name="expedited rcu", status=PASS, detail=detail, needed_for="speed")


def _kvm_device(_: Instance) -> Check:
    name = "device /dev/kvm"
    try:
        version = facts.kvm_api_version()
    except FileNotFoundError:
        detail, fix = "not there: machines run under emulation", "turn on virtualization in the firmware; modprobe kvm"
    except PermissionError:
        detail, fix = "permission denied: machines run under emulation", "adduser $USER kvm, and log in again"
    except OSError as error:
        detail, fix = f"{(error.strerror or str(error)).lower()}: machines run under emulation", "modprobe kvm"
    else:
        if version == facts.KVM_API_VERSION:
            detail = f"opens, API version {version}; whether guests run is for 'architecture kvm' to say"
            return Check(name=name, status=PASS, detail=detail, needed_for="kvm machines")
        detail, fix = f"API version {version}, needed is {facts.KVM_API_VERSION}", "install a newer kernel"
    return Check(name=name, status=WARN, detail=detail, fix=fix, needed_for="kvm machines")


def _xen(_: Instance) -> Check:
    role = facts.xen_role()
    if role == "dom0":
        return Check(name="xen", status=PASS, detail="this is Dom0", needed_for="xen machines")
    detail = "this is a Xen guest, not Dom0" if role else "this host does not run on Xen"
    fix = "apt-get install xen-system-amd64, and reboot into Xen"
    return Check(name="xen", status=WARN, detail=detail, fix=None if role else fix, needed_for="xen machines")


def _tap_device(_: Instance) -> Check:
    reason = facts.open_error("/dev/net/tun")
    needed_for = f"{VMS} on {NAT}"
    if reason is None:
        return Check(name="device /dev/net/tun", status=PASS, detail="opens", needed_for=needed_for)
    fix = "modprobe tun" if not Path("/dev/net/tun").exists() else "run triarch as root"
    return Check(name="device /dev/net/tun", status=FAIL, detail=reason, fix=fix, needed_for=needed_for)


def _bridge(instance: Instance) -> Check:
    HostNetworks(instance).probe()
    return Check(name="nat network", status=PASS, detail="a bridge could be made", needed_for=NAT)


def _forwarding(_: Instance) -> Check:
    value = sysctl.read(FORWARDING)
    if value == "1":
        return Check(name="ipv4 forwarding", status=PASS, detail="on", needed_for=NAT)
    if sysctl.can_be(FORWARDING, "1"):
        detail = "off; it is turned on when the first machine needs it"
        return Check(name="ipv4 forwarding", status=PASS, detail=detail, needed_for=NAT)
    return Check(
        name="ipv4 forwarding",
        status=FAIL,
        detail="off, and cannot be turned on from here" if value == "0" else "this kernel does not tell",
        fix=f"sysctl -w {FORWARDING}=1",
        needed_for=NAT,
    )


def _firewall(instance: Instance) -> Check:
    """Rules of the host's own that would stop machines although our table lets them through."""
    name = "firewall"
    if not rights().networks:
        return Check(
            name=name, status=WARN, detail="only root of the host may look", fix="run triarch as root", needed_for=NAT
        )
    # The table of iptables is looked after: our rules are put into its chains.
    tables = [table for table in nft.foreign_tables_that_drop("triarch_") if table != "ip filter"]
    if tables:
        known = any(table.endswith("firewalld") for table in tables)
        return Check(
            name=name,
            status=WARN,
            detail=f"nftables {', '.join(tables)} may drop what machines send",
            fix=f"firewall-cmd --permanent --zone=trusted --add-interface={instance.bridge} && firewall-cmd --reload"
            if known
            else f"accept iifname and oifname {instance.bridge} in table {tables[0]}",
            needed_for=NAT,
        )
    chains = iptables.dropping_chains()
    detail = f"iptables {' and '.join(chains)} drop by default; machines are let through" if chains else "nothing drops"
    return Check(name=name, status=PASS, detail=detail, needed_for=NAT)


def _disk(instance: Instance) -> Check:
    name = "disk"
    space = facts.space_at(instance.state_dir)
    detail = f"{format_size(space.free_bytes)} free of {format_size(space.total_bytes)} at {instance.state_dir}"
    if not space.writable:
        fix = "run triarch as root, or choose another directory with --root DIR"
        return Check(name=name, status=FAIL, detail=f"{space.path} cannot be written", fix=fix, needed_for=EVERYTHING)
    if space.free_bytes >= _SCARCE_BYTES:
        return Check(name=name, status=PASS, detail=detail, needed_for=EVERYTHING)
    status = FAIL if space.free_bytes < _NONE_BYTES else WARN
    fix = f"free some space, or choose another directory with --root DIR ({format_size(_SCARCE_BYTES)} is comfortable)"
    return Check(name=name, status=status, detail=detail, fix=fix, needed_for=EVERYTHING)


# -- programs and architectures


async def _program(name: str) -> Check:
    needed_for = _PROGRAM_USERS.get(name, "")
    try:
        path = find_program(name)
    except MissingProgram as error:
        status = WARN if name in _OPTIONAL_PROGRAMS else FAIL
        return Check(
            name=f"program {name}", status=status, detail="not installed", fix=error.hint, needed_for=needed_for
        )
    version = await facts.program_version(name, CHECK_SECONDS)
    origin = f"{path}, package {PACKAGES[name]}"
    detail = f"{version} ({origin})" if version else origin
    least = _LEAST_VERSIONS.get(name)
    if version and least and _numbers(version) < _numbers(least):
        return Check(
            name=f"program {name}",
            status=FAIL,
            detail=f"{detail}: needed is {least}",
            fix=f"install a newer {PACKAGES[name]} (Debian 12 has one)",
            needed_for=needed_for,
        )
    return Check(name=f"program {name}", status=PASS, detail=detail, needed_for=needed_for)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:3])


async def _architecture(name: str, driver: Driver) -> Check:
    try:
        info = await driver.probe()
    except Error as error:
        status = FAIL if name in PROMISED_ARCHITECTURES else WARN
        return Check(name=f"architecture {name}", status=status, detail=error.message, fix=error.hint, needed_for=name)
    return Check(
        name=f"architecture {name}",
        status=PASS,
        detail=f"{info.kind.value}, {info.version}: {', '.join(info.capabilities) or 'no capabilities'}",
        needed_for=name,
    )


_HOST_CHECKS: tuple[tuple[str, str, HostCheck], ...] = (
    ("system files", EVERYTHING, _system_files),
    ("kernel", CONTAINERS, _kernel),
    ("rights", CONTAINERS, _rights),
    ("filesystem overlay", CONTAINERS, partial(_filesystem, "overlay", CONTAINERS)),
    ("filesystem erofs", CONTAINERS, partial(_filesystem, "erofs", CONTAINERS)),
    ("filesystem ext4", CONTAINERS, partial(_filesystem, "ext4", CONTAINERS)),
    ("loop devices", CONTAINERS, _loop_devices),
    ("control groups", CONTAINERS, _control_groups),
    ("seccomp profile", CONTAINERS, _seccomp),
    ("lxcfs", "limits", _own_view),
    ("expedited rcu", "speed", _rcu),
    ("device /dev/kvm", "kvm machines", _kvm_device),
    ("xen", "xen machines", _xen),
    ("device /dev/net/tun", VMS, _tap_device),
    ("nat network", NAT, _bridge),
    ("ipv4 forwarding", NAT, _forwarding),
    ("firewall", NAT, _firewall),
    ("disk", EVERYTHING, _disk),
)
