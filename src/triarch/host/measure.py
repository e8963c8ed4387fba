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
    """Processor time since it began, and the memory that is its own: not files, whoever else maps them.

    Of the disk counts what missed the page cache; None where that may not be seen (/proc/PID/io).
    """

    cpu_seconds: float
    memory_bytes: int
    swap_bytes: int
    disk_read_bytes: int | None
    disk_written_bytes: int | None


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
    sizes = {line.partition(":")[0]: line for line in status.splitlines()}
    bytes_of = {name: int(sizes[name].split()[1]) << 10 for name in _PRIVATE if name in sizes}
    read, written = _disk(directory)
    return ProcessUsage(
        cpu_seconds=ticks / _TICKS_PER_SECOND,
        memory_bytes=sum(bytes_of.values()),
        swap_bytes=bytes_of.get("VmSwap", 0),
        disk_read_bytes=read,
        disk_written_bytes=written,
    )


def _disk(directory: Path) -> tuple[int | None, int | None]:
    try:
        values = dict(line.split(": ", 1) for line in (directory / "io").read_text().splitlines())
        return int(values["read_bytes"]), int(values["write_bytes"])
    except (OSError, KeyError, ValueError):
        return None, None
