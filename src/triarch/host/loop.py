"""Loop devices: a file as a block device (loop(4), `linux/loop.h`)."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path

_CONTROL = "/dev/loop-control"
_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_CONFIGURE = 0x4C0A
_LOOP_GET_STATUS64 = 0x4C05

_READ_ONLY, _AUTOCLEAR, _DIRECT_IO = 1, 4, 16
_BLOCK_SIZE_BYTES = 4096
_TRIES = 64

# loop_info64: device, inode, rdevice, offset, size limit, number, encryption type, key size, flags, names, key, init
_INFO = struct.Struct("=QQQQQIIII64s64s32s16s")
_CONFIG_HEAD = struct.Struct("=II")
_CONFIG_RESERVED = bytes(64)


def attach_loop(file_fd: int, name: str, *, read_only: bool) -> int:
    """Make a loop device of an open file and return its descriptor (close-on-exec).

    Direct I/O where the filesystem can (no second copy in the page cache); the device vanishes with its last user.
    The device keeps the very open file description of `file_fd`, and with it the lock that it holds.
    """
    flags = _AUTOCLEAR | _DIRECT_IO | (_READ_ONLY if read_only else 0)
    info = _INFO.pack(0, 0, 0, 0, 0, 0, 0, 0, flags, os.fsencode(name)[-63:], b"", b"", b"")
    config = _CONFIG_HEAD.pack(file_fd, _BLOCK_SIZE_BYTES) + info + _CONFIG_RESERVED
    control_fd = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_TRIES):
            number = fcntl.ioctl(control_fd, _LOOP_CTL_GET_FREE)
            mode = os.O_RDONLY if read_only else os.O_RDWR
            device_fd = os.open(f"/dev/loop{number}", mode | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device_fd, _LOOP_CONFIGURE, config)
            except OSError as error:
                os.close(device_fd)
                if error.errno != errno.EBUSY:
                    raise OSError(error.errno, f"attach {name} to a loop device: {error.strerror}") from error
            else:
                return device_fd
    finally:
        os.close(control_fd)
    raise OSError(errno.EBUSY, f"attach {name} to a loop device: others took each of {_TRIES} free ones first")


def find_shared_loop(file_fd: int) -> int | None:
    """The descriptor of a read-only loop device that already shows this whole file, or None.

    The same device means the same superblock: machines of an earlier daemon and new ones share one page cache.
    """
    file = os.fstat(file_fd)
    for entry in sorted(Path("/sys/block").glob("loop*/loop/backing_file")):
        try:
            device_fd = os.open(f"/dev/{entry.parts[3]}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        # The open descriptor keeps the device from going away between this look and the mount.
        if _shows(device_fd, file):
            return device_fd
        os.close(device_fd)
    return None


def _shows(device_fd: int, file: os.stat_result) -> bool:
    status = bytearray(_INFO.size)
    try:
        fcntl.ioctl(device_fd, _LOOP_GET_STATUS64, status)
    except OSError:
        return False
    device, inode, _, offset, size_limit, _, _, _, flags, *_ = _INFO.unpack(status)
    whole = offset == 0 and size_limit == 0
    return whole and (device, inode) == (file.st_dev, file.st_ino) and bool(flags & _READ_ONLY)


def loop_path(device_fd: int) -> str:
    """`/dev/loopN` of a descriptor from here."""
    return str(Path(f"/proc/self/fd/{device_fd}").readlink())
