"""Limits of a machine and the sizes that people write."""

from __future__ import annotations

import re
from typing import Annotated

import msgspec

from triarch.errors import Invalid

_SIZE = re.compile(r"(\d{1,19})(?:\.(\d{1,19}))?\s*([KMGT]?)(?:i?B)?\Z", re.IGNORECASE | re.ASCII)
_FACTOR = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}

MIN_MEMORY_BYTES = 16 << 20
MIN_DISK_BYTES = 64 << 20

Cpus = Annotated[float, msgspec.Meta(gt=0, le=4096)]
MemoryBytes = Annotated[int, msgspec.Meta(ge=MIN_MEMORY_BYTES, le=1 << 46)]
Pids = Annotated[int, msgspec.Meta(ge=16, le=1 << 22)]
IoWeight = Annotated[int, msgspec.Meta(ge=10, le=1000)]
DiskBytes = Annotated[int, msgspec.Meta(ge=MIN_DISK_BYTES, le=1 << 46)]
SwapBytes = Annotated[int, msgspec.Meta(ge=0, le=1 << 46)]
CpuWeight = Annotated[int, msgspec.Meta(ge=1, le=10_000)]
CpuSet = Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,4}(-[0-9]{1,4})?(,[0-9]{1,4}(-[0-9]{1,4})?){0,63}$(?!\n)")]
RateBytesPerSecond = Annotated[int, msgspec.Meta(ge=1 << 10, le=1 << 40)]


class Resources(msgspec.Struct, frozen=True, kw_only=True):
    """What a machine may use. None means: as much as the host has (a VM then gets the driver's default).

    `cpus` counts host processors and may be a fraction; `cpu_set` pins to processors of the host (`0-3,6`, cpuset(7)).
    `cpu_weight` and `io_weight` are relative, 100 is the ordinary share. `swap_bytes` comes on top of `memory_bytes`; 0
    forbids swapping, None allows as much swap as memory where that has a limit. Rates are those of the delta's disk and
    of the first network card; receive is towards the machine.
    """

    cpus: Cpus | None = None
    cpu_weight: CpuWeight | None = None
    cpu_set: CpuSet | None = None
    memory_bytes: MemoryBytes | None = None
    swap_bytes: SwapBytes | None = None
    pids: Pids | None = None
    io_weight: IoWeight | None = None
    io_read_bytes_per_second: RateBytesPerSecond | None = None
    io_write_bytes_per_second: RateBytesPerSecond | None = None
    network_receive_bytes_per_second: RateBytesPerSecond | None = None
    network_send_bytes_per_second: RateBytesPerSecond | None = None
    disk_bytes: DiskBytes = 10 << 30


def parse_size(text: str) -> int:
    """Bytes of `512M`, `2G`, `1.5GiB`, `1048576`; units are powers of 1,024. Raises `Invalid`."""
    match = _SIZE.match(text.strip())
    if match is None:
        raise Invalid(f"illegal size {text[:80]!r}: it needs a number with K, M, G or T, such as 512M")
    whole, fraction, factor = int(match[1]), match[2] or "0", _FACTOR[match[3].upper()]
    size_bytes = whole * factor + int(fraction + "0" * (19 - len(fraction))) * factor // 10**19
    if size_bytes >= 1 << 63:
        raise Invalid(f"illegal size {text[:80]!r}: it needs to be less than 8388608T")
    return size_bytes


def format_size(size_bytes: int) -> str:
    """`512.0 MiB`: one decimal, powers of 1,024."""
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{int(value)} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
