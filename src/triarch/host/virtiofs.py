"""Sharing a directory of the host with a VM: one virtiofsd for each, which ends with the VM.

QEMU is given a connection that stands already, and virtiofsd the listening end of it. So whatever dies first, be it the
daemon before QEMU knows of it, the kernel closes the connection and virtiofsd ends.

Run as a program (`python -m triarch.host.virtiofs ro|rw`) it prepares a mount namespace of its own and becomes
virtiofsd, which then shuts itself into the directory (mount, pid and network namespaces, seccomp, few capabilities).
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from triarch.errors import MissingProgram, NotFound
from triarch.host.pidfd import ProcessId
from triarch.host.process import PACKAGES
from triarch.host.spawn import FIRST_FD, Detached, spawn
from triarch.host.syscalls import (
    CLONE_NEWNS,
    MOUNT_ATTR_NODEV,
    MOUNT_ATTR_NOSUID,
    MOUNT_ATTR_RDONLY,
    MS_REC,
    MS_SLAVE,
    attach_tree,
    clone_tree,
    mount,
    set_mount_attributes,
    unshare,
)

_PROGRAM = Path("/usr/lib/qemu/virtiofsd")
_READ_ONLY, _READ_WRITE = "ro", "rw"
_SOCKET_FD, _SOURCE_FD = FIRST_FD, FIRST_FD + 1


def share_folder(
    source: str, directory: Path, name: str, *, read_only: bool, cgroup_fds: Sequence[int] = ()
) -> tuple[socket.socket, ProcessId]:
    """Start virtiofsd for `source`; return QEMU's end of the connection, and the process, which the caller reaps.

    `directory` holds its log and process id, by `name`. Raises `NotFound` or `MissingProgram`.
    """
    if not _PROGRAM.exists():
        raise MissingProgram("virtiofsd", PACKAGES["virtiofsd"])
    try:
        source_fd = os.open(source, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"there is no directory {source} on this host", path=source) from error
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
    log_fd = os.open(directory / f"{name}.log", flags, 0o600)
    process_id_fd = os.open(directory / f"{name}.process", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    ours, listening = _connection(directory / f"{name}.sock")
    try:
        process = spawn(
            Detached(
                argv=(sys.executable, "-I", "-m", __name__, _READ_ONLY if read_only else _READ_WRITE),
                fds=(listening.fileno(), source_fd),
                stderr_fd=log_fd,
                process_id_fd=process_id_fd,
                cgroup_fds=cgroup_fds,
            )
        )
    except BaseException:
        ours.close()
        raise
    finally:
        listening.close()
        for fd in (source_fd, log_fd, process_id_fd):
            os.close(fd)
    return ours, process


def _connection(path: Path) -> tuple[socket.socket, socket.socket]:
    """A connection that waits to be accepted, and the socket that will; nobody else finds the way to it."""
    path.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    ours = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listening.bind(os.fspath(path))
        listening.listen(1)
        ours.connect(os.fspath(path))
    except BaseException:
        listening.close()
        ours.close()
        raise
    finally:
        path.unlink(missing_ok=True)
    return ours, listening


def main(mode: str) -> None:
    """Show the directory without devices and set-user-id programs, read-only if asked; become virtiofsd."""
    source = str(Path(f"/proc/self/fd/{_SOURCE_FD}").readlink())
    # Of the namespace that the descriptor belongs to; the copies in a new one are other mounts.
    tree_fd = clone_tree(f"/proc/self/fd/{_SOURCE_FD}")
    read_only = MOUNT_ATTR_RDONLY if mode == _READ_ONLY else 0
    set_mount_attributes(tree_fd, MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | read_only)
    unshare(CLONE_NEWNS)
    mount(None, "/", None, MS_REC | MS_SLAVE)
    attach_tree(tree_fd, source)
    os.set_inheritable(_SOURCE_FD, False)
    os.execv(
        _PROGRAM,
        [
            _PROGRAM.name,
            f"--fd={_SOCKET_FD}",
            *("-o", f"source={_escaped(source)}"),
            *("-o", "sandbox=namespace"),
            *("-o", "modcaps=-mknod"),
            *("-o", "xattr"),
            # Raising it needs a right that not every host gives.
            "--rlimit-nofile=0",
        ],
    )


def _escaped(path: str) -> str:
    """As a value among options: a comma would begin the next one, and what is served would be another directory."""
    return path.replace("\\", "\\\\").replace(",", "\\,")


if __name__ == "__main__":
    main(sys.argv[1])
