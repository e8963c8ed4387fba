"""Taking times by turns, and adding up memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec

Measurement = Callable[[], float]

# What the kernel holds for namespaces, mounts, control groups, loop devices and processes and cannot drop, and files on
# a tmpfs.
_KERNEL_FIELDS = frozenset(("SUnreclaim", "KernelStack", "PageTables", "Percpu", "Shmem"))


class Samples(msgspec.Struct, frozen=True):
    """What repeated measurements gave, all in one unit."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def scaled(self, factor: float) -> Samples:
        return Samples(tuple(value * factor for value in self.values))


class Pair(msgspec.Struct, frozen=True, kw_only=True):
    """The peer's samples and ours, taken by turns."""

    theirs: Samples
    ours: Samples


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """The host's memory at one moment (proc_meminfo(5))."""

    kernel_bytes: int
    available_bytes: int


def alternate(rounds: int, theirs: Measurement, ours: Measurement) -> Pair:
    """Measure A B A B …; one round before that warms caches and does not count."""
    pairs = [(theirs(), ours()) for _ in range(rounds + 1)][1:]
    return Pair(theirs=Samples(tuple(a for a, _ in pairs)), ours=Samples(tuple(b for _, b in pairs)))


def by_turns(rounds: int, theirs: Callable[[], object], ours: Callable[[], object]) -> Pair:
    """As `alternate`, where all that the two do counts."""
    return alternate(rounds, lambda: seconds(theirs), lambda: seconds(ours))


def repeat(rounds: int, measurement: Measurement) -> Samples:
    """Measure what has no peer; the first time does not count."""
    return Samples(tuple([measurement() for _ in range(rounds + 1)][1:]))


def seconds(action: Callable[[], object]) -> float:
    """How long `action` takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def memory() -> Memory:
    """The host's memory now."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    fields = {words[0].rstrip(":"): int(words[1]) << 10 for words in lines}
    return Memory(
        kernel_bytes=sum(fields[name] for name in _KERNEL_FIELDS & fields.keys()),
        available_bytes=fields["MemAvailable"],
    )


def pss_bytes(pids: Iterable[int]) -> int:
    """The processes' memory, where a page that N processes map counts 1/N to each (proc_pid_smaps(5))."""
    total = 0
    for pid in pids:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    return total
