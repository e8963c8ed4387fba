"""Putting a mount into a container that exists, and taking it out: each in a child of the launcher, which dies with it.

What is mounted is assembled in a mount namespace of the child's own, cloned, given the container's ids and moved into
the container's namespace by descriptor (open_tree(2), mount_setattr(2), setns(2), move_mount(2)). It is the container's
from then on: when its last process dies, the mount is gone, and the loop device and lock of a volume with it.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from triarch.errors import InUse, Invalid, NotFound, Unavailable, Unsupported
from triarch.host.idmap import filesystem_ids
from triarch.host.launcher.launch import EXT4_OPTIONS, Steps
from triarch.host.launcher.protocol import Place, Plug, PlugKind, Unplug
from triarch.host.locks import lock_file
from triarch.host.loop import attach_loop, loop_path
from triarch.host.pidfd import ProcessId, open_process
from triarch.host.syscalls import (
    CLONE_NEWNS,
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_RDONLY,
    MS_NOATIME,
    MS_NODEV,
    MS_NOSUID,
    UMOUNT_NOFOLLOW,
    attach_tree_at,
    clone_tree,
    enter_namespaces,
    mount,
    open_in_root,
    set_idmap,
    unmount,
    unshare,
)

_DIRECTORY_MODE = 0o755


class _Identity(NamedTuple):
    """What tells a mounted thing from any other: of a node its device number, else its inode."""

    kind: int
    first: int
    second: int


def plug(request: Plug, place: Place, steps: Steps) -> None:
    """Raises `Error` or `OSError`; then nothing is left but a mount point that had to be made."""
    with steps("find the machine"):
        pidfd, user_fd = _open_machine(request.first)
    with steps(f"enter the machine to look at {request.path}"):
        # Looking comes first: a volume that is there already holds its own lock.
        if _is_there(pidfd, request):
            return
    with steps(f"prepare {request.source}"):
        tree_fd = _prepare(request, user_fd, place)
    with steps("enter the machine"):
        enter_namespaces(pidfd, CLONE_NEWNS)
    with steps(f"mount at {request.path}"), filesystem_ids(request.id_base):
        root_fd = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        attach_tree_at(tree_fd, _mount_point(root_fd, request.path, directory=request.kind is not PlugKind.NODE))


def unplug(request: Unplug, steps: Steps) -> None:
    """Raises `InUse`, or `OSError`."""
    with steps("find the machine"):
        pidfd, _ = _open_machine(request.first)
    wanted = _wanted(request)
    descriptors_fd = os.open("/proc/self/fd", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    with steps("enter the machine"):
        enter_namespaces(pidfd, CLONE_NEWNS)
        root_fd = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    with steps(f"unmount {request.path}"):
        try:
            found_fd = open_in_root(root_fd, request.path, os.O_PATH)
        except OSError:
            return
        if wanted is None or _identity(os.fstat(found_fd)) != wanted:
            return
        # Where links of the machine led; the descriptor itself would keep the mount busy.
        where = os.readlink(str(found_fd), dir_fd=descriptors_fd)
        os.close(found_fd)
        try:
            unmount(where, UMOUNT_NOFOLLOW)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise InUse(f"something in the machine still uses {request.path}", path=request.path) from error
            if error.errno != errno.EINVAL:
                raise
        if request.kind is PlugKind.NODE:
            _remove_placeholder(where)


def _remove_placeholder(where: str) -> None:
    """The empty file that had to be made for a node; whatever else is there is the machine's."""
    with suppress(OSError):
        status = os.lstat(where)
        if stat.S_ISREG(status.st_mode) and not status.st_size:
            os.unlink(where)  # noqa: PTH108


def _open_machine(first: ProcessId) -> tuple[int, int]:
    """Descriptors of the process and of its user namespace, taken while it was certainly the one that is meant."""
    pidfd = open_process(first)
    if pidfd is None:
        raise Unavailable("the machine has ended")
    user_fd = os.open(f"/proc/{first.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    again = open_process(first)
    if again is None:
        raise Unavailable("the machine has ended")
    os.close(again)
    return pidfd, user_fd


def _is_there(pidfd: int, request: Plug) -> bool:
    """Look in a child: whoever has entered a mount namespace does not come back."""
    pid = os.fork()
    if pid == 0:
        try:
            wanted = _wanted(request)
            enter_namespaces(pidfd, CLONE_NEWNS)
            root_fd = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            found = _identity(os.fstat(open_in_root(root_fd, request.path, os.O_PATH)))
            os._exit(0 if found == wanted else 1)
        except OSError:
            os._exit(1)
        finally:
            os._exit(2)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status) == 0


