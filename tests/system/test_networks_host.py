"""Networks of every kind with real namespaces as machines: who reaches whom, under which address, how fast."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface
from pathlib import Path

import msgspec
import pytest
from network_rig import Namespace, instance_with_networks, listener, namespaces, ping, query
from network_site import REFUSED_SECONDS, Echo, Site, asks, eventually, reaches

from triarch.host import nft
from triarch.host.netlink import Netlink
from triarch.host.process import run
from triarch.host.tap import open_macvtap
from triarch.model.instance import Instance
from triarch.model.network import (
    AclRule,
    Direction,
    Forward,
    NetworkKind,
    Nic,
    Protocol,
)
from triarch.network.addresses import pick
from triarch.network.plan import Port

AAAA = 28


@pytest.fixture
def instance(tmp_path: Path) -> Instance:
    return instance_with_networks(tmp_path)


@pytest.fixture
async def site(instance: Instance) -> AsyncIterator[Site]:
    made = Site(instance)
    try:
        yield made
    finally:
        await made.host.close()
        await made.host.teardown()
        left = [str(path) for path in Path(instance.run_dir).glob("**/*")]
        with suppress(FileNotFoundError):
            Path(instance.run_dir).rmdir()
        assert left == []
        assert not nft.table_exists("bridge", f"triarch_{instance.tag}")


# -- kinds


async def test_machines_speak_ipv6_and_have_names_in_it(site: Site) -> None:
    network = site.network()
    if network.ipv6 is None:
        pytest.skip("this host has no IPv6")
    with namespaces(2) as (web, cli):
        nic = await site.plug(web, "web", network, 1)
        await site.plug(cli, "cli", network, 2)
        router = str(IPv4Interface(network.ipv4 or "").network.network_address + 1)
        assert await eventually(lambda: cli.run(lambda: query(router, "web.triarch", AAAA)).count == 1)
        server = web.run(lambda: socket.create_server(("::", 0), family=socket.AF_INET6))
        with server, cli.run(lambda: socket.create_connection((nic.ip6, server.getsockname()[1]), 5)) as sender:
            assert sender.getpeername()[0] == nic.ip6


async def test_dhcp_gives_a_machine_what_is_its_own(site: Site) -> None:
    network = site.network()
    with namespaces(1) as (web,):
        nic = await site.plug(web, "web", network, 1)
        script = Path(site.instance.state_dir) / "told"
        script.write_text('#!/bin/sh\n[ "$1" = bound ] && echo "$ip/$mask $router $dns $domain" > "$0.out"\nexit 0\n')
        script.chmod(0o755)
        asked = await asyncio.to_thread(
            subprocess.run,
            [
                "nsenter",
                f"--net=/proc/self/fd/{web.fd}",
                "busybox",
                "udhcpc",
                "-i",
                "eth0",
                "-n",
                "-q",
                "-f",
                "-s",
                script,
            ],
            pass_fds=[web.fd],
            capture_output=True,
            timeout=30,
        )
        assert asked.returncode == 0, asked.stderr
        router = str(IPv4Interface(network.ipv4 or "").network.network_address + 1)
        assert Path(f"{script}.out").read_text().split() == [f"{nic.ip}/18", router, router, "triarch"]


async def test_an_isolated_network_is_alone(site: Site) -> None:
    open_network, lab = site.network(), site.network("lab", NetworkKind.ISOLATED)
    with namespaces(3) as (web, one, two):
        web_nic = await site.plug(web, "web", open_network, 1)
        one_nic = await site.plug(one, "one", lab, 2)
        two_nic = await site.plug(two, "two", lab, 3)
        router = str(IPv4Interface(lab.ipv4 or "").network.network_address + 1)
        with listener(two) as (_, port):
            assert reaches(one, two_nic.ip, port)
        assert one.run(lambda: query(router, "two.triarch")).count == 1
        # Even one that finds itself a way out is stopped.
        with Netlink(one.fd) as inside:
            inside.add_default_route(IPv4Address(router))
        with listener(web) as (_, port):
            assert not reaches(one, web_nic.ip, port)
        with listener(one) as (_, port):
            assert not reaches(web, one_nic.ip, port)
        with socket.create_server((router, 0)) as service:
            assert not reaches(one, router, service.getsockname()[1]), "the host itself is out of reach"


async def test_two_nat_networks_do_not_meet(site: Site) -> None:
    first, second = site.network(), site.network("second")
    with namespaces(2) as (here, there):
        here_nic = await site.plug(here, "here", first, 1)
        there_nic = await site.plug(there, "there", second, 2)
        with listener(here) as (_, port):
            assert not reaches(there, here_nic.ip, port)
        with listener(there) as (_, port):
            assert not reaches(here, there_nic.ip, port)


class Lan:
    """A cable of the test's own: one end is an interface of the host, the other a namespace, the world there."""

    def __init__(self, name: str, world: Namespace, address: str) -> None:
        self.name = name
        with Netlink() as netlink:
            netlink.add_bridge(f"{name}x")
            bridge = netlink.index_of(f"{name}x")
            assert bridge is not None
            netlink.add_veth(name, bridge, "eth0", world.fd, "02:ff:00:00:00:01")
            netlink.delete(bridge)
            index = netlink.index_of(name)
            assert index is not None
            netlink.set_up(index)
        with Netlink(world.fd) as inside:
            index = inside.index_of("eth0")
            assert index is not None
            inside.set_up(index)
            inside.add_address(index, IPv4Interface(address))

    def close(self) -> None:
        with Netlink() as netlink:
            index = netlink.index_of(self.name)
            if index is not None:
                netlink.delete(index)


