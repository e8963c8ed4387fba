"""What one process uses, from proc(5)."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from triarch.errors import Unavailable
from triarch.host.pidfd import ProcessId, is_alive

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
# A guest whose memory virtiofsd shares has it in a memfd.
_PRIVATE = ("RssAnon", "RssShmem", "VmSwap")


class ProcessUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Processor time since it began, and the memory that is its own: not files, whoever else maps them."""

    cpu_seconds: float
    memory_bytes: int


def measure(process: ProcessId) -> ProcessUsage:
    """What the process uses now. Raises `Unavailable` when it has ended."""
    directory = Path(f"/proc/{process.pid}")
    try:
        stat = (directory / "stat").read_text(errors="replace").rpartition(")")[2].split()
        status = (directory / "status").read_text(errors="replace")
    except OSError as error:
        raise Unavailable(f"process {process.pid} has ended") from error
    if not is_alive(process):
        raise Unavailable(f"process {process.pid} has ended")
    # User and system time are fields 14 and 15; the split begins with field 3.
    ticks = int(stat[11]) + int(stat[12])
    kibibytes = sum(int(line.split()[1]) for line in status.splitlines() if line.partition(":")[0] in _PRIVATE)
    return ProcessUsage(cpu_seconds=ticks / _TICKS_PER_SECOND, memory_bytes=kibibytes << 10)
