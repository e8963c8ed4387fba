"""System calls that Python lacks: mounts, namespaces, capabilities. Each raises an `OSError` that names the object."""

from __future__ import annotations

import ctypes
import os
import struct

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_NOATIME = 1024
MS_BIND = 4096
MS_REC = 16384
MS_SLAVE = 1 << 19
MNT_DETACH = 2

CLONE_NEWNS = 0x00020000
CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_OPEN_TREE_CLONE = 1
_MOVE_MOUNT_F_EMPTY_PATH = 4
_MOVE_MOUNT_T_EMPTY_PATH = 0x40
_MOUNT_ATTR_IDMAP = 0x00100000
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4
_SYS_OPENAT2 = 437
_RESOLVE_NO_MAGICLINKS, _RESOLVE_IN_ROOT = 0x02, 0x10
UMOUNT_NOFOLLOW = 8
_SYS_OPEN_TREE, _SYS_MOVE_MOUNT, _SYS_MOUNT_SETATTR = 428, 429, 442  # the same on every architecture
_SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 430, 431, 432
_FSOPEN_CLOEXEC = _FSMOUNT_CLOEXEC = 1
_FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 1, 6

_CAPABILITY_VERSION_3 = 0x20080522
_PR_SET_PDEATHSIG = 1
_PR_SET_THP_DISABLE = 41
_ID_MASK = 0xFFFFFFFF  # uid_t is unsigned, a C function's result is an int

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def mount(source: str | None, target: str, kind: str | None, flags: int = 0, options: str | None = None) -> None:
    """mount(2). At most one page of options."""
    _check(
        _libc.mount(
            None if source is None else os.fsencode(source),
            os.fsencode(target),
            None if kind is None else kind.encode(),
            ctypes.c_ulong(flags),
            None if options is None else os.fsencode(options),
        ),
        f"mount {kind or source or 'flags'} on {target}",
    )


def unmount(target: str, flags: int = 0) -> None:
    """umount2(2)."""
    _check(_libc.umount2(os.fsencode(target), flags), f"unmount {target}")


def sync_filesystem(fd: int) -> None:
    """syncfs(2): write out everything of the filesystem that `fd` is in."""
    _check(_libc.syncfs(fd), "sync a filesystem")


def unshare(flags: int) -> None:
    """unshare(2): the calling process enters new namespaces."""
    _check(_libc.unshare(flags), "unshare")


def enter_namespaces(fd: int, flags: int) -> None:
    """setns(2): enter one namespace by its descriptor, or several of a process by its pidfd."""
    _check(_libc.setns(fd, flags), "enter namespaces")


def pivot_root(new_root: str) -> None:
    """pivot_root(2): the mount at `new_root` becomes the root, and nothing of the old one is left."""
    os.chdir(new_root)
    _check(_libc.pivot_root(b".", b"."), f"make {new_root} the root")
    unmount(".", MNT_DETACH)
    os.chdir("/")


