"""What a guest says of its hardware is hostile input: whatever it is, it is a report or nothing, and printable."""

from __future__ import annotations

import re
from contextlib import suppress

from hypothesis import given
from hypothesis import strategies as st

from triarch.cli.device import device_name_for, read_device
from triarch.drivers.qemu.hardware import parse_hardware
from triarch.errors import Invalid
from triarch.model.device import DEVICE_NAME_PATTERN

_WORDS = st.sampled_from([b"net", b"block", b"hypervisor", b"clocks", b"boot-protocol", b"xen", b" ", b"\n", b"\xff"])


@given(st.lists(_WORDS | st.binary(max_size=20), max_size=40).map(b"".join))
def test_any_report_is_taken(report: bytes) -> None:
    found = parse_hardware(report)
    assert set(found.kernel) <= {"pvh", "kvmclock", "xen", "none"} and found.kernel
    assert set(found.drivers) <= {"virtio", "xen", "emulated"}
    assert found.detail.isprintable()


@given(st.sampled_from(["volume", "disk", "folder", "nic", "host", "usb"]), st.lists(st.text(max_size=20), max_size=4))
def test_any_words_are_a_device_or_illegal(kind: str, words: list[str]) -> None:
    with suppress(Invalid):
        read_device(kind, words)


@given(st.text(min_size=1, max_size=60).map("/".__add__), st.integers(0, 3))
def test_every_path_has_a_name(path: str, taken: int) -> None:
    names: list[str] = []
    for _ in range(taken + 1):
        names.append(device_name_for(path, names))
    assert len(set(names)) == len(names)
    assert all(re.search(DEVICE_NAME_PATTERN, name) for name in names)
