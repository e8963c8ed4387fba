"""What a control group may use, set when it is made and while it runs, version 1 and 2 (cgroups(7)).

Kernel: Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/{memory,blkio-controller,cpusets}.rst.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from triarch.errors import Error, Failed, InUse, Unavailable, Unsupported
from triarch.host.cgroup import V2_IO_WEIGHTS, CgroupTrees, cgroup_trees, remove
from triarch.host.facts import memory_bytes as host_memory_bytes

_PERIOD_US = 100_000
_ORDINARY_WEIGHT = 100
# cpu.shares of version 1 count from 1,024 where weights of version 2 count from 100.
_ORDINARY_SHARES, _LEAST_SHARES, _MOST_SHARES = 1024, 2, 262_144
# What a plain user and a locked-down container hear; busy is a version 2 tree whose root has processes of its own.
_REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY)
_UNLIMITED = "-1"


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a group may use; None is no limit. `cpus` counts processors, weights are relative to 100.

    `swap_bytes` comes on top of `memory_bytes`; where it is None a memory limit allows as much swap as memory. The I/O
    rates are those of the block device `device`, `MAJOR:MINOR`.
    """

    memory_bytes: int | None = None
    swap_bytes: int | None = None
    cpus: float | None = None
    cpu_weight: int | None = None
    cpu_set: str | None = None
    pids: int | None = None
    io_weight: int | None = None
    io_read_bytes_per_second: int | None = None
    io_write_bytes_per_second: int | None = None
    device: str | None = None


@dataclass(frozen=True, slots=True)
class _Control:
    """A file of a controller, what to write into it, and whether that is a limit that somebody asked for.

    `key` is the first word of the line that is meant, in a file with a line for each device.
    """

    controller: str
    file: str
    value: str
    asked: bool
    key: str | None = None


@dataclass(frozen=True, slots=True)
class _Written:
    path: Path
    before: str


def make_limited_group(path: str, limits: Limits) -> tuple[int, ...]:
    """Make the group in every tree that takes part, set its limits, and open its `cgroup.procs` files.

    A process that writes `0` to each of them is in the group. A limit whose controller the host lacks is left out.
    Raises `Unavailable` without control groups or without the right to make any, `Failed` when the kernel takes no such
    limit; then nothing is left.
    """
    trees = cgroup_trees()
    opened: list[int] = []
    try:
        for group in _make_groups(trees, path):
            opened.append(os.open(group / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC))
        for control in _controls(trees, limits):
            _write(trees, path, control)
    except OSError as error:
        for fd in opened:
            os.close(fd)
        with suppress(Error, OSError):
            remove(path)
        kind = Unavailable if error.errno in _REFUSALS else Failed
        raise kind(f"cannot make control group {path}: {error.strerror}", path=path) from error
    return tuple(opened)


def group_exists(path: str) -> bool:
    """Whether any tree has the group; False where there are no control groups."""
    try:
        trees = cgroup_trees()
    except Unavailable:
        return False
    return any((root / path.lstrip("/")).is_dir() for root in trees.roots)


def set_limits(path: str, limits: Limits, *, leave_out_missing: bool = False) -> None:
    """Make `limits`, and no others, hold for a group that exists.

    With `leave_out_missing` a limit whose controller the host lacks is left out, as when the group was made. Raises
    `Unsupported` when the host lacks what a limit needs, `InUse` when the group holds more memory than it may then
    have, `Failed` for what the kernel takes as no such limit. Whatever is raised, the limits are what they were.
    """
    trees = cgroup_trees()
    controls = _controls(trees, limits)
    for control in controls:
        if control.asked and not leave_out_missing and not _exists(trees, path, control):
            raise Unsupported(f"this host cannot limit {_MEANING[control.file]}: it has no {control.file}")
    _check_room(trees, path, limits)
    written: list[_Written] = []
    try:
        for control in controls:
            written += _write(trees, path, control)
    except OSError as error:
        for each in reversed(written):
            with suppress(OSError):
                each.path.write_text(each.before)
        what = _MEANING[control.file]
        if error.errno == errno.EBUSY:
            raise InUse(f"cannot lower the limit of {what}: more than that is in use") from error
        raise Failed(f"cannot limit {what}: the kernel refuses {control.value!r} ({error.strerror})") from error


