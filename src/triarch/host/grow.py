"""Giving an ext4 filesystem the room that its file has got: at rest, or mounted somewhere (`fs/ext4/ioctl.c`)."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path

from triarch.errors import Damaged, Failed, NotFound, Unsupported
from triarch.host.ext4 import check_filesystem
from triarch.host.process import run
from triarch.host.syscalls import mount_detached

_LOOP_SET_CAPACITY = 0x4C07
_BLKGETSIZE64 = 0x80081272
_EXT4_IOC_RESIZE_FS = 0x40086610
_SUPERBLOCK_OFFSET, _MAGIC = 1024, 0xEF53
_BLOCK_BYTES = 4096


def filesystem_bytes(path: Path) -> int:
    """How long the ext4 filesystem in a file or on a device says it is.

    Raises `Damaged` where there is none, `NotFound` where there is no file.
    """
    try:
        with path.open("rb", buffering=0) as image:
            image.seek(_SUPERBLOCK_OFFSET)
            block = image.read(1024)
    except FileNotFoundError as error:
        raise NotFound(f"the disk is lost: there is no file {path}", path=str(path)) from error
    if len(block) < 1024 or struct.unpack_from("<H", block, 0x38)[0] != _MAGIC:
        raise Damaged(f"{path} holds no ext4 filesystem", path=str(path))
    low, log_block_size = struct.unpack_from("<I", block, 0x4)[0], struct.unpack_from("<I", block, 0x18)[0]
    (high,) = struct.unpack_from("<I", block, 0x150)
    return int((high << 32 | low) << (10 + log_block_size))


def grow_at_rest(path: Path) -> None:
    """Let the filesystem fill its file, which nothing else uses. Idempotent.

    Raises `Damaged`, `NotFound`, `CommandFailed`.
    """
    if filesystem_bytes(path) // _BLOCK_BYTES >= path.stat().st_size // _BLOCK_BYTES:
        return
    check_filesystem(path, is_delta=False)
    run(["resize2fs", "-f", str(path)])


def grow_mounted(device: str) -> None:
    """Let the filesystem on a loop device, mounted wherever it is, fill the device's file while it is written to.

    The device is mounted once more, where nobody sees it: that is the same filesystem, whichever namespace has it.
    Raises `Unsupported` without the right to do it (CAP_SYS_RESOURCE), `Failed`. Idempotent.
    """
    device_fd = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(device_fd, _LOOP_SET_CAPACITY)
        size = bytearray(8)
        fcntl.ioctl(device_fd, _BLKGETSIZE64, size)
        blocks = struct.unpack("=Q", size)[0] // _BLOCK_BYTES
        root_fd = mount_detached(device, "ext4")
        try:
            fcntl.ioctl(root_fd, _EXT4_IOC_RESIZE_FS, struct.pack("=Q", blocks))
        finally:
            os.close(root_fd)
    except PermissionError as error:
        raise Unsupported("a mounted filesystem grows only where the daemon has CAP_SYS_RESOURCE") from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise Failed(f"the filesystem on {device} has no room for what describes a larger one") from error
        raise Failed(f"cannot grow the filesystem on {device}: {(error.strerror or str(error)).lower()}") from error
    finally:
        os.close(device_fd)
