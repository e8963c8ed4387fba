"""What Debian's kernel package holds, in the form a VM boots quickest: the bare ELF kernel and a few modules."""

from __future__ import annotations

import lzma
import re
import struct
import zlib
from collections.abc import Callable, Iterable

from triarch.errors import Damaged
from triarch.host.process import run

_SECTOR_BYTES = 512
_DEPENDS = re.compile(rb"\0depends=([^\0]*)\0")
_SIGNATURE_MAGIC = b"~Module signature appended~\n"
_SIGNATURE_INFO_BYTES = 12
_PROGRAMS = {b"\x02\x21\x4c\x18": "lz4", b"\x28\xb5\x2f\xfd": "zstd"}


def extract_vmlinux(bzimage: bytes) -> bytes:
    """The ELF kernel inside a bzImage (kernel: Documentation/arch/x86/boot.rst); QEMU starts it through its PVH note.

    It skips the decompression that the guest would do itself, under TCG about a second. Raises `Damaged`.
    """
    if len(bzimage) < 1024 or bzimage[0x202:0x206] != b"HdrS":
        raise Damaged("the kernel package holds no bzImage where one was expected")
    setup_sectors = bzimage[0x1F1] or 4
    offset, length = struct.unpack_from("<II", bzimage, 0x248)
    start = (setup_sectors + 1) * _SECTOR_BYTES + offset
    payload = bzimage[start : start + length]
    kernel = _decompress(payload)
    if kernel[:4] != b"\x7fELF":
        raise Damaged("the kernel package holds no ELF kernel")
    return kernel


def _decompress(payload: bytes) -> bytes:
    # The last four bytes are the length, appended by the kernel's build, which a program would take for another frame.
    try:
        if payload.startswith(b"\xfd7zXZ\0"):
            return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(payload)
        if payload.startswith(b"\x1f\x8b"):
            return zlib.decompressobj(31).decompress(payload)
    except (lzma.LZMAError, zlib.error) as error:
        raise Damaged(f"the kernel does not decompress: {error}") from error
    for magic, program in _PROGRAMS.items():
        if payload.startswith(magic):
            return run((program, "-dcq"), input_bytes=payload[:-4])
    raise Damaged(f"the kernel is compressed in an unknown way (it begins with {payload[:6].hex()})")


def order_modules(wanted: Iterable[str], read: Callable[[str], bytes | None]) -> dict[str, bytes]:
    """`wanted` modules and what they depend on, in an order in which they load.

    `read` gives a module's content, None for one that is built into the kernel.
    """
    ordered: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in ordered or (data := read(name)) is None:
            return
        match = _DEPENDS.search(data)
        for dependency in match[1].decode().split(",") if match else ():
            if dependency:
                # Its file's name; the kernel's own has no hyphens.
                add(dependency.replace("-", "_"))
        ordered[name] = data

    for name in wanted:
        add(name)
    return ordered


def without_signature(module: bytes) -> bytes:
    """The module without the signature at its end (kernel: Documentation/admin-guide/module-signing.rst).

    The initramfs comes from the host, which the guest trusts anyway; checking a dozen signatures under TCG costs more
    than a tenth of a whole boot.
    """
    if not module.endswith(_SIGNATURE_MAGIC):
        return module
    end = len(module) - len(_SIGNATURE_MAGIC)
    (length,) = struct.unpack_from(">I", module, end - 4)
    return module[: end - _SIGNATURE_INFO_BYTES - length]
