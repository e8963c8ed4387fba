"""Control groups, version 1 (one tree per controller) and 2 (one tree): cgroups(7).

The container runtime writes the limits; here is what surrounds it: delegation, freezing, measuring, ending, removing.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

import msgspec

from triarch.errors import Failed, Unavailable
from triarch.host.rights import Capability, rights

_V2_ROOT = Path("/sys/fs/cgroup")
# Enough for systemd and a container engine inside; a guest cannot make paths that are too long to remove.
_V2_MAX_DEPTH = 32
_DELEGATED_V1: tuple[str, ...] = ("cgroup.procs", "tasks")
_DELEGATED_V2: tuple[str, ...] = ("cgroup.procs", "cgroup.threads", "cgroup.subtree_control")
# Of the kernel's own cost model, and of the BFQ scheduler.
V2_IO_WEIGHTS: tuple[str, ...] = ("io.weight", "io.bfq.weight")
_FREEZE_SECONDS = 10.0
_POLL_SECONDS = 0.002


class CgroupTrees(msgspec.Struct, frozen=True, kw_only=True):
    """Where this host keeps its control groups.

    `controllers` maps a controller to the root of its tree (`name=systemd` too); on version 2 all share one.
    `hybrid_root` is a version 2 tree beside version 1 ones.
    """

    version: int
    controllers: dict[str, Path]
    hybrid_root: Path | None = None

    @property
    def roots(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(self.controllers.values()))


@cache
def cgroup_trees() -> CgroupTrees:
    """Read the host's mounts. Raises `Unavailable` when there are no control groups."""
    trees = parse_mountinfo(Path("/proc/self/mountinfo").read_text())
    if trees.version == 2:
        names = (_V2_ROOT / "cgroup.controllers").read_text().split()
        return CgroupTrees(version=2, controllers=dict.fromkeys(names, _V2_ROOT))
    if not trees.controllers:
        raise Unavailable("no control groups are mounted on this host", hint="mount -t cgroup2 none /sys/fs/cgroup")
    return trees


def parse_mountinfo(text: str) -> CgroupTrees:
    """The trees in the text of `/proc/PID/mountinfo` (pure; on version 2 `controllers` is still empty)."""
    controllers: dict[str, Path] = {}
    hybrid_root = None
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        where = Path(before.split()[4])
        kind, _, options = after.split(" ", 2)
        if kind == "cgroup2":
            if where == _V2_ROOT:
                return CgroupTrees(version=2, controllers={})
            hybrid_root = where
        elif kind == "cgroup":
            skipped = ("rw", "ro", "xattr", "clone_children")
            names = [name for name in options.split(",") if name not in skipped and not name.startswith("release")]
            controllers.update(dict.fromkeys(names, where))
    return CgroupTrees(version=1, controllers=controllers, hybrid_root=hybrid_root)


def try_to_make(path: str) -> None:
    """Make the group in every tree and remove it again. Raises `OSError` where that is refused."""
    for root in cgroup_trees().roots:
        (root / path.lstrip("/")).mkdir(parents=True, exist_ok=True)
    remove(path)


def delegate(path: str, uid: int) -> None:
    """Make the group in which the machine's own init may manage groups below: its limits stay out of reach."""
    trees = cgroup_trees()
    if trees.version == 2:
        group = _V2_ROOT / path.lstrip("/")
        group.mkdir(parents=True, exist_ok=True)
        (group / "cgroup.max.depth").write_text(str(_V2_MAX_DEPTH))
        files = _DELEGATED_V2
    elif "name=systemd" in trees.controllers:
        group = trees.controllers["name=systemd"] / path.lstrip("/")
        group.mkdir(parents=True, exist_ok=True)
        files = _DELEGATED_V1
    else:
        return
    for target in (group, *(group / name for name in files)):
        os.chown(target, uid, uid)


def enter(path: str) -> None:
    """Move this process into the group, in every tree where it exists. Raises `Unavailable` where it exists in none."""
    trees = cgroup_trees()
    groups = [group for root in trees.roots if (group := root / path.lstrip("/")).is_dir()]
    if not groups:
        raise Unavailable(f"there is no control group {path}")
    for group in groups:
        (_leaf(group) if trees.version == 2 else group).joinpath("cgroup.procs").write_text("0")


