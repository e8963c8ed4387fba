"""Figures for Prometheus, in its text format 0.0.4 (https://prometheus.io/docs/instrumenting/exposition_formats/)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import triarch
from triarch.host.host_usage import host_usage
from triarch.model.operation import Operation
from triarch.model.state import State
from triarch.model.usage import MachineUsage

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BUCKETS_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


@dataclass(slots=True)
class _Count:
    count: int = 0
    seconds: float = 0.0
    within: list[int] = field(default_factory=lambda: [0] * len(_BUCKETS_SECONDS))


class OperationCounts:
    """Operations that ended in this life of the daemon, by verb and outcome."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, str], _Count] = {}

    def add(self, operation: Operation) -> None:
        counted = self._counts.setdefault((operation.verb, operation.status.value), _Count())
        seconds = 0.0
        if operation.ended_at is not None:
            seconds = max(0.0, (operation.ended_at - operation.created_at).total_seconds())
        counted.count += 1
        counted.seconds += seconds
        for number, bound in enumerate(_BUCKETS_SECONDS):
            counted.within[number] += seconds <= bound

    def lines(self) -> list[str]:
        name = "triarch_operation_duration_seconds"
        lines = _head(name, "histogram", "How long operations took that have ended, by verb and outcome.")
        for (verb, outcome), counted in sorted(self._counts.items()):
            labels = {"verb": verb, "outcome": outcome}
            for bound, number in zip(_BUCKETS_SECONDS, counted.within, strict=True):
                lines.append(_sample(f"{name}_bucket", {**labels, "le": f"{bound:g}"}, number))
            lines.append(_sample(f"{name}_bucket", {**labels, "le": "+Inf"}, counted.count))
            lines.append(_sample(f"{name}_sum", labels, counted.seconds))
            lines.append(_sample(f"{name}_count", labels, counted.count))
        return lines


@dataclass(frozen=True, slots=True)
class PoolFigures:
    """Room in one pool; `used_bytes` is what it holds itself."""

    name: str
    free_bytes: int
    used_bytes: int


def exposition(
    machines: Sequence[MachineUsage], counts: OperationCounts, pools: Sequence[PoolFigures], running_operations: int
) -> str:
    """The whole page."""
    lines = [
        *_family("triarch_info", "gauge", "The version of Triarch.", [({"version": triarch.__version__}, 1)]),
        *_machines(machines),
        *_family("triarch_operations_running", "gauge", "Operations under way.", [({}, running_operations)]),
        *counts.lines(),
        *_family("triarch_pool_free_bytes", "gauge", "Room left.", [({"pool": p.name}, p.free_bytes) for p in pools]),
        *_family("triarch_pool_used_bytes", "gauge", "Room taken.", [({"pool": p.name}, p.used_bytes) for p in pools]),
        *_host(),
    ]
    return "\n".join(lines) + "\n"


def _machines(machines: Sequence[MachineUsage]) -> list[str]:
    states = {state: sum(1 for machine in machines if machine.state is state) for state in State}
    lines = _family(
        "triarch_machines", "gauge", "Machines by state.", [({"state": s.value}, n) for s, n in states.items()]
    )
    figures: tuple[tuple[str, str, str, str], ...] = (
        ("cpu_seconds_total", "counter", "Processor time of the present run.", "cpu_seconds"),
        ("memory_bytes", "gauge", "Memory charged to the machine.", "memory_bytes"),
        ("memory_limit_bytes", "gauge", "The most memory that it may have.", "memory_limit_bytes"),
        ("swap_bytes", "gauge", "What of its memory is swapped out.", "swap_bytes"),
        ("processes", "gauge", "Processes inside.", "processes"),
        ("disk_bytes", "gauge", "What its disks take.", "disk_bytes"),
        ("disk_read_bytes_total", "counter", "Read from its disks in the present run.", "disk_read_bytes"),
        ("disk_written_bytes_total", "counter", "Written to its disks in the present run.", "disk_written_bytes"),
        ("network_received_bytes_total", "counter", "Received in the present run.", "network_received_bytes"),
        ("network_sent_bytes_total", "counter", "Sent in the present run.", "network_sent_bytes"),
    )
    for name, kind, text, field_name in figures:
        found = [
            ({"machine": machine.name, "architecture": machine.architecture}, value)
            for machine in machines
            if machine.usage is not None and (value := getattr(machine.usage, field_name)) is not None
        ]
        lines += _family(f"triarch_machine_{name}", kind, text, found)
    return lines


def _host() -> list[str]:
    host = host_usage()
    return [
        *_family("triarch_host_cpu_seconds_total", "counter", "Busy processor time.", [({}, host.cpu_seconds)]),
        *_family("triarch_host_cpus", "gauge", "Processors.", [({}, host.cpus)]),
        *_family("triarch_host_memory_bytes", "gauge", "Memory.", [({}, host.memory_bytes)]),
        *_family(
            "triarch_host_memory_available_bytes", "gauge", "Memory to be had.", [({}, host.memory_available_bytes)]
        ),
        *_family("triarch_host_load1", "gauge", "Load of the last minute.", [({}, host.load)]),
    ]


def _family(name: str, kind: str, text: str, samples: Iterable[tuple[dict[str, str], float]]) -> list[str]:
    return [*_head(name, kind, text), *(_sample(name, labels, value) for labels, value in samples)]


def _head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]


def _sample(name: str, labels: dict[str, str], value: float) -> str:
    inside = ",".join(f'{key}="{escape(text)}"' for key, text in labels.items())
    number = str(value) if isinstance(value, int) else repr(float(value))
    return f"{name}{{{inside}}} {number}" if inside else f"{name} {number}"


def escape(text: str) -> str:
    """A label's value as the format wants it."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