@pytest.mark.parametrize("kind", [NetworkKind.BRIDGE, NetworkKind.MACVLAN])
async def test_a_machine_is_a_neighbour_of_the_world(site: Site, kind: NetworkKind) -> None:
    with namespaces(2) as (world, web):
        lan = Lan(f"{site.instance.bridge}w", world, "198.51.100.1/24")
        try:
            network = site.network("lan", kind, parent=lan.name, ipv4="198.51.100.0/24", ipv6=None, index=1)
            nic = await site.plug(web, "web", network, 7)
            assert nic.ip == "198.51.100.8"
            assert world.run(lambda: ping(nic.ip))
            with listener(world) as (server, port):
                sender = web.run(lambda: socket.create_connection(("198.51.100.1", port), 5))
                with sender, server.accept()[0] as seen:
                    assert seen.getpeername()[0] == nic.ip, "nothing translates it"
            await site.host.unplug(site.host.host_interface(7))
            await site.host.remove(network)
            with Netlink() as netlink:
                assert netlink.link_exists(lan.name), "the host's own interface stays"
        finally:
            lan.close()


async def test_a_vms_end_of_a_macvlan_carries_frames(site: Site) -> None:
    with namespaces(1) as (world,):
        lan = Lan(f"{site.instance.bridge}w", world, "198.51.100.1/24")
        name = site.host.host_interface(9)
        try:
            fd = open_macvtap(name, lan.name, site.host.mac(9))
            os.close(fd)
            fd = open_macvtap(name, lan.name, site.host.mac(9))
            question = bytes.fromhex("ffffffffffff") + bytes.fromhex(site.host.mac(9).replace(":", ""))
            question += bytes.fromhex("08060001080006040001") + bytes.fromhex(site.host.mac(9).replace(":", ""))
            question += bytes((198, 51, 100, 9)) + bytes(6) + bytes((198, 51, 100, 1))
            os.write(fd, bytes(10) + question)

            def answered() -> bool:
                with suppress(BlockingIOError):
                    return b"\x08\x06" in os.read(fd, 2048)
                return False

            assert await eventually(answered)
            os.close(fd)
            await site.host.unplug(name)
            with Netlink() as netlink:
                assert not netlink.link_exists(name)
        finally:
            lan.close()


# -- forwards


async def test_a_port_of_the_host_leads_to_a_machine(site: Site) -> None:
    network = site.network()
    host_port = free_port()
    with namespaces(2) as (web, cli), listener(web) as (server, port):
        forward = Forward(host_port=host_port, machine_port=port, host_address="0.0.0.0")
        await site.plug(web, "web", network, 1, forwards=(forward,))
        await site.plug(cli, "cli", network, 2)
        own = next(str(a.ip) for a in _addresses() if not a.ip.is_loopback)
        for address in ("127.0.0.1", own):
            with socket.create_connection((address, host_port), 5) as sender, server.accept()[0] as accepted:
                sender.sendall(b"hello")
                assert accepted.recv(5) == b"hello"
        assert reaches(cli, own, host_port), "a neighbour comes in by the host's address too"
        await site.change("web", forwards=())
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", host_port), 5)


async def test_a_loopback_forward_is_for_the_host_alone(site: Site) -> None:
    network = site.network()
    tcp, udp = free_port(), free_port()
    with namespaces(2) as (web, cli):
        echo = Echo(web, 5353)
        try:
            with listener(web) as (_, port):
                forwards = (
                    Forward(host_port=tcp, machine_port=port),
                    Forward(host_port=udp, machine_port=5353, protocol=Protocol.UDP),
                )
                await site.plug(web, "web", network, 1, forwards=forwards)
                await site.plug(cli, "cli", network, 2)
                socket.create_connection(("127.0.0.1", tcp), 5).close()
                assert asks("127.0.0.1", udp)
                router = IPv4Interface(network.ipv4 or "").network.network_address + 1
                with suppress(ConnectionRefusedError):
                    assert not reaches(cli, str(router), tcp)
                # The host's loopback address must not be reached through the bridge, which lets its answers out.
                with Netlink(cli.fd) as inside, socket.create_server(("127.0.0.1", 0)) as secret:
                    index = inside.index_of("eth0")
                    assert index is not None
                    command_in(cli, _STEAL.format(router=router))
                    assert not reaches(cli, "127.0.0.1", secret.getsockname()[1])
        finally:
            echo.close()