def _leaf(group: Path) -> Path:
    """A group of version 2 that hands controllers on may have no processes: then a group of our own below it may."""
    while (group / "cgroup.subtree_control").read_text().strip():
        group = group / "triarch-visit"
        group.mkdir(exist_ok=True)
    return group


def pids_in(path: str) -> frozenset[int]:
    """Every process in the group and below, as the host numbers them."""
    found: set[int] = set()
    for group in _groups(path):
        for procs in group.rglob("cgroup.procs"):
            with suppress(OSError):
                found.update(map(int, procs.read_text().split()))
    return frozenset(found - {0})


def kill_all(path: str) -> None:
    """SIGKILL to every process in the group and below, frozen ones too."""
    for pid in pids_in(path):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    set_frozen(path, False)


def set_frozen(path: str, frozen: bool) -> None:
    """Freeze or thaw the group; a freeze returns when all of it stands still. Raises `Failed`; absent is success."""
    trees = cgroup_trees()
    root = _V2_ROOT if trees.version == 2 else trees.controllers.get("freezer")
    if root is None:
        if frozen:
            raise Failed("cannot pause: this host has no freezer control group")
        return
    name, value = ("cgroup.freeze", str(int(frozen))) if trees.version == 2 else ("freezer.state", _V1_FREEZER[frozen])
    control = root / path.lstrip("/") / name
    try:
        control.write_text(value)
    except FileNotFoundError:
        return
    deadline = time.monotonic() + _FREEZE_SECONDS
    while frozen and not is_frozen(path):
        if time.monotonic() > deadline:
            control.write_text("0" if trees.version == 2 else _V1_FREEZER[False])
            raise Failed(f"cannot pause: processes in {path} did not freeze within {_FREEZE_SECONDS:.0f} s")
        time.sleep(_POLL_SECONDS)


_V1_FREEZER = {True: "FROZEN", False: "THAWED"}


def is_frozen(path: str) -> bool:
    """Whether the whole group stands still now; absent is not frozen."""
    trees = cgroup_trees()
    try:
        if trees.version == 2:
            return "frozen 1" in (_V2_ROOT / path.lstrip("/") / "cgroup.events").read_text()
        root = trees.controllers.get("freezer")
        return root is not None and (root / path.lstrip("/") / "freezer.state").read_text().strip() == "FROZEN"
    except OSError:
        return False


def remove(path: str) -> bool:
    """Remove the group from every tree, with all that a guest made below it; absent is success.

    False when processes that are just ending still hold it: ask again.
    """
    gone = True
    for group in _groups(path):
        try:
            _remove_tree(group)
        except FileNotFoundError:
            continue
        except OSError as error:
            if error.errno not in (errno.EBUSY, errno.ENOTEMPTY):
                raise
            gone = False
    return gone


def remove_if_empty(path: str) -> None:
    """Remove a group that has neither processes nor groups below it, from every tree."""
    for group in _groups(path):
        with suppress(OSError):
            group.rmdir()


def can_filter_devices() -> bool:
    """Whether device rules can be set: version 2 keeps them in BPF programs, for which crun raises its memory limit."""
    trees = cgroup_trees()
    if trees.version == 1:
        return "devices" in trees.controllers
    return rights().has(Capability.CAP_SYS_RESOURCE)


def _groups(path: str) -> list[Path]:
    trees = cgroup_trees()
    roots = (*trees.roots, *((trees.hybrid_root,) if trees.hybrid_root else ()))
    return [group for root in roots if (group := root / path.lstrip("/")).is_dir()]


def _remove_tree(group: Path) -> None:
    """Depth first with one open directory: a guest chose the names and how deep they go."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
    below: list[str] = []
    fd = os.open(group, flags)
    try:
        while True:
            with os.scandir(fd) as entries:
                child = next((entry.name for entry in entries if entry.is_dir(follow_symlinks=False)), None)
            if child is not None:
                below.append(child)
                fd = _replace(fd, os.open(child, flags, dir_fd=fd))
            elif below:
                fd = _replace(fd, os.open("..", flags, dir_fd=fd))
                os.rmdir(below.pop(), dir_fd=fd)
            else:
                break
    finally:
        os.close(fd)
    group.rmdir()


def _replace(old_fd: int, new_fd: int) -> int:
    os.close(old_fd)
    return new_fd
