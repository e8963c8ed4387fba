"""One visit: a program runs alone in a tree, in a child of the launcher, which dies with the launcher.

After the child has entered the tree, all names lead into what a guest may have made: nothing is opened, imported or
executed by name from there on. The program is a sealed memory file, which nobody can have replaced (CVE-2019-5736).
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from triarch.errors import Unavailable
from triarch.host.cgroup import enter
from triarch.host.idmap import NamespaceMaker, NamespacePair, attach_mapped, filesystem_ids
from triarch.host.launcher.launch import EXT4_OPTIONS, Steps, assemble
from triarch.host.launcher.protocol import Join, Place, Visit
from triarch.host.locks import lock_file
from triarch.host.loop import attach_loop, loop_path
from triarch.host.syscalls import (
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWUSER,
    MNT_DETACH,
    MS_NOATIME,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_RDONLY,
    die_with_parent,
    enter_namespaces,
    mount,
    pivot_root,
    unmount,
    unshare,
)

_TREE_FLAGS = MS_NODEV | MS_NOATIME | MS_RDONLY
# Else it is the filesystem that says what an error does, and a guest may have written there: let the host panic.
_READ_ONLY_OPTIONS = "errors=remount-ro"
_PROGRAM_FD, _FIRST_FREE_FD = 3, 4


def visit(request: Visit, fds: Sequence[int], place: Place, steps: Steps) -> NoReturn:
    """Become the program. Raises `Error` or `OSError` when a step before that fails."""
    program_fd, stdio_fd = fds
    layers = tuple(f"{place.layers}/{layer.digest}" for layer in request.layers)
    if request.read_only or request.delta_path is None:
        namespaces = _assemble_read_only(request, layers, place, steps)
    else:
        ids = (request.id_base, request.id_count)
        namespaces = assemble(request.delta_path, EXT4_OPTIONS, layers, *ids, place, steps)
    with steps("enter the tree"):
        null_fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        pivot_root("root")
        enter_namespaces(namespaces.user_fd, CLONE_NEWUSER)
        enter_namespaces(namespaces.network_fd, CLONE_NEWNET)
    with steps("run the program"):
        _become(program_fd, stdio_fd, null_fd)


def join(request: Join, fds: Sequence[int], steps: Steps) -> NoReturn:
    """As `visit`, beside a container's own processes."""
    program_fd, stdio_fd, pidfd = fds
    with steps("enter the machine's control group"):
        # Whatever ends the machine ends the program too, and its limits count.
        enter(request.cgroup)
    with steps("enter the machine"):
        null_fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        enter_namespaces(pidfd, CLONE_NEWUSER | CLONE_NEWNS)
    with steps("run the program"):
        _become(program_fd, stdio_fd, null_fd)


def _become(program_fd: int, stdio_fd: int, null_fd: int) -> NoReturn:
    os.setgroups(())
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    # A change of ids had cleared it (prctl(2)).
    die_with_parent(signal.SIGKILL)
    for source, target in ((stdio_fd, 0), (stdio_fd, 1), (null_fd, 2)):
        os.dup2(source, target)
    os.dup2(program_fd, _PROGRAM_FD, inheritable=False)
    os.closerange(_FIRST_FREE_FD, os.sysconf("SC_OPEN_MAX"))
    os.execve(_PROGRAM_FD, ["files"], {})
    raise Unavailable("the program does not run")


def _assemble_read_only(request: Visit, layers: Sequence[str], place: Place, steps: Steps) -> NamespacePair:
    """The tree as one read-only overlay: the delta is its uppermost layer, if there is one."""
    with steps("fork"):
        maker = NamespaceMaker()
    with steps("enter a mount namespace"):
        unshare(CLONE_NEWNS)
        mount("tmpfs", place.machine, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
        os.chdir(place.machine)
        names = ("delta", "mapped", "root", "none", "nothing", *map(str, range(len(layers))))
        for name in names:
            Path(name).mkdir(mode=0o755)
    if request.delta_path is not None:
        with steps("mount the delta"):
            _mount_read_only(request.delta_path)
    with steps("make user and network namespaces"):
        namespaces = maker.finish(request.id_base, request.id_count)
    with steps("map ids of the layers and the delta"):
        for number, layer in enumerate(layers):
            attach_mapped(layer, str(number), namespaces.user_fd)
        if request.delta_path is not None:
            attach_mapped("delta", "mapped", namespaces.user_fd)
    with steps("mount the overlay"):
        upper = () if request.delta_path is None else ("mapped/upper",)
        # An overlay without an upper directory wants two lower ones.
        lower = ":".join((*upper, *(str(number) for number in reversed(range(len(layers)))), "none", "nothing"))
        with filesystem_ids(request.id_base):
            mount("overlay", "root", "overlay", _TREE_FLAGS | MS_NOSUID | MS_NOEXEC, f"lowerdir={lower}")
    with steps("let go of what the overlay holds by itself"):
        for name in ("delta", "mapped", *map(str, range(len(layers))), place.layers):
            with suppress(OSError):
                unmount(name, MNT_DETACH)
    return namespaces


def _mount_read_only(delta_path: str) -> None:
    delta_fd = lock_file(delta_path, writable=False)
    device_fd = attach_loop(delta_fd, delta_path, read_only=True)
    os.close(delta_fd)
    try:
        mount(loop_path(device_fd), "delta", "ext4", _TREE_FLAGS, _READ_ONLY_OPTIONS)
    except OSError:
        # Its journal cannot be replayed without writing: what was on the disk already is shown (ext4(5)).
        mount(loop_path(device_fd), "delta", "ext4", _TREE_FLAGS, f"noload,{_READ_ONLY_OPTIONS}")
    finally:
        os.close(device_fd)
