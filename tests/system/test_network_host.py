"""What the network does to a host, on hosts of the test's own: fresh network namespaces with settings of their own."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import subprocess
import threading
import traceback
from collections.abc import Callable
from ipaddress import IPv4Interface
from pathlib import Path

import pytest
from network_rig import NatNetwork, instance_with_networks, query

from triarch.engine import doctor
from triarch.errors import Error, Unavailable
from triarch.host import iptables, nft, sysctl
from triarch.host.netlink import Netlink
from triarch.host.process import find_program
from triarch.host.syscalls import CLONE_NEWNET, CLONE_NEWNS, MS_BIND, MS_REC, MS_SLAVE, mount, unshare
from triarch.model.instance import Instance
from triarch.model.request import CheckStatus
from triarch.network.bridges import FORWARDING
from triarch.network.host import HostNetworks

LOOPBACK = 1
NXDOMAIN = 3
A, PTR = 1, 12


@pytest.fixture
def instance(tmp_path: Path) -> Instance:
    return instance_with_networks(tmp_path)


def on_a_fresh_host(scenario: Callable[[], None]) -> None:
    """Run `scenario` in a forked child that has a network stack of its own, and hear of its failure."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        failure = ""
        try:
            unshare(CLONE_NEWNET)
            with Netlink() as netlink:
                netlink.set_up(LOOPBACK)
            scenario()
        except BaseException:  # noqa: BLE001 - told to the parent
            failure = traceback.format_exc()
        os.write(write_end, failure.encode()[-60_000:])
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as told:
        failure = told.read()
    os.waitpid(pid, 0)
    assert failure == "", failure


def with_network(instance: Instance, check: Callable[[NatNetwork], None]) -> Callable[[], None]:
    """A scenario: the network is made, `check` looks, the network is removed."""

    async def scenario() -> None:
        network = NatNetwork(instance)
        try:
            await network.ensure(network.choose_subnet())
            check(network)
        finally:
            await network.teardown()
            Path(instance.run_dir).rmdir()

    return lambda: asyncio.run(scenario())


def test_forwarding_is_turned_on(instance: Instance) -> None:
    def scenario() -> None:
        sysctl.write(FORWARDING, "0")
        with_network(instance, lambda _: None)()
        assert sysctl.read(FORWARDING) == "1"

    on_a_fresh_host(scenario)


def test_a_range_in_use_on_the_host_is_not_chosen(instance: Instance) -> None:
    def scenario() -> None:
        network = NatNetwork(instance)
        wanted = network.choose_subnet()
        with Netlink() as netlink:
            netlink.add_bridge("lan0")
            index = netlink.index_of("lan0")
            assert index is not None
            netlink.add_address(index, IPv4Interface((wanted.network_address + 77, 24)))
        assert not network.choose_subnet().overlaps(wanted)

    on_a_fresh_host(scenario)


def iptables_rules() -> list[str]:
    return subprocess.run(["iptables", "-S"], check=True, capture_output=True, text=True).stdout.splitlines()


def test_a_host_whose_own_filter_drops_lets_machines_through(instance: Instance) -> None:
    try:
        find_program("iptables")
    except Error as error:
        pytest.skip(str(error))
    bridge = instance.bridge

    def check(_: NatNetwork) -> None:
        rules = iptables_rules()
        mark = f"-m comment --comment triarch_{instance.tag} -j ACCEPT"
        assert f"-A FORWARD -i {bridge} {mark}" in rules
        assert f"-A INPUT -i {bridge} -p udp -m multiport --dports 53,67 {mark}" in rules
        assert len(rules) == len(before) + 4
        assert rules.index(f"-A FORWARD -i {bridge} {mark}") < rules.index("-A FORWARD -s 192.0.2.9/32 -j DROP")

    before: list[str] = []

    def scenario() -> None:
        for rule in ("-P FORWARD DROP", "-P INPUT DROP", "-A FORWARD -s 192.0.2.9/32 -j DROP"):
            subprocess.run(["iptables", *rule.split()], check=True)
        before.extend(iptables_rules())
        with_network(instance, check)()
        assert iptables_rules() == before

    on_a_fresh_host(scenario)