def clone_tree(path: str) -> int:
    """open_tree(2) with OPEN_TREE_CLONE: a detached copy of the mount at `path`, close-on-exec."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC
    return _check(_libc.syscall(_SYS_OPEN_TREE, _AT_FDCWD, os.fsencode(path), flags), f"open_tree {path}")


def mount_detached(source: str, kind: str) -> int:
    """fsopen(2), fsconfig(2), fsmount(2): the root of a mount that is nowhere in the tree, close-on-exec.

    A device that is mounted already shows the same superblock once more.
    """
    context_fd = _check(_libc.syscall(_SYS_FSOPEN, kind.encode(), _FSOPEN_CLOEXEC), f"open filesystem {kind}")
    try:
        what = f"mount {kind} {source}"
        _check(_libc.syscall(_SYS_FSCONFIG, context_fd, _FSCONFIG_SET_STRING, b"source", os.fsencode(source), 0), what)
        _check(_libc.syscall(_SYS_FSCONFIG, context_fd, _FSCONFIG_CMD_CREATE, None, None, 0), what)
        mount_fd = _check(_libc.syscall(_SYS_FSMOUNT, context_fd, _FSMOUNT_CLOEXEC, 0), what)
    finally:
        os.close(context_fd)
    try:
        # The descriptor of the mount itself is a mere name (O_PATH): no ioctl takes it.
        return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount_fd)
    finally:
        os.close(mount_fd)


def set_idmap(tree_fd: int, user_namespace_fd: int, also: int = 0) -> None:
    """mount_setattr(2): the detached mount shows the ids of a user namespace (once in its life).

    `also` are attributes such as `MOUNT_ATTR_RDONLY` that it gets in the same call.
    """
    attributes = struct.pack("=QQQQ", _MOUNT_ATTR_IDMAP | also, 0, 0, user_namespace_fd)
    _check(
        _libc.syscall(_SYS_MOUNT_SETATTR, tree_fd, b"", _AT_EMPTY_PATH, attributes, len(attributes)),
        "map ids of a mount",
    )


def set_mount_attributes(tree_fd: int, attributes: int) -> None:
    """mount_setattr(2): give a detached mount attributes such as `MOUNT_ATTR_RDONLY`."""
    change = struct.pack("=QQQQ", attributes, 0, 0, 0)
    _check(_libc.syscall(_SYS_MOUNT_SETATTR, tree_fd, b"", _AT_EMPTY_PATH, change, len(change)), "change a mount")


def attach_tree(tree_fd: int, target: str) -> None:
    """move_mount(2): put a detached mount at `target`."""
    flags = _MOVE_MOUNT_F_EMPTY_PATH
    _check(_libc.syscall(_SYS_MOVE_MOUNT, tree_fd, b"", _AT_FDCWD, os.fsencode(target), flags), f"attach {target}")


def attach_tree_at(tree_fd: int, target_fd: int) -> None:
    """move_mount(2): put a detached mount on the file or directory that is open as `target_fd`."""
    flags = _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH
    _check(_libc.syscall(_SYS_MOVE_MOUNT, tree_fd, b"", target_fd, b"", flags), "attach a mount")


def open_in_root(root_fd: int, path: str, flags: int) -> int:
    """openat2(2) as if `root_fd` were the root: no link leads beyond it, and no magic one (`/proc/PID/fd`) anywhere."""
    how = struct.pack("=QQQ", flags | os.O_CLOEXEC, 0, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)
    return _check(_libc.syscall(_SYS_OPENAT2, root_fd, os.fsencode(path), how, len(how)), f"open {path}")


def set_filesystem_ids(uid: int, gid: int) -> None:
    """setfsuid(2), setfsgid(2): the ids that mounts and files are made with. Raises `OSError` when refused."""
    _libc.setfsgid(ctypes.c_uint32(gid))
    _libc.setfsuid(ctypes.c_uint32(uid))
    # Both report the previous id whatever happens: only asking again tells.
    if _libc.setfsuid(-1) & _ID_MASK != uid or _libc.setfsgid(-1) & _ID_MASK != gid:
        raise OSError(1, f"set filesystem ids to {uid}:{gid}: operation not permitted")


def raise_capabilities() -> None:
    """Make every permitted capability effective again; leaving fsuid 0 had dropped those over files."""
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)()
    _check(_libc.capget(header, sets), "capget")
    sets[0], sets[3] = sets[1], sets[4]
    _check(_libc.capset(header, sets), "capset")


def die_with_parent(signal_number: int) -> None:
    """prctl(2) PR_SET_PDEATHSIG: get this signal when the parent (thread) ends. Forked children do not inherit it."""
    _check(_libc.prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0), "prctl")


def disable_huge_pages() -> None:
    """prctl(2) PR_SET_THP_DISABLE: this process, and what it executes, gets no transparent huge pages."""
    _check(_libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0), "prctl")
