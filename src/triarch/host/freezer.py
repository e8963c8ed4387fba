"""Holding mounted filesystems still (FIFREEZE of ioctl_fslib, `linux/fs.h`) in a process of its own.

A filesystem stays frozen when the one who froze it dies, and with it every process that writes to it. So a small
program does it that outlives the daemon by no more than a moment: it thaws when its input ends (which the kernel sees
to when the daemon is killed), when it is told to, and by itself when nobody asked it to go on for `limit` seconds.

The program mounts the same loop device once more, in its own mount namespace: that is the same superblock that the
machine has, wherever the machine has it mounted.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

from triarch.host.syscalls import (
    CLONE_NEWNS,
    MNT_DETACH,
    MS_NODEV,
    MS_NOSUID,
    MS_REC,
    MS_SLAVE,
    mount,
    sync_filesystem,
    unmount,
    unshare,
)

# linux/fs.h: _IOWR('X', 119, int), _IOWR('X', 120, int)
FIFREEZE, FITHAW = 0xC0045877, 0xC0045878
_NOT_FROZEN = 22  # EINVAL

FROZEN, THAWED, FAILED = b"frozen\n", b"thawed ", b"failed "


def freeze(fd: int) -> None:
    """Write everything out and let no write begin. Raises `OSError` (EBUSY: it is frozen already)."""
    fcntl.ioctl(fd, FIFREEZE, 0)


def thaw(fd: int) -> None:
    """One that is not frozen is success."""
    try:
        fcntl.ioctl(fd, FITHAW, 0)
    except OSError as error:
        if error.errno != _NOT_FROZEN:
            raise


def main(arguments: Sequence[str]) -> int:
    """`LIMIT_SECONDS freeze|thaw DEVICE…`: see above. Says on standard output what it did, one line each.

    `thaw` only ends the freeze of a program that was killed before it could.
    """
    limit_seconds, verb, devices = float(arguments[0]), arguments[1], arguments[2:]
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    try:
        fds = [_open_root(device) for device in devices]
        if verb == "thaw":
            for fd in fds:
                thaw(fd)
            _say(THAWED + b"0\n")
        else:
            _hold(fds, limit_seconds)
    except OSError as error:
        _say(FAILED + str(error.strerror or error).encode() + b"\n")
        return 1
    return 0


def _hold(fds: Sequence[int], limit_seconds: float) -> None:
    for fd in fds:
        # What is written out before need not be while everything waits.
        sync_filesystem(fd)
    begun = time.monotonic()
    frozen: list[int] = []
    try:
        for fd in fds:
            freeze(fd)
            frozen.append(fd)
        _say(FROZEN)
        _wait(limit_seconds)
    finally:
        for fd in reversed(frozen):
            with suppress(OSError):
                thaw(fd)
        seconds = time.monotonic() - begun
    _say(THAWED + f"{seconds:.6f}\n".encode())


def _wait(limit_seconds: float) -> None:
    """Until the input ends; any byte in it is a new lease of `limit_seconds`."""
    while select.select([0], [], [], limit_seconds)[0]:
        if not os.read(0, 64):
            return


def _say(line: bytes) -> None:
    with suppress(OSError):
        os.write(1, line)


def _open_root(device: str) -> int:
    """The root of the filesystem on `device`, mounted here once more."""
    # Any directory does: nobody else sees what is mounted here.
    place = "/sys"
    mount(device, place, "ext4", MS_NODEV | MS_NOSUID)
    try:
        return os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    finally:
        unmount(place, MNT_DETACH)


def _enter_own_namespace() -> None:
    unshare(CLONE_NEWNS)
    mount(None, "/", None, MS_REC | MS_SLAVE)


if __name__ == "__main__":
    _enter_own_namespace()
    sys.exit(main(sys.argv[1:]))