def test_a_host_without_iptables_rules_gets_none(instance: Instance) -> None:
    def check(_: NatNetwork) -> None:
        assert not iptables.in_use()
        assert not nft.table_exists("ip", "filter")

    on_a_fresh_host(with_network(instance, check))


def test_without_rights_the_reason_is_said(instance: Instance) -> None:
    def scenario() -> None:
        os.setresuid(65534, 65534, 65534)
        with pytest.raises(Unavailable, match="bridges need CAP_NET_ADMIN") as caught:
            HostNetworks(instance).probe()
        assert caught.value.hint

    on_a_fresh_host(scenario)


def table(name: str, hook: str, policy: str) -> nft.Table:
    return nft.Table("inet", name, f"chain c {{ type filter hook {hook} priority 0; policy {policy}; }}\n")


def test_filters_of_others_that_would_drop_are_found(instance: Instance) -> None:
    def scenario() -> None:
        assert nft.foreign_tables_that_drop("triarch_") == ()
        nft.replace_tables(
            nft.Table("inet", "triarch_x", "chain c { type filter hook forward priority 0; policy drop; }\n")
        )
        assert nft.foreign_tables_that_drop("triarch_") == ()
        nft.replace_tables(table("mine", "forward", "drop"))
        nft.replace_tables(
            nft.Table("inet", "kind", "chain c { type filter hook forward priority 0; policy accept; }\n")
        )
        nft.replace_tables(
            nft.Table("inet", "firewalld", "chain c { type filter hook input priority 0; policy accept; }\n")
        )
        assert nft.foreign_tables_that_drop("triarch_") == ("inet mine", "inet firewalld")
        check = doctor._firewall(instance)
        assert check.status is CheckStatus.WARN
        assert "inet mine, inet firewalld" in check.detail

    on_a_fresh_host(scenario)


def test_a_probe_leaves_nothing(instance: Instance) -> None:
    def scenario() -> None:
        HostNetworks(instance).probe()
        with Netlink() as netlink:
            assert not [link for link in netlink.links() if link.kind == "bridge"]
        assert not nft.table_exists("inet", f"triarch_{instance.tag}")

    on_a_fresh_host(scenario)


class Upstream:
    """The host's own resolver, as far as this test needs one: every name is at 192.0.2.77."""

    def __init__(self, address: str) -> None:
        self.asked: list[str] = []
        self._udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._udp.bind((address, 53))
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            question, sender = self._udp.recvfrom(4096)
            labels, offset = [], 12
            while length := question[offset]:
                labels.append(question[offset + 1 : offset + 1 + length].decode())
                offset += 1 + length
            self.asked.append(".".join(labels))
            record = b"\xc0\x0c" + struct.pack(">HHIH", 1, 1, 60, 4) + bytes((192, 0, 2, 77))
            header = question[:2] + struct.pack(">5H", 0x8180, 1, 1, 0, 0)
            self._udp.sendto(header + question[12 : offset + 5] + record, sender)


def test_other_names_are_asked_of_the_hosts_resolver_and_ours_are_not(instance: Instance, tmp_path: Path) -> None:
    def check(network: NatNetwork) -> None:
        router = str(network.choose_subnet().network_address + 1)
        assert query(router, "example.org").addresses == ["192.0.2.77"]
        for name, kind in (("nobody", A), ("nobody.triarch", A), ("9.9.0.10.in-addr.arpa", PTR)):
            assert query(router, name, kind).code == NXDOMAIN
        assert upstream[0].asked == ["example.org"]

    upstream: list[Upstream] = []

    def scenario() -> None:
        unshare(CLONE_NEWNS)
        mount(None, "/", None, MS_REC | MS_SLAVE)
        resolvers = tmp_path / "resolv.conf"
        resolvers.write_text("nameserver 127.0.0.54\n")
        tmp_path.chmod(0o755)
        mount(str(resolvers), str(Path("/etc/resolv.conf").resolve()), None, MS_BIND)
        upstream.append(Upstream("127.0.0.54"))
        with_network(instance, check)()

    on_a_fresh_host(scenario)
