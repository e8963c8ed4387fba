"""ext4 images of deltas: made once per size, checked after every use. No mount is needed for either."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import msgspec

from triarch.errors import CommandFailed, Damaged
from triarch.host.process import run

# Named one by one, so that the host's /etc/mke2fs.conf does not decide what a Debian 12 guest (kernel 6.1) must mount.
# Without resize_inode an empty image takes 0.25 MiB instead of 4.3; a 64bit filesystem still grows online (meta_bg).
_FEATURES = (
    "none,has_journal,ext_attr,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,dir_nlink,"
    "extra_isize,metadata_csum"
)
_MKFS = (
    "mkfs.ext4", "-q", "-F", "-b", "4096", "-I", "256", "-m", "0", "-J", "size=4", "-O", _FEATURES,
    "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard,root_owner=0:0",
)  # fmt: skip

_SUPERBLOCK_OFFSET = 1024
_MAGIC = 0xEF53
_STATE_CLEAN, _STATE_ERRORS = 0x1, 0x2
_INCOMPAT_RECOVER = 0x4


class Superblock(msgspec.Struct, frozen=True, kw_only=True):
    """What an ext4 superblock says of its own health. `needs_recovery`: the journal has to be replayed first."""

    needs_recovery: bool
    clean: bool


def make_delta_image(path: Path, size_bytes: int) -> None:
    """Make an empty delta in the new file `path`: sparse, with `/upper` and `/work`, both 0755 and owned by 0:0.

    debugfs makes the directories, so that neither a mount nor root is needed. Raises `OSError` (a full disk),
    `CommandFailed`.
    """
    _make_image(path, size_bytes, b"mkdir upper\nmkdir work\n")
    if not _has_layout(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def make_volume_image(path: Path, size_bytes: int) -> None:
    """Make an empty filesystem of a machine's own in the new file `path`. Raises as `make_delta_image`."""
    _make_image(path, size_bytes, b"rmdir lost+found\n")


def _make_image(path: Path, size_bytes: int, commands: bytes) -> None:
    """An ext4 filesystem in a new sparse file, and debugfs(8) commands on it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, size_bytes)
    finally:
        os.close(fd)
    try:
        run([*_MKFS, str(path)])
        run(["debugfs", "-w", "-f", "-", str(path)], input_bytes=commands)
    except CommandFailed as error:
        if "No space left" in error.stderr_tail or "Disk quota" in error.stderr_tail:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise


def _has_layout(path: Path) -> bool:
    """Whether the directories `/upper` and `/work` are there (a guest may have changed their modes)."""
    listing = run(["debugfs", "-R", "ls -p /", str(path)]).decode(errors="replace").splitlines()
    # "/INODE/MODE/UID/GID/NAME/SIZE/"
    entries = [line.split("/") for line in listing]
    found = {fields[5] for fields in entries if len(fields) > 5 and fields[2].startswith("04")}
    return {"upper", "work"} <= found


def read_superblock(path: Path) -> Superblock:
    """Read the health of the ext4 image `path`. Raises `Damaged` where there is no ext4."""
    with path.open("rb") as image:
        image.seek(_SUPERBLOCK_OFFSET)
        block = image.read(1024)
    if len(block) < 1024 or struct.unpack_from("<H", block, 0x38)[0] != _MAGIC:
        raise Damaged(f"{path} holds no ext4 filesystem", path=str(path))
    (state,) = struct.unpack_from("<H", block, 0x3A)
    (incompat,) = struct.unpack_from("<I", block, 0x60)
    return Superblock(
        needs_recovery=bool(incompat & _INCOMPAT_RECOVER),
        clean=bool(state & _STATE_CLEAN) and not state & _STATE_ERRORS,
    )


def check_filesystem(path: Path, *, is_delta: bool = True) -> None:
    """Replay the journal where a kill left one, mend what is safe to mend, then prove the filesystem clean.

    A filesystem that is no delta (a volume) need not have a delta's directories.

    Both proofs count: `e2fsck -fn` can be content with a filesystem that still needs recovery (RECIPES-vms). The
    caller holds the image's lock. Raises `Damaged` with e2fsck's last words.
    """
    found = read_superblock(path)
    if not found.needs_recovery and found.clean and _passes(path):
        return
    try:
        run(["e2fsck", "-f", "-p", str(path)])
    except CommandFailed as error:
        # 1: mended; 2: mended, and a mounted root would want a reboot (e2fsck(8))
        if error.returncode not in (1, 2):
            raise _damaged(path, error) from error
    found = read_superblock(path)
    if found.needs_recovery or not found.clean:
        raise Damaged(f"{path} still needs recovery after e2fsck", path=str(path))
    _passes(path, required=True)
    if is_delta and not _has_layout(path):
        raise Damaged(f"e2fsck mended {path}, but its directory upper or work is lost", path=str(path))


def _passes(path: Path, *, required: bool = False) -> bool:
    try:
        run(["e2fsck", "-f", "-n", str(path)])
    except CommandFailed as error:
        if required:
            raise _damaged(path, error) from error
        return False
    return True


def _damaged(path: Path, error: CommandFailed) -> Damaged:
    detail = next((line for line in error.stderr_tail.splitlines()[::-1] if line.strip()), f"e2fsck {error.returncode}")
    return Damaged(
        f"the filesystem in {path} is damaged beyond what e2fsck mends by itself: {detail.strip()}",
        hint=f"e2fsck -f {path}",
        path=str(path),
    )
