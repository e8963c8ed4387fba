"""Whether guest code really runs on /dev/kvm (Documentation/virt/kvm/api.rst).

A device that opens proves nothing: where a hypervisor below only lets the kernel emulate instructions, a few of them
pass and a real guest takes for ever. So 20 million loops have to be done in 64-bit mode within a time limit, in a
process of their own that can be killed. This file is that process's program too; it imports nothing of Triarch.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import struct
import subprocess
import sys
from pathlib import Path

DEVICE = "/dev/kvm"
LOOPS = 20_000_000
_LIMIT_SECONDS = 1.5
_REAP_SECONDS = 0.3
_OK = "ok"

_API_VERSION = 12
_KVM_GET_API_VERSION = 0xAE00
_KVM_CREATE_VM = 0xAE01
_KVM_GET_VCPU_MMAP_SIZE = 0xAE04
_KVM_GET_SUPPORTED_CPUID = 0xC008AE05
_KVM_CREATE_VCPU = 0xAE41
_KVM_SET_TSS_ADDR = 0xAE47
_KVM_SET_USER_MEMORY_REGION = 0x4020AE46
_KVM_RUN = 0xAE80
_KVM_SET_REGS = 0x4090AE82
_KVM_GET_SREGS = 0x8138AE83
_KVM_SET_SREGS = 0x4138AE84
_KVM_SET_CPUID2 = 0x4008AE90

_EXIT_IO, _EXIT_HLT = 2, 5
_PORT = 0xF4
_MEMORY_BYTES = 2 << 20
_PML4, _PDPT, _DIRECTORY, _STACK, _CODE, _SCRATCH = 0x1000, 0x2000, 0x3000, 0x7000, 0x8000, 0x9000
_TSS_ADDRESS = 0x7FFBD000
_CPUID_ENTRIES = 100

_REGION = struct.Struct("<IIQQQ")  # kvm_userspace_memory_region
_SEGMENT = struct.Struct("<QIH10B")  # kvm_segment
_REGS_BYTES, _RSP, _RIP, _RFLAGS = 144, 6 * 8, 16 * 8, 17 * 8  # kvm_regs
_SREGS_BYTES, _CONTROL_REGISTERS = 312, 224  # kvm_sregs; cr0 cr2 cr3 cr4 cr8 efer
_RUN_EXIT_REASON, _RUN_IO = 8, 32  # kvm_run
_IO = struct.Struct("<BBHIQ")


def why_guests_do_not_run(loops: int = LOOPS, limit_seconds: float = _LIMIT_SECONDS) -> str | None:
    """None when a guest ran, else the reason (blocking; it never takes much longer than the limit)."""
    if not Path(DEVICE).exists():
        return f"there is no {DEVICE}"
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        return f"{DEVICE} may not be opened by user {os.geteuid()}"
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(loops)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        answer = child.communicate(timeout=limit_seconds)[0].decode(errors="replace").strip()
    except subprocess.TimeoutExpired:
        child.kill()
        # A process that hangs in the kernel is left to die when it can: a probe does not wait for it.
        try:
            child.communicate(timeout=_REAP_SECONDS)
        except subprocess.TimeoutExpired:
            child.returncode = -9
        return f"{DEVICE} opens, but a test guest did not finish within {limit_seconds:g} s"
    return None if answer == _OK else answer or f"{DEVICE} opens, but the test of it ended with {child.returncode}"


def groups_that_may_open() -> tuple[int, ...] | None:
    """With which supplementary groups a process without rights opens the device; None when there are none.

    Root's own group is not one to hand out.
    """
    device = Path(DEVICE).stat()
    if device.st_mode & 0o006 == 0o006:
        return ()
    return (device.st_gid,) if device.st_mode & 0o060 == 0o060 and device.st_gid != 0 else None


def _guest_code(loops: int) -> bytes:
    """Sum a loop, add one in memory, tell the sum through a port, halt."""
    scratch = struct.pack("<I", _SCRATCH)
    return b"".join(
        (
            b"\x31\xc0",  # xor eax, eax
            b"\xb9" + struct.pack("<I", loops),  # mov ecx, loops
            b"\x01\xc8\xff\xc9\x75\xfa",  # again: add eax, ecx; dec ecx; jnz again
            b"\x48\x89\x04\x25" + scratch,  # mov [scratch], rax
            b"\x48\x83\x04\x25" + scratch + b"\x01",  # add qword [scratch], 1
            b"\x48\x8b\x04\x25" + scratch,  # mov rax, [scratch]
            b"\xe7" + bytes((_PORT,)),  # out PORT, eax
            b"\xf4\xeb\xfd",  # hlt; jmp hlt
        )
    )


def _run_guest(loops: int) -> str:
    device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    version = fcntl.ioctl(device, _KVM_GET_API_VERSION)
    if version != _API_VERSION:
        return f"{DEVICE} speaks version {version}; {_API_VERSION} was needed"
    machine = fcntl.ioctl(device, _KVM_CREATE_VM, 0)
    memory = _make_memory(machine, loops)
    processor = fcntl.ioctl(machine, _KVM_CREATE_VCPU, 0)
    state = mmap.mmap(processor, fcntl.ioctl(device, _KVM_GET_VCPU_MMAP_SIZE))
    _enter_long_mode(device, processor)
    fcntl.ioctl(processor, _KVM_RUN, 0)
    (reason,) = struct.unpack_from("<I", state, _RUN_EXIT_REASON)
    if reason != _EXIT_IO:
        return f"a test guest on {DEVICE} stopped for reason {reason} instead of telling its sum"
    _, _, port, _, offset = _IO.unpack_from(state, _RUN_IO)
    (told,) = struct.unpack_from("<I", state, offset)
    if (port, told) != (_PORT, (loops * (loops + 1) // 2 + 1) & 0xFFFFFFFF):
        return f"a test guest on {DEVICE} computed a wrong sum ({told})"
    fcntl.ioctl(processor, _KVM_RUN, 0)
    (reason,) = struct.unpack_from("<I", state, _RUN_EXIT_REASON)
    memory.close()
    return _OK if reason == _EXIT_HLT else f"a test guest on {DEVICE} stopped for reason {reason} instead of halting"


def _make_memory(machine: int, loops: int) -> mmap.mmap:
    """2 MiB that map to themselves through one large page, with the code in them."""
    memory = mmap.mmap(-1, _MEMORY_BYTES)
    for table, entry in ((_PML4, _PDPT | 3), (_PDPT, _DIRECTORY | 3), (_DIRECTORY, 0x83)):
        struct.pack_into("<Q", memory, table, entry)
    code = _guest_code(loops)
    memory[_CODE : _CODE + len(code)] = code
    view = ctypes.c_char.from_buffer(memory)
    address = ctypes.addressof(view)
    del view
    fcntl.ioctl(machine, _KVM_SET_TSS_ADDR, _TSS_ADDRESS)
    fcntl.ioctl(machine, _KVM_SET_USER_MEMORY_REGION, _REGION.pack(0, 0, 0, _MEMORY_BYTES, address))
    return memory


def _enter_long_mode(device: int, processor: int) -> None:
    cpuid = bytearray(8 + 40 * _CPUID_ENTRIES)
    struct.pack_into("<I", cpuid, 0, _CPUID_ENTRIES)
    fcntl.ioctl(device, _KVM_GET_SUPPORTED_CPUID, cpuid)
    fcntl.ioctl(processor, _KVM_SET_CPUID2, cpuid)
    special = bytearray(_SREGS_BYTES)
    fcntl.ioctl(processor, _KVM_GET_SREGS, special)
    # type, present, dpl, db, s, l, g, avl, unusable, padding
    _SEGMENT.pack_into(special, 0, 0, 0xFFFFFFFF, 8, 11, 1, 0, 0, 1, 1, 1, 0, 0, 0)
    for data_segment in range(1, 6):
        place = data_segment * _SEGMENT.size
        _SEGMENT.pack_into(special, place, 0, 0xFFFFFFFF, 16, 3, 1, 0, 1, 1, 0, 1, 0, 0, 0)
    # Paging and protection; physical address extension; long mode enabled and active.
    struct.pack_into("<6Q", special, _CONTROL_REGISTERS, 0x80000011, 0, _PML4, 0x20, 0, 0x500)
    fcntl.ioctl(processor, _KVM_SET_SREGS, special)
    general = bytearray(_REGS_BYTES)
    for place, value in ((_RSP, _STACK), (_RIP, _CODE), (_RFLAGS, 2)):
        struct.pack_into("<Q", general, place, value)
    fcntl.ioctl(processor, _KVM_SET_REGS, general)


def main() -> None:
    try:
        print(_run_guest(int(sys.argv[1])))
    except OSError as error:
        print(f"{DEVICE} does not work: {(error.strerror or str(error)).lower()}")


if __name__ == "__main__":
    main()