_STEAL = (
    "ip addr del 127.0.0.1/8 dev lo; ip route del local 127.0.0.0/8 table local 2>/dev/null; "
    "ip route add 127.0.0.1/32 via {router} dev eth0; true"
)


def inside_of(namespace: Namespace) -> list[str]:
    return ["nsenter", f"--net=/proc/self/fd/{namespace.fd}"]


def command_in(namespace: Namespace, script: str) -> None:
    subprocess.run(
        [*inside_of(namespace), "sh", "-c", script], pass_fds=[namespace.fd], check=True, capture_output=True
    )


def free_port() -> int:
    with socket.create_server(("0.0.0.0", 0)) as server:
        return int(server.getsockname()[1])


def _addresses() -> tuple[IPv4Interface, ...]:
    with Netlink() as netlink:
        eth0 = netlink.index_of("eth0")
        return netlink.addresses(eth0)


# -- who may send what


async def test_a_machine_sends_under_its_own_addresses_only(site: Site) -> None:
    network = site.network()
    with namespaces(2) as (thief, victim):
        await site.plug(thief, "thief", network, 1)
        nic = await site.plug(victim, "victim", network, 2)
        base = IPv4Interface(network.ipv4 or "").network
        foreign, foreign6 = base.network_address + 77, None
        echo = Echo(victim, 7000)
        try:
            with Netlink(thief.fd) as inside:
                index = inside.index_of("eth0")
                assert index is not None
                inside.add_address(index, IPv4Interface(f"{foreign}/18"))
                if nic.address6:
                    foreign6 = IPv6Interface(nic.address6).network.network_address + 0x77
                    inside.add_address(index, IPv6Interface(f"{foreign6}/64"))

            def send_from(source: str) -> None:
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
                    udp.bind((source, 0))
                    udp.sendto(source.encode(), (nic.ip, 7000))

            own = site.ports["thief"].nic.ip
            thief.run(lambda: send_from(str(foreign)))
            thief.run(lambda: send_from(own))
            assert await eventually(lambda: bool(echo.heard))
            assert echo.heard == [(own, own.encode())], "from its neighbour's address it is not even heard next door"
            assert not victim.run(lambda: ping(str(foreign))), "nor does it answer for that address"
            if foreign6 is not None:
                assert not victim.run(lambda: _connects6(foreign6))
        finally:
            echo.close()


def _connects6(address: IPv6Address) -> bool:
    try:
        socket.create_connection((str(address), 9), REFUSED_SECONDS).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return True


async def test_another_mac_is_mute(site: Site) -> None:
    network = site.network()
    with namespaces(1) as (web,):
        await site.plug(web, "web", network, 1)
        router = str(IPv4Interface(network.ipv4 or "").network.network_address + 1)
        assert web.run(lambda: ping(router))
        change = "ip link set eth0 down; ip link set eth0 address 02:00:00:00:00:99; ip link set eth0 up"
        command_in(web, change)
        assert not web.run(lambda: ping(router))


async def test_an_access_list_is_heeded_at_once(site: Site) -> None:
    deny = AclRule(direction=Direction.INGRESS, allow=False, machine="web", peer="label:role=guest")
    network = site.network(acl=(deny,))
    with namespaces(2) as (web, cli):
        web_nic = await site.plug(web, "web", network, 1)
        await site.plug(cli, "cli", network, 2)
        with listener(web) as (_, port):
            assert reaches(cli, web_nic.ip, port), "what no rule matches is allowed"
            await site.change("cli", labels={"role": "guest"})
            assert not reaches(cli, web_nic.ip, port)
            allow = AclRule(direction=Direction.INGRESS, allow=True, protocol=Protocol.TCP, ports=(port,))
            await site.host.replace(msgspec.structs.replace(network, acl=(allow, deny)))
            assert reaches(cli, web_nic.ip, port), "the first that matches decides"
            await site.host.replace(msgspec.structs.replace(network, acl=()))
            await site.change("cli", labels={"role": "guest"})
            assert reaches(cli, web_nic.ip, port)


