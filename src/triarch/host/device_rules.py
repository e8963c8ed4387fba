"""Which device nodes a control group may open while it runs (cgroups version 1, `devices`).

Version 2 keeps the rules in a program that the container runtime attaches when it makes the container: they are
given to it then, and cannot be changed afterwards.
"""

from __future__ import annotations

import os
import stat

import msgspec

from triarch.host.cgroup import cgroup_trees


def can_change_rules() -> bool:
    """Whether rules can be changed while a group holds processes."""
    trees = cgroup_trees()
    return trees.version == 1 and "devices" in trees.controllers


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """A device as control groups know it: `b` or `c`, and its number."""

    kind: str
    major: int
    minor: int


def node_of(path: str) -> Node | None:
    """The device that a path leads to; None where there is none."""
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError:
        return None
    kind = {stat.S_IFBLK: "b", stat.S_IFCHR: "c"}.get(stat.S_IFMT(status.st_mode))
    if kind is None:
        return None
    return Node(kind=kind, major=os.major(status.st_rdev), minor=os.minor(status.st_rdev))


def allow_device(cgroup: str, path: str, access: str) -> None:
    """Let the group open the device at `path` with `access` (letters of `rwm`). A group without rules needs none."""
    _write(cgroup, "devices.allow", path, access)


def deny_device(cgroup: str, path: str) -> None:
    """Take it back; what is open stays open. Absent is success."""
    _write(cgroup, "devices.deny", path, "rwm")


def _write(cgroup: str, name: str, path: str, access: str) -> None:
    node, root = node_of(path), cgroup_trees().controllers.get("devices")
    control = None if root is None else root / cgroup.lstrip("/") / name
    if node is not None and control is not None and control.exists():
        control.write_text(f"{node.kind} {node.major}:{node.minor} {access}")
