"""Exclusive locks on files, owned by an open file description rather than by a process."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path

from triarch.errors import Busy, Denied, Invalid, NotFound


def lock_file(path: str | Path, *, writable: bool = True) -> int:
    """Open a regular file and take its exclusive flock without waiting; return the descriptor (close-on-exec).

    The lock lives as long as the open file description: hand the descriptor to a loop device or to QEMU (a
    duplicate shares the description) and the lock outlives this process. Closing every duplicate frees it.
    A symlink in the last component is not followed, because a delta's directory is no place for one.

    Raises `Busy` when something holds the file, `NotFound`, `Denied`, or `Invalid` for what is no regular file.
    """
    flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd = os.open(path, flags)
    except FileNotFoundError as error:
        raise NotFound(f"there is no file {path}", path=str(path)) from error
    except PermissionError as error:
        raise Denied(f"cannot open {path}: {error.strerror}", path=str(path)) from error
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise _not_regular(path) from error
        raise
    try:
        _lock(fd, path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _lock(fd: int, path: str | Path) -> None:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise _not_regular(path)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise Busy(f"{path} is in use: something else holds its lock", path=str(path)) from error


def _not_regular(path: str | Path) -> Invalid:
    return Invalid(f"{path} is not a regular file", path=str(path))