async def test_what_a_machine_asked_for_is_answered(site: Site) -> None:
    """It may call, and nobody may call it: the state of UDP is kept, both ways through one bridge."""
    closed = AclRule(direction=Direction.INGRESS, allow=False, machine="cli")
    network = site.network(acl=(closed,))
    with namespaces(2) as (web, cli):
        web_nic = await site.plug(web, "web", network, 1)
        cli_nic = await site.plug(cli, "cli", network, 2)
        echoes = [Echo(web, 7000), Echo(cli, 7000)]
        try:
            assert not web.run(lambda: asks(cli_nic.ip, 7000)), "nobody calls it"
            assert cli.run(lambda: asks(web_nic.ip, 7000)), "it calls, and hears the answer"
            with listener(web) as (_, port):
                assert reaches(cli, web_nic.ip, port)
            with listener(cli) as (_, port):
                assert not reaches(web, cli_nic.ip, port)
            router = str(IPv4Interface(network.ipv4 or "").network.network_address + 1)
            assert cli.run(lambda: query(router, "web")).count == 1, "the network's own services pass"
        finally:
            for echo in echoes:
                echo.close()


async def test_rates_hold_and_change(site: Site) -> None:
    network = site.network()
    size = 4 << 20

    def seconds(reader: Namespace, writer: Namespace, address: str) -> float:
        with listener(writer) as (server, port):
            began = time.monotonic()
            taking = reader.run(lambda: socket.create_connection((address, port), 5))
            giving = server.accept()[0]

            def give() -> None:
                giving.sendall(bytes(size))
                giving.close()

            thread = threading.Thread(target=give)
            thread.start()
            got = 0
            with taking:
                while piece := taking.recv(1 << 16):
                    got += len(piece)
            thread.join()
        assert got == size
        return time.monotonic() - began

    with namespaces(2) as (web, cli):
        web_nic = await site.plug(web, "web", network, 1, send_bytes_per_second=1 << 20)
        await site.plug(cli, "cli", network, 2)
        limited = await asyncio.to_thread(seconds, cli, web, web_nic.ip)
        assert 2.0 < limited < 20
        await site.change("web", send_bytes_per_second=None)
        assert await asyncio.to_thread(seconds, cli, web, web_nic.ip) < 1.5
        await site.change("cli", receive_bytes_per_second=1 << 20)
        assert 2.0 < await asyncio.to_thread(seconds, cli, web, web_nic.ip) < 20


# -- faults


async def test_what_others_undo_is_mended_within_seconds(site: Site) -> None:
    network = site.network()
    table = f"triarch_{site.instance.tag}"
    site.host.start_watch()
    with namespaces(1) as (web,):
        await site.plug(web, "web", network, 1)
        router = str(IPv4Interface(network.ipv4 or "").network.network_address + 1)
        await asyncio.sleep(1)
        nft.delete_table(table)
        nft.delete_table(table, "bridge")
        assert await eventually(lambda: nft.table_exists("inet", table) and nft.table_exists("bridge", table))
        await asyncio.sleep(1)
        spoofed = ("chain", "bridge", table, "spoofed")
        await asyncio.to_thread(run, ["nft", "flush", *spoofed])
        assert await eventually(lambda: b"@macs" in run(["nft", "list", *spoofed]))
        server = site.host._servers[0]._process
        assert server is not None
        os.kill(server.pid, 9)

        def answers() -> bool:
            try:
                return web.run(lambda: query(router, "web", timeout_seconds=0.5)).count == 1
            except OSError:
                return False

        assert await eventually(answers)
        with Netlink() as netlink:
            index = netlink.index_of(site.instance.bridge)
            assert index is not None
            netlink.delete(index)
        assert await eventually(answers), "the bridge is made again, and its ports are plugged in again"


async def test_elements_that_are_added_one_by_one_are_those_that_are_written_at_once(site: Site) -> None:
    """The kernel's sets, however they came to be, for machines that come and go."""
    network = site.network()
    table = f"triarch_{site.instance.tag}"

    async def listed() -> str:
        found = await asyncio.to_thread(run, ["nft", "list", "table", "bridge", table])
        return "".join(sorted(re.findall(r'"tri\w+" \. [\w:.]+|"tri\w+"', found.decode())))

    base = IPv4Interface(network.ipv4 or "").network
    for index in range(1, 6):
        nic = Nic(mac=site.host.mac(index), address=pick(base, index, (), ()) if index != 3 else "")
        interface = site.host.host_interface(index)
        port = Port(network="nat", machine=f"m{index}", names=(f"m{index}",), host_interface=interface, nic=nic)
        await site.host.plug(network, port)
    await site.host.unplug(site.host.host_interface(2))
    await site.host.mend()
    one_by_one = await listed()
    assert site.host.host_interface(2) + '"' not in one_by_one
    assert site.host.host_interface(5) in one_by_one
    await asyncio.to_thread(nft.delete_table, table, "bridge")
    await site.host.mend()
    assert await listed() == one_by_one
