"""Limits for a process of ours that runs in a control group of its own, version 1 and 2 (cgroups(7)).

Containers get theirs from the container runtime; this is for programs that Triarch starts itself.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

import msgspec

from triarch.errors import Error, Failed, Unavailable
from triarch.host.cgroup import V2_IO_WEIGHTS, CgroupTrees, cgroup_trees, remove

_PERIOD_US = 100_000
# What a plain user and a locked-down container hear; busy is a version 2 tree whose root has processes of its own.
_REFUSALS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY)


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a group may use; None is no limit. `cpus` counts processors, `io_weight` is relative to 100."""

    memory_bytes: int | None = None
    cpus: float | None = None
    pids: int | None = None
    io_weight: int | None = None


def make_limited_group(path: str, limits: Limits) -> tuple[int, ...]:
    """Make the group in every tree that takes part, set its limits, and open its `cgroup.procs` files.

    A process that writes `0` to each of them is in the group. A limit whose controller the host lacks is left out.
    Raises `Unavailable` without control groups or without the right to make any, `Failed` when the kernel takes no such
    limit; then nothing is left.
    """
    trees = cgroup_trees()
    opened: list[int] = []
    try:
        for group, settings in _plan(trees, path, limits).items():
            group.mkdir(parents=True, exist_ok=True)
            for name, value in settings.items():
                if (group / name).exists():
                    (group / name).write_text(value)
            opened.append(os.open(group / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC))
    except OSError as error:
        for fd in opened:
            os.close(fd)
        with suppress(Error, OSError):
            remove(path)
        kind = Unavailable if error.errno in _REFUSALS else Failed
        raise kind(f"cannot make control group {path}: {error.strerror}", path=path) from error
    return tuple(opened)


def _plan(trees: CgroupTrees, path: str, limits: Limits) -> dict[Path, dict[str, str]]:
    """The directories to make and what to write into their files, in order."""
    relative = path.lstrip("/")
    if trees.version == 2:
        group = trees.roots[0] / relative
        _enable_controllers(trees, group)
        return {group: _v2_settings(limits)}
    plan: dict[Path, dict[str, str]] = {}
    for controller, settings in _v1_settings(limits).items():
        if controller in trees.controllers:
            plan.setdefault(trees.controllers[controller] / relative, {}).update(settings)
    return plan


def _enable_controllers(trees: CgroupTrees, group: Path) -> None:
    """A version 2 group has the controllers that every group above it hands down."""
    root = trees.roots[0]
    wanted = " ".join(f"+{name}" for name in ("cpu", "memory", "pids", "io") if name in trees.controllers)
    above = [parent for parent in group.parents if parent == root or root in parent.parents]
    for parent in reversed(above):
        parent.mkdir(exist_ok=True)
        (parent / "cgroup.subtree_control").write_text(wanted)


def _v2_settings(limits: Limits) -> dict[str, str]:
    settings = {
        "memory.max": "max" if limits.memory_bytes is None else str(limits.memory_bytes),
        "pids.max": "max" if limits.pids is None else str(limits.pids),
        "cpu.max": f"{'max' if limits.cpus is None else _quota_us(limits.cpus)} {_PERIOD_US}",
    }
    if limits.io_weight is not None:
        settings.update(dict.fromkeys(V2_IO_WEIGHTS, f"default {limits.io_weight}"))
    return settings


def _v1_settings(limits: Limits) -> dict[str, dict[str, str]]:
    weight = {} if limits.io_weight is None else {"blkio.bfq.weight": str(limits.io_weight)}
    return {
        "memory": {"memory.limit_in_bytes": str(-1 if limits.memory_bytes is None else limits.memory_bytes)},
        "pids": {"pids.max": "max" if limits.pids is None else str(limits.pids)},
        "cpu": {
            "cpu.cfs_period_us": str(_PERIOD_US),
            "cpu.cfs_quota_us": str(-1 if limits.cpus is None else _quota_us(limits.cpus)),
        },
        "cpuacct": {},
        "blkio": weight,
    }


def _quota_us(cpus: float) -> int:
    # The kernel takes nothing below a millisecond.
    return max(1000, round(cpus * _PERIOD_US))
