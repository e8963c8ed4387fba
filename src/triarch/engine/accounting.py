"""Adding up what machines use, hour by hour: right across restarts of the daemon and of machines.

A machine's counters begin at zero with each run. What is charged is the difference to the last look, which is kept in
the store together with what was charged for it (a `Mark`): whatever ends the daemon, the next charges the rest, once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from typing import Any

import msgspec

from triarch.model.driver import Usage

HOUR_SECONDS = 3600
DAY_SECONDS = 24 * HOUR_SECONDS


class Hour(msgspec.Struct, frozen=True, array_like=True):
    """What one machine used in one hour of a day; `hour` is 0 to 23 (UTC)."""

    hour: int
    running_seconds: float = 0.0
    cpu_seconds: float = 0.0
    memory_byte_seconds: float = 0.0
    disk_byte_seconds: float = 0.0
    network_received_bytes: int = 0
    network_sent_bytes: int = 0
    disk_read_bytes: int = 0
    disk_written_bytes: int = 0

    def __add__(self, other: Hour) -> Hour:
        return Hour(self.hour, *(getattr(self, name) + getattr(other, name) for name in AMOUNTS))


AMOUNTS = Hour.__struct_fields__[1:]


class Day(msgspec.Struct, frozen=True, kw_only=True):
    """One machine on one day; name, labels and architecture are those it had last."""

    uuid: str
    name: str
    labels: dict[str, str] = {}
    hours: tuple[Hour, ...] = ()

    def with_hour(self, added: Hour) -> Day:
        """The same with `added` in its place."""
        hours = {hour.hour: hour for hour in self.hours}
        hours[added.hour] = hours[added.hour] + added if added.hour in hours else added
        return msgspec.structs.replace(self, hours=tuple(hours[number] for number in sorted(hours)))


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    """The last look at a machine: when (seconds since 1970), in which run, and what its counters were.

    `run` is None while the machine does not run; only its disk counts then.
    """

    at: float
    run: str | None = None
    cpu_seconds: float = 0.0
    memory_bytes: int = 0
    disk_bytes: int = 0
    network_received_bytes: int = 0
    network_sent_bytes: int = 0
    disk_read_bytes: int = 0
    disk_written_bytes: int = 0


class Charge(msgspec.Struct, frozen=True, kw_only=True):
    """An amount that belongs to one hour of one day; `day` is its date as ISO 8601 has it."""

    day: str
    hour: Hour


# What grows during a run and begins at zero with each, in `Usage`, `Mark` and `Hour`.
_COUNTERS = (
    "cpu_seconds",
    "network_received_bytes",
    "network_sent_bytes",
    "disk_read_bytes",
    "disk_written_bytes",
)


def mark_of(at: float, run: str | None, usage: Usage | None, disk_bytes: int) -> Mark:
    """What there is to remember of a look."""
    if run is None or usage is None:
        return Mark(at=at, disk_bytes=disk_bytes)
    counted = {name: getattr(usage, name) or 0 for name in _COUNTERS}
    return Mark(at=at, run=run, memory_bytes=usage.memory_bytes, disk_bytes=disk_bytes, **counted)


def charges(before: Mark | None, now: Mark, started_at: float | None = None) -> tuple[Charge, ...]:
    """What was used between two looks, split over the hours that it was used in.

    A run that was not there before is charged from `started_at`, or from `now` where that is unknown. Memory and disk
    are taken to have been what they were at the earlier look, or in a new run at the later one. A clock that was set
    back charges no time, and all that was counted.
    """
    same_run = before is not None and before.run is not None and before.run == now.run
    disk_from = now.at if before is None else min(before.at, now.at)
    run_from = disk_from
    if not same_run:
        began_at = min(now.at if started_at is None else started_at, now.at)
        run_from = began_at if before is None else max(disk_from, began_at)
    counted = {name: _grown(before, now, name, same_run=same_run) for name in _COUNTERS} if now.run is not None else {}
    memory_bytes = (before.memory_bytes if before is not None and same_run else now.memory_bytes) if now.run else 0
    disk_bytes = now.disk_bytes if before is None else before.disk_bytes
    running = {"running_seconds": 1.0, "memory_byte_seconds": float(memory_bytes)} if now.run is not None else {}
    return (
        *_spread(run_from, now.at, running, counted),
        *_spread(disk_from, now.at, {"disk_byte_seconds": float(disk_bytes)}, {}),
    )


def _grown(before: Mark | None, now: Mark, name: str, *, same_run: bool) -> float:
    """How far a counter went. One that went back has begun anew."""
    value: float = getattr(now, name)
    last: float = getattr(before, name) if same_run else 0
    return value - last if value >= last else value


def _spread(begin: float, end: float, per_second: dict[str, float], counted: dict[str, float]) -> Iterator[Charge]:
    """`per_second` counts for as long as it lasted; `counted` is shared out over the hours, nothing is lost of it."""
    left = {name: amount for name, amount in counted.items() if amount}
    pieces = list(_hours(begin, end))
    for number, (day, hour, seconds) in enumerate(pieces):
        last = number == len(pieces) - 1
        values: dict[str, Any] = {name: rate * seconds for name, rate in per_second.items()}
        for name, amount in left.items():
            share = amount if last else type(amount)(counted[name] * seconds / (end - begin))
            values[name] = share
            left[name] = amount - share
        if any(values.values()):
            yield Charge(day=day, hour=Hour(hour, **values))


def _hours(begin: float, end: float) -> Iterator[tuple[str, int, float]]:
    """Day, hour of the day and seconds of each piece of the time; one piece of none where begin is end."""
    at = begin
    while True:
        until = min(end, (at // HOUR_SECONDS + 1) * HOUR_SECONDS)
        moment = datetime.fromtimestamp(at, UTC)
        yield moment.date().isoformat(), moment.hour, until - at
        at = until
        if at >= end:
            return


def total(hours: Iterable[Hour]) -> Hour:
    """The sum; its `hour` says nothing."""
    result = Hour(0)
    for hour in hours:
        result = result + hour
    return result
