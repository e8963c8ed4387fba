"""How long a snapshot holds a running container still."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.ground import Ground
from bench.measure import Samples
from bench.report import Row
from triarch.host.files import share_blocks
from triarch.model.snapshot import CreateSnapshot

_AT_MOST_MS = 50.0
# It writes all the time, as a machine does that is worth a snapshot.
_BUSY = ("sh", "-c", "n=0; while :; do n=$((n + 1)); echo $n >> /root/f$((n % 100)); done")


def _can_reflink(directory: Path) -> bool:
    with tempfile.TemporaryFile(dir=directory) as source, tempfile.TemporaryFile(dir=directory) as target:
        source.write(bytes(4096))
        source.flush()
        return share_blocks(source.fileno(), target.fileno())


def frozen(ground: Ground) -> Iterator[Row]:
    """The promise is for pools that can reflink; elsewhere the machine stands still while its delta is copied."""
    with ground.machine("bench-still", _BUSY, start=True, memory_bytes=256 << 20) as view:
        seconds = []
        for number in range(ground.few_rounds):
            name = f"bench{number}"
            ground.client.finish(ground.client.snapshots.create(view.name, CreateSnapshot(name=name)))
            frozen_seconds = ground.client.snapshots.get(view.name, name).frozen_seconds
            assert frozen_seconds is not None
            seconds.append(frozen_seconds)
    reflinks = _can_reflink(Path(ground.instance.state_dir) / "pool")
    yield Row(
        what=f"a snapshot of a container that writes holds it still ({'reflink' if reflinks else 'no reflink here'})",
        unit="ms",
        ours=Samples(tuple(seconds)),
        at_most=_AT_MOST_MS if reflinks else None,
    )


SECTION = (frozen,)
