"""What the host as a whole uses, from proc(5)."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")


class HostUsage(msgspec.Struct, frozen=True, kw_only=True):
    """`cpu_seconds` is busy time of all processors since the host's boot; `load` is that of the last minute."""

    cpus: int
    cpu_seconds: float
    memory_bytes: int
    memory_available_bytes: int
    load: float


def host_usage() -> HostUsage:
    """Raises `OSError` where there is no /proc."""
    # user, nice, system, idle, iowait, irq, softirq, steal; guests are in the first two already.
    ticks = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    sizes = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    return HostUsage(
        cpus=os.cpu_count() or 1,
        cpu_seconds=(sum(ticks) - ticks[3] - ticks[4]) / _TICKS_PER_SECOND,
        memory_bytes=int(sizes["MemTotal"].split()[0]) << 10,
        memory_available_bytes=int(sizes["MemAvailable"].split()[0]) << 10,
        load=os.getloadavg()[0],
    )
