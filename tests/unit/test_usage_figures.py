"""Figures of use from the kernel's files."""

from __future__ import annotations

import os

import pytest

from triarch.host.cgroup_usage import counter, parse_v1_io, parse_v2_io
from triarch.host.measure import measure
from triarch.host.pidfd import process_id
from triarch.host.traffic import traffic

V1_IO = "7:0 Read 4096\n7:0 Write 8192\n7:0 Sync 8192\n7:0 Total 12288\n254:0 Read 99\n7:2 Read 1\nTotal 12388\n"
V2_IO = "7:0 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=0 dios=0\n254:0 rbytes=99 wbytes=99\n7:2 rbytes=1 wbytes=0\n"


def test_io_is_counted_once_though_it_goes_through_two_devices() -> None:
    assert parse_v1_io(V1_IO) == (4097, 8192)
    assert parse_v2_io(V2_IO) == (4097, 8192)


@pytest.mark.parametrize("text", ["", "Total 0\n", "7:0\n", "7:0 Discard 5\n"])
def test_nothing_is_nothing(text: str) -> None:
    assert parse_v1_io(text) == (0, 0)
    assert parse_v2_io(text) == (0, 0)


def test_one_line_of_many() -> None:
    assert counter("user_usec 5\nusage_usec 7\n", "usage_usec") == 7
    assert counter("", "usage_usec") == 0


def test_a_process_is_measured() -> None:
    process = process_id(os.getpid())
    assert process is not None
    used = measure(process)
    assert used.cpu_seconds > 0
    assert used.memory_bytes > 1 << 20
    assert used.swap_bytes == 0 or used.swap_bytes <= used.memory_bytes
    assert used.disk_read_bytes is None or used.disk_read_bytes >= 0


def test_traffic_of_what_is_there_and_what_is_not() -> None:
    found = traffic("lo")
    assert found is not None and found.received_bytes >= 0
    assert traffic("no-such-interface") is None