_MEANING = {
    "memory.limit_in_bytes": "memory",
    "memory.memsw.limit_in_bytes": "swap",
    "memory.max": "memory",
    "memory.swap.max": "swap",
    "cpu.cfs_period_us": "processors",
    "cpu.cfs_quota_us": "processors",
    "cpu.max": "processors",
    "cpu.shares": "the share of processors",
    "cpu.weight": "the share of processors",
    "cpuset.cpus": "the set of processors",
    "cpuset.mems": "the set of processors",
    "pids.max": "processes",
    "blkio.bfq.weight": "the share of the disk",
    "io.weight": "the share of the disk",
    "io.bfq.weight": "the share of the disk",
    "blkio.throttle.read_bps_device": "the rate of reading",
    "blkio.throttle.write_bps_device": "the rate of writing",
    "io.max": "the rate of disk I/O",
}


def _controls(trees: CgroupTrees, limits: Limits) -> tuple[_Control, ...]:
    """What to write, in order."""
    return _v2_controls(limits) if trees.version == 2 else _v1_controls(limits)


def _v2_controls(limits: Limits) -> tuple[_Control, ...]:
    swap_bytes = swap_limit(limits)
    weight = limits.io_weight
    # Either of two files can weigh I/O; whichever there is.
    weights = (
        _Control("io", name, f"default {weight or _ORDINARY_WEIGHT}", weight is not None and number == 0)
        for number, name in enumerate(V2_IO_WEIGHTS)
    )
    return (
        _Control("memory", "memory.swap.max", _or_max(swap_bytes), limits.swap_bytes is not None),
        _Control("memory", "memory.max", _or_max(limits.memory_bytes), limits.memory_bytes is not None),
        _Control("cpu", "cpu.max", f"{_or_max(_quota_us(limits.cpus))} {_PERIOD_US}", limits.cpus is not None),
        _Control("cpu", "cpu.weight", str(limits.cpu_weight or _ORDINARY_WEIGHT), limits.cpu_weight is not None),
        # An empty set is the one of the group above.
        _Control("cpuset", "cpuset.cpus", limits.cpu_set or "\n", limits.cpu_set is not None),
        _Control("pids", "pids.max", _or_max(limits.pids), limits.pids is not None),
        *weights,
        *_v2_rates(limits),
    )


def _v2_rates(limits: Limits) -> tuple[_Control, ...]:
    if limits.device is None:
        return ()
    rates = (limits.io_read_bytes_per_second, limits.io_write_bytes_per_second)
    value = f"{limits.device} rbps={_or_max(rates[0])} wbps={_or_max(rates[1])}"
    return (_Control("io", "io.max", value, rates != (None, None), key=limits.device),)


def _v1_controls(limits: Limits) -> tuple[_Control, ...]:
    swap_bytes, memory_bytes = swap_limit(limits), limits.memory_bytes
    if swap_bytes is not None and memory_bytes is None:
        # Only the sum of both can be bounded.
        memory_bytes = host_memory_bytes()
    both = _UNLIMITED if memory_bytes is None or swap_bytes is None else str(memory_bytes + swap_bytes)
    weight, shares = limits.io_weight, (limits.cpu_weight or _ORDINARY_WEIGHT) * _ORDINARY_SHARES // _ORDINARY_WEIGHT
    return (
        # The sum may never be below the memory, on the way neither.
        _Control("memory", "memory.memsw.limit_in_bytes", _UNLIMITED, False),
        _Control(
            "memory",
            "memory.limit_in_bytes",
            _UNLIMITED if memory_bytes is None else str(memory_bytes),
            limits.memory_bytes is not None,
        ),
        _Control("memory", "memory.memsw.limit_in_bytes", both, limits.swap_bytes is not None),
        _Control("cpu", "cpu.cfs_period_us", str(_PERIOD_US), False),
        _Control(
            "cpu",
            "cpu.cfs_quota_us",
            _UNLIMITED if limits.cpus is None else str(_quota_us(limits.cpus)),
            limits.cpus is not None,
        ),
        _Control(
            "cpu", "cpu.shares", str(min(max(shares, _LEAST_SHARES), _MOST_SHARES)), limits.cpu_weight is not None
        ),
        _Control("cpuset", "cpuset.cpus", limits.cpu_set or "", limits.cpu_set is not None),
        _Control("pids", "pids.max", _or_max(limits.pids), limits.pids is not None),
        _Control("blkio", "blkio.bfq.weight", str(weight or _ORDINARY_WEIGHT), weight is not None),
        *_v1_rates(limits),
    )


def _v1_rates(limits: Limits) -> tuple[_Control, ...]:
    if limits.device is None:
        return ()
    rates = {"read": limits.io_read_bytes_per_second, "write": limits.io_write_bytes_per_second}
    return tuple(
        _Control(
            "blkio",
            f"blkio.throttle.{way}_bps_device",
            f"{limits.device} {rate or 0}",
            rate is not None,
            key=limits.device,
        )
        for way, rate in rates.items()
    )


