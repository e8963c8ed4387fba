"""Sparse copies, durable writes and the errors of full disks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from triarch.errors import Exhausted

# linux/fs.h: _IOW(0x94, 9, int)
FICLONE = 0x40049409
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_COPY_BYTES = 16 << 20


def copy_sparse(source_fd: int, target_fd: int) -> None:
    """Make the empty file `target_fd` equal to `source_fd`: by reflink where the filesystem can, else hole by hole.

    Raises `OSError`; the target is then of no use.
    """
    if share_blocks(source_fd, target_fd):
        return
    size_bytes = os.fstat(source_fd).st_size
    os.ftruncate(target_fd, size_bytes)
    for start, end in data_ranges(source_fd, size_bytes):
        _copy_range(source_fd, target_fd, start, end)


def share_blocks(source_fd: int, target_fd: int) -> bool:
    """Make the empty file `target_fd` equal to `source_fd` by reflink (ioctl_ficlone); False where that cannot be."""
    try:
        fcntl.ioctl(target_fd, FICLONE, source_fd)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS):
            raise
        return False
    return True


def data_ranges(fd: int, size_bytes: int) -> Iterator[tuple[int, int]]:
    """Where a file holds data: (first byte, byte after the last), by lseek(2) SEEK_DATA and SEEK_HOLE."""
    position = 0
    while position < size_bytes:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        position = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, position


def _copy_range(source_fd: int, target_fd: int, start: int, end: int) -> None:
    while start < end:
        length = min(end - start, _COPY_BYTES)
        try:
            copied = os.copy_file_range(source_fd, target_fd, length, start, start)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            copied = os.pwrite(target_fd, os.pread(source_fd, min(length, 1 << 20), start), start)
        if copied == 0:
            raise OSError(errno.EIO, "the source became shorter while it was copied")
        start += copied


def sha256_of(path: Path) -> str:
    """In lower-case hexadecimal, of a file of any length (blocking)."""
    # It loads OpenSSL, which few of those who need this module do.
    import hashlib

    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def full_disk_is_exhausted(what: str, directory: Path) -> Iterator[None]:
    """Turn ENOSPC, EDQUOT and EFBIG into `Exhausted`: `what` says what could not be written in `directory`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        free_bytes = free_space_bytes(directory)
        raise Exhausted(
            f"cannot write {what} in {directory}: {(error.strerror or 'the disk is full').lower()}; "
            f"{free_bytes >> 20} MiB are free",
            hint=f"df -h {directory}",
            free_bytes=free_bytes,
        ) from error


def free_space_bytes(directory: Path) -> int:
    """Room left in a filesystem for ordinary writers."""
    state = os.statvfs(directory)
    return state.f_bavail * state.f_frsize