def _wanted(request: Plug | Unplug) -> _Identity | None:
    """What is at the path when the plug is in; None for a volume that no loop device shows."""
    if request.kind is not PlugKind.VOLUME:
        try:
            return _identity(os.stat(request.source))  # noqa: PTH116
        except FileNotFoundError:
            return None
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            if entry.read_text().rstrip("\n") == request.source:
                return _Identity(stat.S_IFDIR, os.stat(f"/dev/{entry.parts[3]}").st_rdev, 2)  # noqa: PTH116
        except OSError:
            continue
    return None


def _identity(status: os.stat_result) -> _Identity:
    kind = stat.S_IFMT(status.st_mode)
    if kind in (stat.S_IFBLK, stat.S_IFCHR):
        return _Identity(kind, status.st_rdev, 0)
    return _Identity(kind, status.st_dev, status.st_ino)


def _prepare(request: Plug, user_fd: int, place: Place) -> int:
    """The detached mount that the machine is to get."""
    match request.kind:
        case PlugKind.VOLUME:
            return _volume(request, user_fd, place)
        case PlugKind.FOLDER:
            return _folder(request, user_fd)
        case PlugKind.NODE:
            return _node(request, place)


def _volume(request: Plug, user_fd: int, place: Place) -> int:
    file_fd = lock_file(request.source)
    device_fd = attach_loop(file_fd, request.source, read_only=False)
    # From here on the loop device alone owns the locked description.
    os.close(file_fd)
    unshare(CLONE_NEWNS)
    mount(loop_path(device_fd), place.machine, "ext4", MS_NODEV | MS_NOATIME, EXT4_OPTIONS)
    os.close(device_fd)
    tree_fd = clone_tree(place.machine)
    set_idmap(tree_fd, user_fd)
    return tree_fd


def _folder(request: Plug, user_fd: int) -> int:
    try:
        tree_fd = clone_tree(request.source)
    except FileNotFoundError as error:
        raise NotFound(f"there is no directory {request.source} on this host", path=request.source) from error
    attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | (MOUNT_ATTR_RDONLY if request.read_only else 0)
    try:
        set_idmap(tree_fd, user_fd, attributes)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EPERM):
            raise
        raise Unsupported(
            f"cannot show {request.source} with the machine's ids: its filesystem does not allow it on this kernel",
            path=request.source,
        ) from error
    return tree_fd


def _node(request: Plug, place: Place) -> int:
    """A node of the same number that belongs to the machine's root; the host's own keeps its owner."""
    status = os.stat(request.source)  # noqa: PTH116
    unshare(CLONE_NEWNS)
    mount("tmpfs", place.machine, "tmpfs", MS_NOSUID, "mode=711,size=64k")
    node = f"{place.machine}/node"
    mode = 0o400 if request.read_only else 0o600
    os.mknod(node, stat.S_IFMT(status.st_mode) | mode, status.st_rdev)
    os.chown(node, request.id_base, request.id_base)
    return clone_tree(node)


def _mount_point(root_fd: int, path: str, *, directory: bool) -> int:
    """Open the place in the machine, made as far as it is missing. Raises `Invalid` for what is in the way."""
    parts = path.strip("/").split("/")
    for count in range(1, len(parts) + 1):
        here, last = "/".join(parts[:count]), count == len(parts)
        try:
            found_fd = open_in_root(root_fd, here, os.O_PATH)
        except FileNotFoundError:
            parent_fd = open_in_root(root_fd, "/".join(parts[: count - 1]) or ".", os.O_PATH | os.O_DIRECTORY)
            _make(parent_fd, parts[count - 1], directory=directory or not last)
            os.close(parent_fd)
            found_fd = open_in_root(root_fd, here, os.O_PATH)
        except OSError as error:
            if error.errno not in (errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG):
                raise
            reason = (error.strerror or "").lower()
            raise Invalid(f"in the machine /{here} leads nowhere: {reason}", path=path) from error
        if stat.S_ISDIR(os.fstat(found_fd).st_mode) != (directory or not last):
            kind = "a directory" if directory or not last else "a file"
            raise Invalid(f"in the machine /{here} is not {kind}", path=path)
        if last:
            return found_fd
        os.close(found_fd)
    raise Invalid(f"{path} is no place for a mount", path=path)


def _make(parent_fd: int, name: str, *, directory: bool) -> None:
    try:
        if directory:
            os.mkdir(name, _DIRECTORY_MODE, dir_fd=parent_fd)
        else:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            os.close(os.open(name, flags, 0o600, dir_fd=parent_fd))
    except FileExistsError as error:
        raise Invalid(f"in the machine '{name}' is a link that leads nowhere") from error