def swap_limit(limits: Limits) -> int | None:
    """How much swap the limits allow. A memory limit alone would bound nothing where there is swap."""
    return limits.memory_bytes if limits.swap_bytes is None else limits.swap_bytes


def _or_max(value: int | None) -> str:
    return "max" if value is None else str(value)


def _quota_us(cpus: float | None) -> int | None:
    # The kernel takes nothing below a millisecond.
    return None if cpus is None else max(1000, round(cpus * _PERIOD_US))


def _group(trees: CgroupTrees, path: str, controller: str) -> Path | None:
    root = trees.roots[0] if trees.version == 2 else trees.controllers.get(controller)
    return None if root is None else root / path.lstrip("/")


def _exists(trees: CgroupTrees, path: str, control: _Control) -> bool:
    group = _group(trees, path, control.controller)
    if group is None:
        return False
    if control.file in V2_IO_WEIGHTS:
        return any((group / name).exists() for name in V2_IO_WEIGHTS)
    return (group / control.file).exists()


def _write(trees: CgroupTrees, path: str, control: _Control) -> tuple[_Written, ...]:
    """Write one file, where it is there, and tell what would undo that."""
    group = _group(trees, path, control.controller)
    if group is None or not (group / control.file).exists():
        return ()
    target = group / control.file
    value, before = control.value, target.read_text()
    if control.file == "cpuset.cpus" and not value:
        # Version 1 knows no empty set: all that the group above has.
        value = (group.parent / control.file).read_text()
    target.write_text(value)
    return (_Written(target, _restoring(control, before)),)


def _restoring(control: _Control, text: str) -> str:
    """What to write so that the file says `text` again."""
    if control.key is not None:
        unlimited = f"{control.key} rbps=max wbps=max" if control.file == "io.max" else f"{control.key} 0"
        return next((line for line in text.splitlines() if line.split(" ", 1)[0] == control.key), unlimited)
    if control.file in V2_IO_WEIGHTS:
        return text.splitlines()[0]
    return text or "\n"


def _check_room(trees: CgroupTrees, path: str, limits: Limits) -> None:
    """On version 2 a limit below what is in use is taken, and the kernel ends processes until it holds."""
    if trees.version != 2 or limits.memory_bytes is None:
        return
    group = trees.roots[0] / path.lstrip("/")
    try:
        used_bytes = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return
    reclaimable = ("inactive_file", "active_file", "slab_reclaimable")
    needed_bytes = used_bytes - sum(int(stat.get(name, 0)) for name in reclaimable)
    if needed_bytes > limits.memory_bytes + (swap_limit(limits) or 0 if _host_swaps() else 0):
        raise InUse(f"cannot lower the limit of memory: {needed_bytes >> 20} MiB are in use")


def _host_swaps() -> bool:
    try:
        return len(Path("/proc/swaps").read_text().splitlines()) > 1
    except OSError:
        return False


def _make_groups(trees: CgroupTrees, path: str) -> tuple[Path, ...]:
    """The group's directories, made, with their controllers."""
    relative = path.lstrip("/")
    if trees.version == 2:
        group = trees.roots[0] / relative
        _enable_controllers(trees, group)
        group.mkdir(parents=True, exist_ok=True)
        return (group,)
    names = ("memory", "pids", "cpu", "cpuacct", "blkio", "cpuset")
    roots = {name: trees.controllers[name] for name in names if name in trees.controllers}
    for root in roots.values():
        (root / relative).mkdir(parents=True, exist_ok=True)
    if "cpuset" in roots:
        _inherit_cpuset(roots["cpuset"], relative)
    return tuple(dict.fromkeys(root / relative for root in roots.values()))


def _inherit_cpuset(root: Path, relative: str) -> None:
    """A new group of version 1 has neither processors nor memory nodes, and takes no process before it has."""
    group = root
    for part in Path(relative).parts:
        above, group = group, group / part
        for name in ("cpuset.cpus", "cpuset.mems"):
            if not (group / name).read_text().strip():
                (group / name).write_text((above / name).read_text())


def _enable_controllers(trees: CgroupTrees, group: Path) -> None:
    """A version 2 group has the controllers that every group above it hands down."""
    root = trees.roots[0]
    names = ("cpu", "cpuset", "memory", "pids", "io")
    wanted = " ".join(f"+{name}" for name in names if name in trees.controllers)
    above = [parent for parent in group.parents if parent == root or root in parent.parents]
    for parent in reversed(above):
        parent.mkdir(exist_ok=True)
        (parent / "cgroup.subtree_control").write_text(wanted)
