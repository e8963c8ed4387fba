"""What machines use: now, in the last minutes, and added up over time."""

from __future__ import annotations

from datetime import datetime

import msgspec

from triarch.model.driver import Usage
from triarch.model.state import State

SAMPLE_SECONDS = 5.0
HISTORY_SECONDS = 600.0


class MachineUsage(msgspec.Struct, frozen=True, kw_only=True):
    """A machine in the live table. `usage` is None while it uses nothing; `cpus` counts processors that are busy.

    Rates are bytes a second since the sample before; None where there is none, or nobody counts.
    """

    name: str
    uuid: str
    state: State
    architecture: str
    usage: Usage | None = None
    cpus: float | None = None
    disk_read_rate: float | None = None
    disk_write_rate: float | None = None
    network_receive_rate: float | None = None
    network_send_rate: float | None = None


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """One look at a running machine: busy processors since the look before, and memory. `at` is UTC."""

    at: datetime
    cpus: float
    memory_bytes: int


class UsageHistory(msgspec.Struct, frozen=True, kw_only=True):
    """The last minutes of one machine, oldest first."""

    name: str
    interval_seconds: float = SAMPLE_SECONDS
    samples: tuple[Sample, ...] = ()


class UsageRow(msgspec.Struct, frozen=True, kw_only=True):
    """What a machine, or all machines with one value of a label, used from `begin` to `end` (whole hours, UTC).

    Byte-hours: one byte held for one hour is one.
    """

    group: str
    begin: datetime
    end: datetime
    running_hours: float = 0.0
    cpu_seconds: float = 0.0
    memory_byte_hours: float = 0.0
    disk_byte_hours: float = 0.0
    network_received_bytes: int = 0
    network_sent_bytes: int = 0
    disk_read_bytes: int = 0
    disk_written_bytes: int = 0
