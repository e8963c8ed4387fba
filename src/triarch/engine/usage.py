"""What machines use: the live table, the last minutes, and the accounts, from a look at all of them every 5 s."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import msgspec

from triarch.drivers.base import Metered
from triarch.engine.accounting import DAY_SECONDS, HOUR_SECONDS, Charge, Day, Hour, Mark, charges, mark_of, total
from triarch.engine.metrics import OperationCounts, PoolFigures, exposition
from triarch.engine.operations import Operations
from triarch.engine.records import decode_entry
from triarch.engine.samples import Look, Samples
from triarch.engine.services import Services
from triarch.errors import Error, Exhausted, Invalid
from triarch.model.machine import Machine
from triarch.model.names import check_machine_name
from triarch.model.settings import LABEL_PATTERN
from triarch.model.state import State
from triarch.model.usage import SAMPLE_SECONDS, MachineUsage, UsageHistory, UsageRow
from triarch.storage.base import Pool
from triarch.store.base import Delete, Put, Write

log = logging.getLogger(__name__)

# How long the accounts are kept, by the hour.
KEPT_DAYS = 400
# Live figures that are no older are not asked for again.
_FRESH_SECONDS = 1.0
_FLUSH_SECONDS = 60.0
# After these the counters of a run are gone: they are read once more before.
_LAST_LOOK_VERBS = frozenset({"stop", "kill", "restart", "delete", "switch", "pause", "down"})
_DAYS, _MARKS = "usage/", "meters/"
_WRITES_AT_ONCE = 500
_BY_MACHINE, _BY_LABEL = "machine", "label"


class Usages:
    """`engine.usages`. One task looks at all running machines; everything else is answered from what it saw."""

    def __init__(self, services: Services, operations: Operations, clock: Callable[[], float] = time.time) -> None:
        self.operation_counts = OperationCounts()
        self._services = services
        self._operations = operations
        self._clock = clock
        self._samples = Samples()
        self._marks: dict[str, Mark] = {}
        self._days: dict[str, Day] = {}
        self._changed: set[str] = set()
        self._gone: set[str] = set()
        self._looked_at = 0.0
        self._flushed_at = 0.0
        self._looking = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []

    async def begin(self) -> None:
        """Go on from where the last daemon was."""
        for entry in await self._services.store.list(_MARKS):
            with suppress(Error):
                self._marks[entry.key.removeprefix(_MARKS)] = decode_entry(entry, Mark)
        self._tasks = [
            asyncio.create_task(self._look_forever(), name="usage"),
            asyncio.create_task(self._heed_operations(), name="usage-operations"),
        ]

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._tasks:
            try:
                await self.look()
                await self._flush()
            except Error:
                log.exception("cannot write the last figures of use; the next daemon goes on from those before")
        self._tasks = []

    # -- answers

    async def all(self) -> tuple[MachineUsage, ...]:
        """The live table, sorted by name."""
        if not self._fresh():
            await self.look()
        return tuple(self._samples.row(kept.value) for kept in self._services.machines.all())

    def history(self, name: str) -> UsageHistory:
        machine = self._services.machines.get(check_machine_name(name))
        return UsageHistory(name=name, samples=self._samples.history(machine.uuid))

    async def account(
        self,
        begin: datetime | None = None,
        end: datetime | None = None,
        by: str = _BY_MACHINE,
        machine: str | None = None,
        label: str | None = None,
    ) -> tuple[UsageRow, ...]:
        """What was used from `begin` (or 30 days ago) to `end` (or now), in whole hours that both lie in.

        `by` is `machine`, or `label:KEY` for one row per value of a label. `machine` and `label` (`KEY=VALUE`) select.
        Machines that are gone are there too. Raises `Invalid`.
        """
        key = _label_of(by)
        now = datetime.fromtimestamp(self._clock(), UTC)
        kept_since = now - timedelta(days=KEPT_DAYS)
        # Nothing is known of any other time, and a calendar has an end.
        until = now if end is None else min(max(_utc(end), kept_since), now)
        since = until - timedelta(days=30) if begin is None else max(_utc(begin), kept_since)
        if since > until:
            raise Invalid(f"illegal time span: {since.isoformat()} is after {until.isoformat()}")
        wanted = label.partition("=") if label is not None else None
        await self.look()
        await self._flush()
        first, last = int(since.timestamp()) // HOUR_SECONDS, int(until.timestamp()) // HOUR_SECONDS
        groups: dict[tuple[str, str], list[Hour]] = {}
        for day_start, day in await self._stored(first * HOUR_SECONDS, last * HOUR_SECONDS):
            if machine is not None and day.name != machine:
                continue
            if wanted is not None and day.labels.get(wanted[0]) != wanted[2]:
                continue
            group = (day.name, day.uuid) if key is None else (day.labels.get(key, ""), "")
            inside = [h for h in day.hours if first <= day_start // HOUR_SECONDS + h.hour <= last]
            groups.setdefault(group, []).extend(inside)
        span = (datetime.fromtimestamp(at * HOUR_SECONDS, UTC) for at in (first, last + 1))
        bounds = tuple(span)
        return tuple(_row(group[0], bounds[0], bounds[1], groups[group]) for group in sorted(groups) if groups[group])

    async def _stored(self, first: int, last: int) -> list[tuple[int, Day]]:
        """Days with the second since 1970 at which each begins."""
        found: list[tuple[int, Day]] = []
        oldest = int(self._clock()) // DAY_SECONDS - KEPT_DAYS
        for number in range(max(first // DAY_SECONDS, oldest), last // DAY_SECONDS + 1):
            date = datetime.fromtimestamp(number * DAY_SECONDS, UTC).date().isoformat()
            for entry in await self._services.store.list(f"{_DAYS}{date}/"):
                found.append((number * DAY_SECONDS, decode_entry(entry, Day)))
        return found

    async def metrics(self) -> str:
        """All figures in Prometheus' text format."""
        machines = await self.all()
        pool = self._services.pool
        free_bytes, used_bytes = await asyncio.to_thread(lambda: (pool.free_bytes(), _used_bytes(pool)))
        pools = (PoolFigures(name=pool.name, free_bytes=free_bytes, used_bytes=used_bytes),)
        running = sum(1 for operation in self._operations.all() if not operation.status.ended)
        return exposition(machines, self.operation_counts, pools, running)

    # -- looking

    def _fresh(self) -> bool:
        """Whether the last look was just now, and at all that run."""
        if self._clock() - self._looked_at >= _FRESH_SECONDS:
            return False
        machines = (kept.value for kept in self._services.machines.all())
        return all(machine.state is not State.RUNNING or self._samples.latest(machine.uuid) for machine in machines)

    async def look(self) -> None:
        """Look at every machine once, and charge what it used since the last time."""
        async with self._looking:
            machines = [kept.value for kept in self._services.machines.all()]
            running = [machine for machine in machines if machine.state in (State.RUNNING, State.PAUSED)]
            disks = await asyncio.to_thread(self._disks, machines)
            for machine in running:
                await self._measure(machine, disks)
                # Others have their turn between any two.
                await asyncio.sleep(0)
            self._samples.forget_but(frozenset(machine.uuid for machine in running))
            for machine in machines:
                await self._charge(machine, disks.get(machine.uuid, 0))
            self._gone |= self._marks.keys() - {machine.uuid for machine in machines}
            self._looked_at = self._clock()

    async def look_at(self, name: str) -> None:
        """The last look at a machine whose run is about to end."""
        kept = self._services.machines.find(name)
        if kept is None or kept.value.state not in (State.RUNNING, State.PAUSED):
            return
        async with self._looking:
            machine = kept.value
            disks = await asyncio.to_thread(self._disks, [machine])
            if await self._measure(machine, disks):
                await self._charge(machine, disks.get(machine.uuid, 0))

    async def _measure(self, machine: Machine, disks: dict[str, int]) -> bool:
        """False for what just ended, is not to be had, or breaks: figures are never worth an error."""
        try:
            driver = self._services.driver(machine)
            if not isinstance(driver, Metered):
                return False
            usage = await driver.usage(self._services.spec(machine))
        except (Error, OSError):
            return False
        usage = msgspec.structs.replace(usage, disk_bytes=disks.get(machine.uuid))
        self._samples.add(machine.uuid, Look(at=self._clock(), run=run_of(machine), usage=usage))
        return True

    def _disks(self, machines: list[Machine]) -> dict[str, int]:
        """What each delta takes (blocking)."""
        found: dict[str, int] = {}
        for machine in machines:
            with suppress(Error, OSError):
                found[machine.uuid] = self._services.pool.allocated_bytes(machine.uuid)
        return found

    async def _charge(self, machine: Machine, disk_bytes: int) -> None:
        latest = self._samples.latest(machine.uuid)
        run = run_of(machine)
        usage = latest.usage if latest is not None and latest.run == run else None
        runs = machine.state in (State.RUNNING, State.PAUSED) and usage is not None
        at = latest.at if runs and latest is not None else self._clock()
        mark = mark_of(at, run if runs else None, usage, disk_bytes)
        before = self._marks.get(machine.uuid)
        started_at = None if machine.started_at is None else machine.started_at.timestamp()
        for charge in charges(before, mark, started_at):
            await self._add(machine, charge)
        self._marks[machine.uuid] = mark

    async def _add(self, machine: Machine, charge: Charge) -> None:
        key = f"{_DAYS}{charge.day}/{machine.uuid}"
        if key not in self._days:
            entry = await self._services.store.get(key)
            self._days[key] = Day(uuid=machine.uuid, name=machine.name) if entry is None else decode_entry(entry, Day)
        day = self._days[key].with_hour(charge.hour)
        self._days[key] = msgspec.structs.replace(day, name=machine.name, labels=machine.labels)
        self._changed.add(key)

    # -- keeping

    async def _flush(self) -> None:
        """Marks and what was charged for them are written together, machine by machine, so that neither is alone."""
        async with self._looking:
            keys: dict[str, list[str]] = {}
            for key in self._changed:
                keys.setdefault(key.rpartition("/")[2], []).append(key)
            batch: list[Write] = [Delete(key=f"{_MARKS}{uuid}") for uuid in self._gone]
            for uuid, days in keys.items():
                batch += [Put(key=key, value=msgspec.json.encode(self._days[key])) for key in days]
                if uuid in self._marks and uuid not in self._gone:
                    batch.append(Put(key=f"{_MARKS}{uuid}", value=msgspec.json.encode(self._marks[uuid])))
                if len(batch) >= _WRITES_AT_ONCE:
                    await self._services.store.txn((), batch)
                    batch = []
            if batch:
                await self._services.store.txn((), batch)
            for uuid in self._gone:
                self._marks.pop(uuid, None)
            self._changed.clear()
            self._gone.clear()
            today = datetime.fromtimestamp(self._clock(), UTC).date().isoformat()
            self._days = {key: day for key, day in self._days.items() if key.split("/")[1] >= today}
            self._flushed_at = self._clock()

    async def _forget_old(self) -> None:
        oldest = datetime.fromtimestamp(self._clock() - KEPT_DAYS * DAY_SECONDS, UTC).date().isoformat()
        for entry in await self._services.store.list(_DAYS):
            if entry.key.split("/")[1] >= oldest:
                return
            await self._services.store.delete(entry.key)

    async def _look_forever(self) -> None:
        forgotten_at = 0.0
        while True:
            try:
                await self.look()
                if self._clock() - self._flushed_at >= _FLUSH_SECONDS:
                    await self._flush()
                if self._clock() - forgotten_at >= DAY_SECONDS:
                    forgotten_at = self._clock()
                    await self._forget_old()
            except Exception:
                # Whatever it was, the next look may do better.
                log.exception("cannot keep account of what machines use")
            await asyncio.sleep(SAMPLE_SECONDS)

    async def _heed_operations(self) -> None:
        while True:
            with suppress(Exhausted):
                async for event in self._services.events.subscribe():
                    operation = event.operation
                    if operation is None:
                        continue
                    if event.kind == "operation-ended":
                        self.operation_counts.add(operation)
                    elif event.kind == "operation-created" and operation.verb in _LAST_LOOK_VERBS:
                        with suppress(Error):
                            await self.look_at(operation.target.removeprefix("machine/"))


