"""Accounts are right however often one looks, whatever restarts, and wherever the hours end."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triarch.engine.accounting import AMOUNTS, Charge, Day, Hour, Mark, charges, mark_of, total
from triarch.model.driver import Usage

BEGIN = 1_700_000_000.0
COUNTERS = ("network_received_bytes", "network_sent_bytes", "disk_read_bytes", "disk_written_bytes")
amounts = st.integers(0, 10**12)
# A look: seconds since the last one, and how far each counter went.
steps = st.tuples(st.floats(0.001, 100_000), st.floats(0, 1e6), amounts, amounts, amounts, amounts)
runs = st.lists(st.lists(steps, min_size=1, max_size=8), min_size=1, max_size=5)


def sum_of(found: list[Charge]) -> Hour:
    return total(charge.hour for charge in found)


@given(runs)
def test_what_is_charged_is_what_was_counted(all_runs: list[list[tuple[float, float, int, int, int, int]]]) -> None:
    """Each run's counters begin at zero; looks come at any time; nothing is lost, nothing counted twice."""
    at, before, found = BEGIN, None, []
    expected, expected_cpu, running_seconds = dict.fromkeys(COUNTERS, 0), 0.0, 0.0
    for number, looks in enumerate(all_runs):
        started_at, cpu, counters = at, 0.0, dict.fromkeys(COUNTERS, 0)
        for seconds, cpu_more, *more in looks:
            at += seconds
            running_seconds += seconds
            cpu += cpu_more
            counters = {name: counters[name] + amount for name, amount in zip(COUNTERS, more, strict=True)}
            now = mark_of(at, f"run-{number}", Usage(cpu_seconds=cpu, memory_bytes=100, **counters), 7)
            found += charges(before, now, started_at)
            before = now
        expected = {name: expected[name] + counters[name] for name in COUNTERS}
        expected_cpu += cpu
    charged = sum_of(found)
    assert {name: getattr(charged, name) for name in COUNTERS} == expected
    assert charged.cpu_seconds == pytest.approx(expected_cpu)
    assert charged.running_seconds == pytest.approx(running_seconds, rel=1e-6, abs=1e-3)
    assert charged.memory_byte_seconds == pytest.approx(100 * running_seconds, rel=1e-6, abs=0.1)
    assert all(charge.hour.running_seconds <= 3600.001 for charge in found)


@given(st.floats(0.01, 500_000), st.integers(1, 10**15))
def test_a_long_silence_is_shared_out_over_its_hours(seconds: float, received: int) -> None:
    before = mark_of(BEGIN, "r", Usage(cpu_seconds=0, memory_bytes=5), 3)
    now = mark_of(BEGIN + seconds, "r", Usage(cpu_seconds=9, memory_bytes=50, network_received_bytes=received), 30)
    found = list(charges(before, now))
    assert sum_of(found).network_received_bytes == received
    assert sum_of(found).disk_byte_seconds == pytest.approx(3 * seconds, rel=1e-6)
    assert sum_of(found).memory_byte_seconds == pytest.approx(5 * seconds, rel=1e-6)
    first, last = (datetime.fromtimestamp(at, UTC) for at in (BEGIN, BEGIN + seconds))
    days = {charge.day for charge in found}
    assert first.date().isoformat() in days
    assert max(days) <= last.date().isoformat()


@given(st.floats(-1e6, 0), st.floats(0, 1e6))
def test_a_clock_that_is_set_back_charges_no_time(back: float, cpu: float) -> None:
    before = mark_of(BEGIN, "r", Usage(cpu_seconds=0, memory_bytes=5), 3)
    charged = sum_of(list(charges(before, mark_of(BEGIN + back, "r", Usage(cpu_seconds=cpu, memory_bytes=5), 3))))
    assert charged.cpu_seconds == pytest.approx(cpu)
    assert charged.running_seconds == charged.disk_byte_seconds == 0


def test_a_counter_that_began_anew_in_a_run_is_charged_from_zero() -> None:
    before = Mark(at=BEGIN, run="r", cpu_seconds=100, network_sent_bytes=5000)
    now = Mark(at=BEGIN + 10, run="r", cpu_seconds=101, network_sent_bytes=40)
    charged = sum_of(list(charges(before, now)))
    assert charged.cpu_seconds == 1
    assert charged.network_sent_bytes == 40


def test_a_stopped_machine_is_charged_for_its_disk_alone() -> None:
    before = Mark(at=BEGIN, run="r", cpu_seconds=100, memory_bytes=1000, disk_bytes=10)
    charged = sum_of(list(charges(before, Mark(at=BEGIN + 60, disk_bytes=11))))
    assert charged == Hour(0, disk_byte_seconds=600.0)


def test_the_first_look_at_a_machine_that_ran_before_charges_its_run_from_the_start() -> None:
    now = Mark(at=BEGIN + 100, run="r", cpu_seconds=7, memory_bytes=2)
    charged = sum_of(list(charges(None, now, BEGIN)))
    assert (charged.cpu_seconds, charged.running_seconds, charged.memory_byte_seconds) == (7, 100, 200)


def test_hours_of_a_day_add_up_in_order() -> None:
    day = Day(uuid="u", name="web").with_hour(Hour(5, cpu_seconds=1.0)).with_hour(Hour(2, cpu_seconds=2.0))
    day = day.with_hour(Hour(5, cpu_seconds=10.0, network_sent_bytes=3))
    assert [(hour.hour, hour.cpu_seconds) for hour in day.hours] == [(2, 2.0), (5, 11.0)]
    assert total(day.hours).network_sent_bytes == 3
    assert set(AMOUNTS) == set(Hour.__struct_fields__) - {"hour"}
