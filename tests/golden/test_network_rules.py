"""The firewall as text: what nft is told for a small site. `TRIARCH_UPDATE_GOLDEN=1` writes it anew."""

from __future__ import annotations

import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest

from triarch.host.nft import Table
from triarch.model.instance import Instance
from triarch.model.network import AclRule, Direction, Forward, Network, NetworkKind, Nic, Protocol
from triarch.network.plan import Port, Segment
from triarch.network.rules import port_chains, routed_chains

GOLDEN = Path(__file__).parent / "network"
INSTANCE = Instance(tag="0", state_dir="/var/lib/triarch", run_dir="/run/triarch")
MADE = datetime(2026, 1, 1, tzinfo=UTC)


def segment(name: str, index: int, kind: NetworkKind, *acl: AclRule) -> Segment:
    served = kind in (NetworkKind.NAT, NetworkKind.ISOLATED)
    network = Network(
        name=name,
        index=index,
        kind=kind,
        ipv4=f"10.{77 + index}.0.0/18" if served else None,
        ipv6=f"fd00:0:0:{index:x}::/64" if served else None,
        parent=None if served else "eth1",
        acl=acl,
        created_at=MADE,
    )
    bridge = "" if kind is NetworkKind.MACVLAN else "tri0" + (f"n{index}" if index else "")
    return Segment(network=network, bridge=bridge, routed6=kind is NetworkKind.NAT)


def port(machine: str, network: str, index: int, *forwards: Forward, **values: object) -> Port:
    own = {"nat": 0, "lab": 1}.get(network)
    nic = Nic(
        mac=f"02:00:00:00:00:{index:02x}",
        address="" if own is None else f"10.{77 + own}.0.{index}/18",
        address6="" if own is None else f"fd00:0:0:{own}::{index:x}/64",
    )
    interface = f"tri0m{index}"
    return Port(network=network, machine=machine, host_interface=interface, nic=nic, forwards=forwards, **values)  # type: ignore[arg-type]


SITE = (
    segment(
        "nat",
        0,
        NetworkKind.NAT,
        AclRule(direction=Direction.INGRESS, allow=True, label="role=web", protocol=Protocol.TCP, ports=(443, 80)),
        AclRule(direction=Direction.INGRESS, allow=False, machine="web", peer="machine:cli"),
        AclRule(direction=Direction.EGRESS, allow=False, peer="10.0.0.0/8", protocol=Protocol.ICMP),
        AclRule(direction=Direction.EGRESS, allow=False, peer="fd00::/8", ports=(53,)),
        AclRule(direction=Direction.EGRESS, allow=False, machine="nobody"),
        AclRule(direction=Direction.EGRESS, allow=False, peer="label:role=gone"),
    ),
    segment("lab", 1, NetworkKind.ISOLATED),
    segment("lan", 2, NetworkKind.BRIDGE),
    segment("direct", 3, NetworkKind.MACVLAN),
)
PORTS = (
    port(
        "web",
        "nat",
        2,
        Forward(host_port=8080, machine_port=80),
        Forward(host_port=53, machine_port=53, host_address="0.0.0.0", protocol=Protocol.UDP),
        Forward(host_port=8081, machine_port=80, host_address="192.0.2.7"),
        labels={"role": "web"},
    ),
    port("cli", "nat", 3, send_bytes_per_second=1 << 20, receive_bytes_per_second=8 << 20),
    port("db", "lab", 4, Forward(host_port=5432, machine_port=5432)),
    port("guest", "lan", 5),
    port("bare", "direct", 6),
)


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("routed", Table("inet", "triarch_0", routed_chains(SITE, PORTS))),
        ("ports", Table("bridge", "triarch_0", port_chains(INSTANCE, SITE, PORTS))),
        ("ports-without-list", Table("bridge", "triarch_0", port_chains(INSTANCE, SITE[1:3], PORTS[2:4]))),
        ("nothing", Table("inet", "triarch_0", routed_chains((), ()))),
    ],
)
def test_rules(name: str, table: Table) -> None:
    golden = GOLDEN / f"{name}.nft"
    if os.environ.get("TRIARCH_UPDATE_GOLDEN"):
        golden.write_text(table.text)
    assert table.text == golden.read_text()
    if os.geteuid() == 0:
        checked = subprocess.run(
            ["unshare", "--net", "nft", "--check", "-f", "-"],
            input=table.text,
            capture_output=True,
            text=True,
            check=False,
        )
        assert checked.returncode == 0, checked.stderr
