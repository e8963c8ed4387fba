"""What this host is and what it lets this process do. Every function asks anew and changes nothing."""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from triarch.errors import CommandFailed, MissingProgram
from triarch.host.process import run_async

KVM_API_VERSION = 12  # the only one there has ever been (Documentation/virt/kvm/api.rst)
_KVM_GET_API_VERSION = 0xAE00
_VERSION = re.compile(r"\d+(?:\.\d+)+[^\s,)]*")

# What makes a program tell its version; those without such an option are left out.
_VERSION_OPTIONS = {
    "conmon": "--version",
    "crun": "--version",
    "dnsmasq": "--version",
    "dumpe2fs": "-V",
    "e2fsck": "-V",
    "mkfs.ext4": "-V",
    "mmdebstrap": "--version",
    "nft": "--version",
    "qemu-img": "--version",
    "qemu-system-x86_64": "--version",
}


class Space(msgspec.Struct, frozen=True, kw_only=True):
    """Room on the filesystem that holds, or would hold, a directory. `path` is the part of it that exists."""

    path: Path
    free_bytes: int
    total_bytes: int
    writable: bool


def kernel_version() -> tuple[int, int]:
    """Major and minor number; (0, 0) for a release that begins with no number."""
    match = re.match(r"(\d+)\.(\d+)", os.uname().release)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def knows_filesystem(kind: str) -> bool:
    """Whether the kernel has this filesystem, built in, loaded, or as a module that it would load."""
    known = {line.split()[-1] for line in _text("/proc/filesystems").splitlines() if line.strip()}
    return kind in known or _has_module(kind)


def _has_module(name: str) -> bool:
    listing = _text(f"/lib/modules/{os.uname().release}/modules.dep")
    return re.search(rf"/{re.escape(name)}\.ko(?:\.\w+)?:", listing) is not None


def open_error(path: str) -> str | None:
    """None when the device opens for reading and writing, else why not in the system's words."""
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK))
    except OSError as error:
        return (error.strerror or str(error)).lower()
    return None


def memory_bytes() -> int:
    """The memory of this host."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def kvm_api_version() -> int:
    """What /dev/kvm answers. Raises `OSError`. It says nothing of whether guests run: only a guest does."""
    fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    try:
        return fcntl.ioctl(fd, _KVM_GET_API_VERSION, 0)
    finally:
        os.close(fd)


def xen_role() -> str | None:
    """`dom0` or `domU` when this kernel runs on Xen, else None."""
    if _text("/sys/hypervisor/type").strip() != "xen" and not Path("/proc/xen").is_dir():
        return None
    return "dom0" if "control_d" in _text("/proc/xen/capabilities") else "domU"


def space_at(directory: str | Path) -> Space:
    """Raises `OSError`. May block for as long as a network filesystem does."""
    path = Path(directory)
    while not path.exists() and path != path.parent:
        path = path.parent
    status = os.statvfs(path)
    return Space(
        path=path,
        free_bytes=status.f_bavail * status.f_frsize,
        total_bytes=status.f_blocks * status.f_frsize,
        writable=os.access(path, os.W_OK | os.X_OK),
    )


async def program_version(name: str, timeout_seconds: float) -> str | None:
    """The version that a program tells, or None when it tells none. Raises `MissingProgram`, `CommandFailed`.

    Raises `TimeoutError` too; the program is then ended.
    """
    option = _VERSION_OPTIONS.get(name)
    if option is None:
        return None
    lines: list[str] = []
    async with asyncio.timeout(timeout_seconds):
        output = await run_async([name, option], on_line=lines.append)
    match = _VERSION.search("\n".join([output.decode(errors="replace"), *lines]))
    return match[0] if match else None


async def user_namespace_error(timeout_seconds: float) -> str | None:
    """Make a user and a network namespace for a moment; None when that works, else why not."""
    return await _namespace_error(("--user", "--net"), timeout_seconds)


async def subordinate_ids_error(timeout_seconds: float) -> str | None:
    """Become root over this user's subordinate ids (subuid(5)) and mount /proc there; None when that works."""
    options = ("--map-root-user", "--map-auto", "--mount", "--pid", "--fork", "--mount-proc")
    return await _namespace_error(options, timeout_seconds)


async def _namespace_error(options: Sequence[str], timeout_seconds: float) -> str | None:
    try:
        async with asyncio.timeout(timeout_seconds):
            await run_async(("unshare", *options, "true"))
    except CommandFailed as error:
        return error.stderr_tail.rpartition(": ")[2].lower() or error.message
    except (MissingProgram, TimeoutError) as error:
        return str(error) or f"no answer in {timeout_seconds:g} seconds"
    return None


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def boot_id() -> str:
    """Of this boot of the host (random(4)): another one after each."""
    return _text("/proc/sys/kernel/random/boot_id").strip()
