"""Whether QEMU runs guests here: by running some, each for a moment."""

from __future__ import annotations

import asyncio
import re
import struct
import tempfile
from pathlib import Path

from triarch.drivers.qemu.cmdline import PROGRAM, Accelerator
from triarch.errors import CommandFailed, DriverUnavailable
from triarch.guest.cpio import file, write_archive
from triarch.guest.pack import KERNEL_FILE, default_cache, pack_key
from triarch.host.kvm import DEVICE, groups_that_may_open, why_guests_do_not_run
from triarch.host.process import run_async

_VERSION = re.compile(r"version (\d+(?:\.\d+)+)")
_FIRMWARE_SECONDS = 20.0
_KERNEL_SECONDS = 5.0
_FIRMWARE_BYTES = 64 << 10
_RESET_VECTOR = _FIRMWARE_BYTES - 16

# A byte written to this device ends QEMU with the exit code 2 * byte + 1.
_EXIT_PORT, _EXIT_BYTE = 0xF4, 0x15
_EXIT_CODE = 2 * _EXIT_BYTE + 1
_LEAVE = bytes((0xB0, _EXIT_BYTE, 0xE6, _EXIT_PORT, 0xEB, 0xFE))  # mov al, BYTE; out PORT, al; jmp self
_COMMON = (
    *("-smp", "1", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
    *("-device", f"isa-debug-exit,iobase={_EXIT_PORT:#x},iosize=4"),
)
_SYS_IOPERM = 173
_LOAD_ADDRESS = 0x400000


async def try_accelerator(accelerator: Accelerator, *, as_others: bool) -> str:
    """QEMU's version. Raises `MissingProgram`, or `DriverUnavailable` with the reason.

    `as_others`: machines run as users of their own, who have to get at the device as well.
    """
    output = (await run_async((PROGRAM, "--version"))).decode(errors="replace")
    match = _VERSION.search(output)
    if match is None:
        raise DriverUnavailable(f"{PROGRAM} does not tell its version")
    if accelerator is Accelerator.KVM:
        await _try_kvm(as_others=as_others)
    else:
        await _try_firmware()
    return match[1]


async def _try_firmware() -> None:
    """A firmware of a few instructions under TCG: 0.1 s."""
    with tempfile.TemporaryDirectory(prefix="triarch-probe-") as directory:
        firmware = Path(directory) / "firmware"
        firmware.write_bytes(bytes(_RESET_VECTOR) + _LEAVE.ljust(16, b"\0"))
        machine = ("-M", "q35", "-accel", "tcg", "-m", "16")
        await _run((PROGRAM, *machine, *_COMMON, "-bios", str(firmware)), _FIRMWARE_SECONDS)


async def _try_kvm(*, as_others: bool) -> None:
    """First a loop on the bare device, then, where the guest pack is there already, its kernel up to user space."""
    reason = await asyncio.to_thread(why_guests_do_not_run)
    if reason is not None:
        raise DriverUnavailable(f"KVM cannot run guests here: {reason}", hint="triarch create --as hosted")
    if as_others and groups_that_may_open() is None:
        raise DriverUnavailable(
            f"KVM works, but QEMU runs unprivileged and no group but root's may open {DEVICE}",
            hint=f"chgrp kvm {DEVICE} && chmod 0660 {DEVICE}",
        )
    kernel = default_cache() / pack_key() / KERNEL_FILE
    if kernel.exists():
        await try_kernel(kernel, Accelerator.KVM, _KERNEL_SECONDS)


async def try_kernel(kernel: Path, accelerator: Accelerator, limit_seconds: float) -> None:
    """Boot a Linux kernel whose init leaves at once. Raises `DriverUnavailable` when it does not get there."""
    with tempfile.TemporaryDirectory(prefix="triarch-probe-") as directory:
        initrd = Path(directory) / "initrd"
        initrd.write_bytes(write_archive((file("init", _leaving_program(), 0o755),)))
        machine = ("-M", "q35", "-accel", accelerator.value, "-cpu", "max", "-m", "128")
        boot = ("-kernel", str(kernel), "-initrd", str(initrd), "-append", "quiet panic=-1 mitigations=off")
        await _run((PROGRAM, *machine, *_COMMON, *boot), limit_seconds)


async def _run(argv: tuple[str, ...], limit_seconds: float) -> None:
    try:
        async with asyncio.timeout(limit_seconds):
            await run_async(argv)
    except TimeoutError as error:
        raise DriverUnavailable(f"a test guest of QEMU did not finish within {limit_seconds:g} s") from error
    except CommandFailed as error:
        if error.returncode == _EXIT_CODE:
            return
        raise DriverUnavailable(f"QEMU cannot run guests here: {error.message}") from error
    raise DriverUnavailable("a test guest of QEMU ended before it came to its last instruction")


def _leaving_program() -> bytes:
    """A static ELF file: ioperm(EXIT_PORT, 4, 1), then leave."""
    code = b"".join(
        (
            b"\xb8" + struct.pack("<I", _SYS_IOPERM),  # mov eax, ioperm
            b"\xbf" + struct.pack("<I", _EXIT_PORT),  # mov edi, EXIT_PORT
            b"\xbe" + struct.pack("<I", 4),  # mov esi, 4
            b"\xba" + struct.pack("<I", 1),  # mov edx, 1
            b"\x0f\x05",  # syscall
            _LEAVE,
        )
    )
    header_bytes, program_bytes = 64, 56
    begin = header_bytes + program_bytes
    size = begin + len(code)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH",
        *(b"\x7fELF\x02\x01\x01", 2, 62, 1, _LOAD_ADDRESS + begin, header_bytes, 0),
        *(0, header_bytes, program_bytes, 1, 0, 0, 0),
    )
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _LOAD_ADDRESS, _LOAD_ADDRESS, size, size, 0x1000)
    return header + segment + code
