"""What people choose becomes text for other programs: nothing in it means more there than it says."""

from __future__ import annotations

from ipaddress import IPv4Address
from pathlib import Path
from typing import Annotated

import msgspec
import pytest

from triarch.host.dnsmasq import Dnsmasq, Record
from triarch.model.network import PEER_PATTERN, CidrText, Forward
from triarch.model.resources import CpuSet


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ({"host_port": 80, "machine_port": 80, "host_address": "1٢٣.0.0.1"}, Forward),
        ("10.0.0.0/٢٤", CidrText),
        ("10.0.0.0/٢٤", msgspec.Meta(pattern=PEER_PATTERN)),
        ("0-٣", CpuSet),
    ],
)
def test_digits_are_those_that_nft_and_the_kernel_read(text: object, kind: object) -> None:
    wanted = Annotated[str, kind] if isinstance(kind, msgspec.Meta) else kind
    with pytest.raises(msgspec.ValidationError, match="matching regex"):
        msgspec.convert(text, wanted)


@pytest.mark.parametrize("name", ["ignore", "infinite", "web"])
def test_a_machine_may_be_called_like_a_word_of_dnsmasq(tmp_path: Path, name: str) -> None:
    dnsmasq = Dnsmasq(tmp_path, "triarch")
    dnsmasq.publish("1", Record(names=(name,), mac="52:54:00:0:0:1", address=IPv4Address("10.0.0.2"), address6=None))
    last = (tmp_path / "leases" / "1").read_text().strip().split(",")[-1]
    assert last.split(".")[0] == name
    assert last not in ("ignore", "infinite")
