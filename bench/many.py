"""Two hundred containers at once: what each takes of the host, and whether the last is as quick as the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import msgspec

from bench.crun import Crun
from bench.ground import IDLE, TEMPLATE, Ground
from bench.measure import Memory, Samples, memory, pss_bytes, seconds
from bench.report import Row
from triarch.host.pidfd import find_by_argument
from triarch.model.machine import CreateMachine

CONTAINERS = 200
BATCH = 50


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """Containers that were started one after another, and what the host had before and after them."""

    start_seconds: tuple[float, ...]
    before: Memory
    after: Memory

    @property
    def kernel_bytes(self) -> float:
        """Per container."""
        return (self.after.kernel_bytes - self.before.kernel_bytes) / len(self.start_seconds)

    @property
    def taken_bytes(self) -> float:
        """Per container, by what the host has left for others."""
        return (self.before.available_bytes - self.after.available_bytes) / len(self.start_seconds)


def many(ground: Ground) -> Iterator[Row]:
    """Batches by turns, so that either is measured while as many of both run already."""
    client = ground.client
    names = [f"bench-many-{number}" for number in range(CONTAINERS)]

    def launch(name: str) -> None:
        request = CreateMachine(template=TEMPLATE, name=name, architecture="container", command=IDLE, start=True)
        client.finish(client.create(request))

    def delete(name: str) -> None:
        client.finish(client.delete(name, force=True))

    with Crun(ground) as crun:
        peers = [crun.bundle() for _ in names]
        theirs, ours = [], []
        for at in range(0, CONTAINERS, BATCH):
            theirs.append(_start(crun.start, peers[at : at + BATCH]))
            ours.append(_start(launch, names[at : at + BATCH]))
        yield from _start_rows(theirs, ours)
        yield from _memory_rows(theirs, ours, [_monitor(client.machine(name).uuid) for name in names])
        deletes = [
            (
                seconds(partial(crun.delete, peer)),
                seconds(partial(delete, name)),
            )
            for peer, name in zip(peers, names, strict=True)
        ]
    yield Row(
        what=f"delete one of {CONTAINERS} that run",
        unit="ms",
        peer="crun delete -f + unmount",
        theirs=Samples(tuple(a for a, _ in deletes)),
        ours=Samples(tuple(b for _, b in deletes)),
        at_most_times=2.0,
    )


def _start(start: Callable[[str], None], names: Sequence[str]) -> Batch:
    before = memory()
    start_seconds = tuple(seconds(partial(start, name)) for name in names)
    return Batch(start_seconds=start_seconds, before=before, after=memory())


def _start_rows(theirs: Sequence[Batch], ours: Sequence[Batch]) -> Iterator[Row]:
    yield Row(
        what=f"launch (create and start) up to {CONTAINERS} at once, over the API",
        unit="ms",
        peer="overlay + crun run",
        theirs=_all_starts(theirs),
        ours=_all_starts(ours),
        at_most_times=2.0,
    )
    yield Row(
        what=f"launch, the last {BATCH} of {CONTAINERS}",
        unit="ms",
        peer=f"Triarch's first {BATCH}",
        theirs=Samples(ours[0].start_seconds),
        ours=Samples(ours[-1].start_seconds),
    )


def _all_starts(batches: Sequence[Batch]) -> Samples:
    return Samples(tuple(taken for batch in batches for taken in batch.start_seconds))


def _memory_rows(theirs: Sequence[Batch], ours: Sequence[Batch], monitors: Sequence[int]) -> Iterator[Row]:
    monitor_bytes = pss_bytes(monitors) / len(monitors)
    own = [child for monitor in monitors for child in _children(monitor)]
    own_bytes = pss_bytes(own) / len(monitors)
    own_tables_bytes = sum(_page_table_bytes(pid) for pid in own) / len(monitors)
    yield Row(
        what=f"memory beside its own process, each of {CONTAINERS}: conmon's PSS and the kernel's",
        unit="KiB",
        peer="crun (no monitor)",
        theirs=Samples(tuple(batch.kernel_bytes - own_tables_bytes for batch in theirs)),
        ours=Samples(tuple(batch.kernel_bytes - own_tables_bytes + monitor_bytes for batch in ours)),
        at_most=1024,
    )
    yield Row(
        what="the same by MemAvailable (whatever else the host does counts too)",
        unit="KiB",
        peer="crun (no monitor)",
        theirs=Samples(tuple(batch.taken_bytes - own_bytes - own_tables_bytes for batch in theirs)),
        ours=Samples(tuple(batch.taken_bytes - own_bytes - own_tables_bytes for batch in ours)),
    )


def _monitor(uuid: str) -> int:
    """conmon of the machine: the process with its uuid among its arguments."""
    (process,) = find_by_argument(uuid)
    return process.pid


def _children(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _page_table_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("VmPTE:"))


SECTION = (many,)
