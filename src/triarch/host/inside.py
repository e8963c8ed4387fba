"""Looking at a running machine's files from the host: nothing the machine made leads outside of it (openat2(2))."""

from __future__ import annotations

import ctypes
import os
import stat
import struct

from triarch.host.pidfd import ProcessId, is_alive

_SYS_OPENAT2 = 437  # the same on every architecture
_RESOLVE_NO_XDEV, _RESOLVE_NO_MAGICLINKS, _RESOLVE_IN_ROOT = 0x01, 0x02, 0x10
_libc = ctypes.CDLL(None, use_errno=True)


def open_inside(process: ProcessId, path: str, flags: int) -> int:
    """Open `path` as a process has it, without leaving its root or the filesystem that this is on. Raises `OSError`.

    What is mounted in the machine is refused, because a filesystem that the machine serves could hold the caller up.
    """
    root_fd = os.open(f"/proc/{process.pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if not is_alive(process):
            raise ProcessLookupError(3, "the machine has ended")
        resolve = _RESOLVE_NO_XDEV | _RESOLVE_NO_MAGICLINKS | _RESOLVE_IN_ROOT
        how = struct.pack("=QQQ", flags | os.O_CLOEXEC, 0, resolve)
        fd: int = _libc.syscall(_SYS_OPENAT2, root_fd, os.fsencode(path), how, len(how))
        if fd < 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), path)
        return fd
    finally:
        os.close(root_fd)


def read_inside(process: ProcessId, path: str, max_bytes: int) -> bytes:
    """The beginning of a regular file; nothing where there is none. Raises `ProcessLookupError` for a machine's end."""
    try:
        fd = open_inside(process, path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except ProcessLookupError:
        raise
    except OSError:
        return b""
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return b""
        with os.fdopen(os.dup(fd), "rb") as file:
            return file.read(max_bytes)
    except OSError:
        return b""
    finally:
        os.close(fd)


def program_inside(process: ProcessId, path: str) -> str | None:
    """The name of the file that `path` leads to, links followed, if anybody may execute it."""
    try:
        fd = open_inside(process, path, os.O_PATH)
    except OSError:
        return None
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode) or not mode & 0o111:
            return None
        return os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))  # noqa: PTH115, PTH119
    finally:
        os.close(fd)


def directory_inside(process: ProcessId, path: str) -> bool:
    """Whether there is a directory at `path`."""
    try:
        os.close(open_inside(process, path, os.O_PATH | os.O_DIRECTORY))
    except OSError:
        return False
    return True
