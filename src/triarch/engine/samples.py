"""Looks at what machines use: the latest two of each, and those of the last minutes."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, datetime

from triarch.model.driver import Usage
from triarch.model.machine import Machine
from triarch.model.usage import HISTORY_SECONDS, SAMPLE_SECONDS, MachineUsage, Sample

_RING_SIZE = int(HISTORY_SECONDS / SAMPLE_SECONDS)
# Looks that somebody asked for in between do not push the others out of the ring.
_CLOSEST_SECONDS = SAMPLE_SECONDS * 0.8


@dataclass(frozen=True, slots=True)
class Look:
    """`at` is seconds since 1970, `run` names the run that was looked at."""

    at: float
    run: str
    usage: Usage


@dataclass(slots=True)
class _Seen:
    latest: Look | None = None
    before: Look | None = None
    ring: deque[Sample] = field(default_factory=lambda: deque(maxlen=_RING_SIZE))
    in_ring: Look | None = None


class Samples:
    """By uuid, in memory only."""

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}

    def add(self, uuid: str, look: Look) -> None:
        seen = self._seen.setdefault(uuid, _Seen())
        if seen.latest is None or seen.latest.run != look.run:
            # Another run: nothing can be told from the difference.
            self._seen[uuid] = seen = _Seen(latest=look, ring=seen.ring, in_ring=look)
            return
        if look.at <= seen.latest.at:
            return
        seen.before, seen.latest = seen.latest, look
        if seen.in_ring is not None and look.at - seen.in_ring.at >= _CLOSEST_SECONDS:
            seen.ring.append(
                Sample(
                    at=datetime.fromtimestamp(look.at, UTC),
                    cpus=_rate(seen.in_ring, look, "cpu_seconds") or 0.0,
                    memory_bytes=look.usage.memory_bytes,
                )
            )
            seen.in_ring = look

    def forget_but(self, uuids: frozenset[str]) -> None:
        """Machines that do not run have no live figures; those that are gone have none at all."""
        for uuid in self._seen.keys() - uuids:
            del self._seen[uuid]

    def latest(self, uuid: str) -> Look | None:
        seen = self._seen.get(uuid)
        return None if seen is None else seen.latest

    def history(self, uuid: str) -> tuple[Sample, ...]:
        seen = self._seen.get(uuid)
        return () if seen is None else tuple(seen.ring)

    def row(self, machine: Machine) -> MachineUsage:
        """The machine in the live table."""
        seen = self._seen.get(machine.uuid) or _Seen()
        before, now = seen.before, seen.latest
        return MachineUsage(
            name=machine.name,
            uuid=machine.uuid,
            state=machine.state,
            architecture=machine.architecture,
            usage=None if now is None else now.usage,
            cpus=_rate(before, now, "cpu_seconds"),
            disk_read_rate=_rate(before, now, "disk_read_bytes"),
            disk_write_rate=_rate(before, now, "disk_written_bytes"),
            network_receive_rate=_rate(before, now, "network_received_bytes"),
            network_send_rate=_rate(before, now, "network_sent_bytes"),
        )


def _rate(before: Look | None, now: Look | None, name: str) -> float | None:
    """By how much a counter grew a second; None where there are no two looks at it, or it began anew."""
    if before is None or now is None or now.at <= before.at:
        return None
    first, second = getattr(before.usage, name), getattr(now.usage, name)
    if first is None or second is None or second < first:
        return None
    return float((second - first) / (now.at - before.at))
