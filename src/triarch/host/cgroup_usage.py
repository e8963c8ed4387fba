"""What a control group used so far and holds now, from few and small files: the daemon asks often.

Kernel: Documentation/admin-guide/cgroup-v2.rst, cgroup-v1/{cpuacct,memory,blkio-controller}.rst.
"""

from __future__ import annotations

import os
from contextlib import suppress

import msgspec

from triarch.errors import Unavailable
from triarch.host.cgroup import cgroup_trees

_MICROSECONDS, _NANOSECONDS = 1_000_000, 1_000_000_000
_READ_BYTES = 16 << 10
# Version 1 says so of a group without a limit: the largest number of pages.
_NO_LIMIT_BYTES = 1 << 62
# What goes through a loop device goes through the disk below once more.
_LOOP_MAJOR = "7"


class CgroupUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Memory leaves out file cache that could be dropped at once. I/O is that of loop devices: a machine's own disks
    and its template; version 1 misses what the kernel writes out later. None where no controller counts it.
    """

    cpu_seconds: float
    memory_bytes: int
    memory_limit_bytes: int | None
    swap_bytes: int | None
    processes: int
    disk_read_bytes: int | None
    disk_written_bytes: int | None


def usage(path: str) -> CgroupUsage:
    """Raises `Unavailable` when the group does not exist or a controller is missing."""
    try:
        return _v2(path) if cgroup_trees().version == 2 else _v1(path)
    except (OSError, KeyError, ValueError) as error:
        raise Unavailable(f"cannot measure control group {path}: {error}") from error


def _v2(path: str) -> CgroupUsage:
    group = f"{cgroup_trees().roots[0]}{path}"
    read = written = None
    with suppress(OSError):
        read, written = parse_v2_io(_read(f"{group}/io.stat"))
    limit = _read(f"{group}/memory.max").strip()
    swap: int | None = None
    with suppress(OSError):
        swap = int(_read(f"{group}/memory.swap.current"))
    return CgroupUsage(
        cpu_seconds=counter(_read(f"{group}/cpu.stat"), "usage_usec") / _MICROSECONDS,
        memory_bytes=max(
            0, int(_read(f"{group}/memory.current")) - counter(_read(f"{group}/memory.stat"), "inactive_file")
        ),
        memory_limit_bytes=None if limit == "max" else int(limit),
        swap_bytes=swap,
        processes=int(_read(f"{group}/pids.current")),
        disk_read_bytes=read,
        disk_written_bytes=written,
    )


def _v1(path: str) -> CgroupUsage:
    controllers = cgroup_trees().controllers
    memory = f"{controllers['memory']}{path}"
    read = written = swap = None
    if "blkio" in controllers:
        with suppress(OSError):
            read, written = parse_v1_io(_read(f"{controllers['blkio']}{path}/blkio.throttle.io_service_bytes"))
    used = int(_read(f"{memory}/memory.usage_in_bytes"))
    with suppress(OSError):
        swap = max(0, int(_read(f"{memory}/memory.memsw.usage_in_bytes")) - used)
    limit = int(_read(f"{memory}/memory.limit_in_bytes"))
    return CgroupUsage(
        cpu_seconds=int(_read(f"{controllers['cpuacct']}{path}/cpuacct.usage")) / _NANOSECONDS,
        memory_bytes=max(0, used - counter(_read(f"{memory}/memory.stat"), "total_inactive_file")),
        memory_limit_bytes=limit if limit < _NO_LIMIT_BYTES else None,
        swap_bytes=swap,
        processes=int(_read(f"{controllers['pids']}{path}/pids.current")),
        disk_read_bytes=read,
        disk_written_bytes=written,
    )


def parse_v2_io(text: str) -> tuple[int, int]:
    """Bytes read and written on loop devices, from `7:3 rbytes=1 wbytes=2 rios=…` lines."""
    read = written = 0
    for line in text.splitlines():
        device, *pairs = line.split()
        if device.split(":")[0] == _LOOP_MAJOR:
            values = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
            read += int(values.get("rbytes", 0))
            written += int(values.get("wbytes", 0))
    return read, written


def parse_v1_io(text: str) -> tuple[int, int]:
    """Bytes read and written on loop devices, from `7:3 Read 1` lines."""
    totals = {"Read": 0, "Write": 0}
    for line in text.splitlines():
        device, _, rest = line.partition(" ")
        kind, _, value = rest.partition(" ")
        if device.split(":")[0] == _LOOP_MAJOR and kind in totals:
            totals[kind] += int(value)
    return totals["Read"], totals["Write"]


def counter(text: str, name: str) -> int:
    """The value of one line `NAME VALUE`, 0 where there is none."""
    for line in text.splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0


def _read(path: str) -> str:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, _READ_BYTES).decode()
    finally:
        os.close(fd)
