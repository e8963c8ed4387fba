"""The wire format of rtnetlink, against messages made by hand. The real kernel is asked in tests/system."""

from __future__ import annotations

import errno
import struct

import pytest

from triarch.errors import Denied, Exists, Failed, Invalid, NotFound, Unsupported
from triarch.host import netlink
from triarch.host import netlink_wire as wire


def test_attributes_survive_a_round_trip_with_padding() -> None:
    packed = wire.attribute(1, b"abc") + wire.attribute(0x8000 | 2, b"") + netlink._u32(3, 7)
    assert len(packed) % 4 == 0
    assert list(wire.attributes(packed)) == [(1, b"abc"), (2, b""), (3, struct.pack("=I", 7))]


def test_a_broken_attribute_ends_the_walk() -> None:
    good = wire.attribute(1, b"abcd")
    assert list(wire.attributes(good + struct.pack("=HH", 0, 9), 0)) == [(1, b"abcd")]


def test_messages_are_split_and_a_length_that_lies_is_refused() -> None:
    one = struct.pack("=IHHII", 20, 16, 2, 5, 0) + b"body"
    assert list(wire.messages(one + one)) == [(16, 2, 5, b"body")] * 2
    with pytest.raises(OSError, match="does not fit"):
        list(wire.messages(struct.pack("=IHHII", 99, 16, 2, 5, 0)))


@pytest.mark.parametrize("capped", [True, False])
def test_the_kernels_own_words_are_in_the_error(capped: bool) -> None:
    request = struct.pack("=IHHII", 20, 16, 5, 1, 0)
    flags = 0x200 | (0x100 if capped else 0)
    payload = struct.pack("=i", -errno.EINVAL) + request + (b"" if capped else b"body")
    payload += wire.attribute(1, b"Can not enslave a loopback device\0")
    with pytest.raises(OSError, match=r"Invalid argument \(Can not enslave a loopback device\)"):
        wire.raise_if_error(2, flags, payload)


def test_an_acknowledgement_is_no_error() -> None:
    wire.raise_if_error(2, 0x100, struct.pack("=i", 0) + bytes(16))


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EEXIST, Exists),
        (errno.ENODEV, NotFound),
        (errno.EPERM, Denied),
        (errno.EOPNOTSUPP, Unsupported),
        (errno.EBUSY, Failed),
    ],
)
def test_errors_are_translated_with_the_object_named(number: int, kind: type[Exception]) -> None:
    error = wire.translate(OSError(number, "What Happened"), "create bridge 'x'")
    assert type(error) is kind
    assert str(error) == "cannot create bridge 'x': what happened"


@pytest.mark.parametrize("name", ["", "a" * 16, "a b", "a/b", "a:b", "a\n", "é" * 8])
def test_illegal_interface_names_never_reach_the_kernel(name: str) -> None:
    with pytest.raises(Invalid, match="illegal interface name"):
        netlink._name(name)


@pytest.mark.parametrize("mac", ["", "02:00:00:00:00", "02:00:00:00:00:0g", "2:0:0:0:0:0", "020000000000"])
def test_illegal_hardware_addresses_are_refused(mac: str) -> None:
    with pytest.raises(Invalid, match="illegal hardware address"):
        netlink._mac_bytes(mac)