def run_of(machine: Machine) -> str:
    """Names one run of a machine."""
    return "" if machine.started_at is None else machine.started_at.isoformat()


def _used_bytes(pool: Pool) -> int:
    """What layers and deltas take."""
    used = sum(layer.size_bytes for layer in pool.layers())
    for uuid in pool.deltas():
        with suppress(Error):
            used += pool.allocated_bytes(uuid)
    return used


def _label_of(by: str) -> str | None:
    """The label to group by, None for machines."""
    if by == _BY_MACHINE:
        return None
    kind, _, key = by.partition(":")
    if kind != _BY_LABEL or not re.search(LABEL_PATTERN, key):
        raise Invalid(f"illegal grouping {by[:80]!r}: it needs 'machine' or 'label:KEY'")
    return key


def _utc(moment: datetime) -> datetime:
    try:
        return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)
    except OverflowError as error:
        raise Invalid(f"illegal time {moment.isoformat()}: it is outside the calendar") from error


def _row(group: str, begin: datetime, end: datetime, hours: list[Hour]) -> UsageRow:
    used = total(hours)
    return UsageRow(
        group=group,
        begin=begin,
        end=end,
        running_hours=used.running_seconds / HOUR_SECONDS,
        cpu_seconds=used.cpu_seconds,
        memory_byte_hours=used.memory_byte_seconds / HOUR_SECONDS,
        disk_byte_hours=used.disk_byte_seconds / HOUR_SECONDS,
        network_received_bytes=used.network_received_bytes,
        network_sent_bytes=used.network_sent_bytes,
        disk_read_bytes=used.disk_read_bytes,
        disk_written_bytes=used.disk_written_bytes,
    )
