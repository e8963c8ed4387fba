"""The NAT network with real namespaces as machines: names, gateway, neighbours, the outside, faults, leftovers."""

from __future__ import annotations

import os
import select
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from ipaddress import IPv4Interface, IPv4Network
from pathlib import Path

import pytest
from network_rig import Answer, Namespace, NatNetwork, instance_with_networks, listener, namespaces, ping, query

from triarch.errors import Conflict, Invalid
from triarch.host import nft
from triarch.host.netlink import Netlink
from triarch.host.pidfd import find_by_argument
from triarch.model.instance import Instance, instance_at

NXDOMAIN = 3


@pytest.fixture
def instance(tmp_path: Path) -> Instance:
    return instance_with_networks(tmp_path)


@pytest.fixture
async def network(instance: Instance) -> AsyncIterator[NatNetwork]:
    made = NatNetwork(instance)
    try:
        yield made
    finally:
        await made.teardown()
        left = leftovers(instance)
        with suppress(FileNotFoundError):
            Path(instance.run_dir).rmdir()
        assert left == []


def leftovers(instance: Instance) -> list[str]:
    with Netlink() as netlink:
        left = [link.name for link in netlink.links() if link.name.startswith(instance.bridge)]
    left += [str(path) for path in Path(instance.run_dir).glob("**/*")]
    if nft.table_exists("inet", f"triarch_{instance.tag}"):
        left.append("nftables table")
    if nft.table_exists("bridge", f"triarch_{instance.tag}"):
        left.append("nftables table of the bridge")
    return left + [f"dnsmasq {process.pid}" for process in name_servers(instance)]


def name_servers(instance: Instance) -> list[int]:
    return [found.pid for found in find_by_argument(f"--pid-file={instance.run_dir}/network/dnsmasq.pid")]


async def plug(
    network: NatNetwork, instance: Instance, subnet: IPv4Network, namespace: Namespace, index: int, name: str = ""
) -> str:
    nic = network.nic(subnet, index)
    await network.publish(name or f"m{index}", nic.ip, index)
    router = str(subnet.network_address + 1)
    namespace.attach(instance.host_interface(index), instance.bridge, nic.mac, nic.address, router)
    return nic.ip


def eventually(ask: Callable[[], Answer], wanted: Callable[[Answer], bool]) -> Answer:
    """dnsmasq hears of a record a moment after the file is there."""
    deadline = time.monotonic() + 10
    while not wanted(answer := ask()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return answer


async def test_machines_reach_gateway_and_each_other_by_name(network: NatNetwork, instance: Instance) -> None:
    subnet = network.choose_subnet()
    await network.ensure(subnet)
    router = str(subnet.network_address + 1)
    with namespaces(2) as (web, client):
        web_ip = await plug(network, instance, subnet, web, 1, "web")
        await plug(network, instance, subnet, client, 2)
        assert client.run(lambda: ping(router))
        for name in ("web", "web.triarch"):
            answer = eventually(lambda name=name: client.run(lambda: query(router, name)), lambda a: a.count == 1)
            assert answer.addresses == [web_ip]
        assert client.run(lambda: query(router, "web", 28)).code == 0, "no AAAA, but the name exists"
        assert client.run(lambda: query(router, "nobody.triarch")).code == NXDOMAIN
        with listener(web) as (server, port):
            sender = client.run(lambda: socket.create_connection((web_ip, port), 5))
            with sender, server.accept()[0] as accepted:
                sender.sendall(b"hello")
                assert accepted.recv(5) == b"hello"

        await network.withdraw(1)
        answer = eventually(lambda: client.run(lambda: query(router, "web")), lambda a: a.code == NXDOMAIN)
        assert answer.code == NXDOMAIN
        await network.withdraw(1)
        with Netlink() as netlink:
            assert not netlink.link_exists(instance.host_interface(1))
            assert netlink.link_exists(instance.host_interface(2))


async def test_outbound_is_translated_and_nothing_comes_in(network: NatNetwork, instance: Instance) -> None:
    subnet = network.choose_subnet()
    await network.ensure(subnet)
    outside_bridge = f"{instance.bridge}o"
    with namespaces(2) as (machine, outside), outside_network(outside_bridge, outside) as (host_ip, outside_ip):
        machine_ip = await plug(network, instance, subnet, machine, 1)
        with listener(outside) as (server, port):
            sender = machine.run(lambda: socket.create_connection((outside_ip, port), 5))
            with sender:
                accepted, (seen, _) = server.accept()
                with accepted:
                    accepted.sendall(b"welcome")
                    assert sender.recv(7) == b"welcome"
        assert seen == host_ip, "the outside sees the host's address"
        with Netlink(outside.fd) as inside:
            inside.add_default_route(IPv4Interface(f"{host_ip}/24").ip)
        with listener(machine) as (_, port), pytest.raises(TimeoutError):
            outside.run(lambda: socket.create_connection((machine_ip, port), 1))
        with pytest.raises(TimeoutError):
            outside.run(lambda: query(str(subnet.network_address + 1), "web", timeout_seconds=1))


async def test_a_machine_cannot_send_under_a_foreign_address(network: NatNetwork, instance: Instance) -> None:
    subnet = network.choose_subnet()
    await network.ensure(subnet)
    foreign = "203.0.113.5"
    outside_bridge = f"{instance.bridge}o"
    with namespaces(2) as (machine, outside), outside_network(outside_bridge, outside) as (host_ip, outside_ip):
        machine_ip = await plug(network, instance, subnet, machine, 1)
        with Netlink(machine.fd) as inside:
            index = inside.index_of("eth0")
            assert index is not None
            inside.add_address(index, IPv4Interface(f"{foreign}/32"))

        def send(source: str) -> None:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
                udp.bind((source, 0))
                udp.sendto(source.encode(), receiver_address)

        with outside.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as receiver:
            receiver.bind((outside_ip, 0))
            receiver.settimeout(5)
            receiver_address = receiver.getsockname()
            machine.run(lambda: send(foreign))
            machine.run(lambda: send(machine_ip))
            data, (sender, _) = receiver.recvfrom(100)
            assert (data.decode(), sender) == (machine_ip, host_ip), "the first that arrives is the honest one"


class outside_network:  # noqa: N801 - used as a function
    """A second bridge of the test, which plays the world beyond the host."""

    def __init__(self, bridge: str, namespace: Namespace) -> None:
        self._bridge, self._namespace = bridge, namespace

    def __enter__(self) -> tuple[str, str]:
        with Netlink() as netlink:
            netlink.add_bridge(self._bridge)
            index = netlink.index_of(self._bridge)
            assert index is not None
            netlink.add_address(index, IPv4Interface("198.51.100.1/24"))
            netlink.set_up(index)
        self._namespace.attach(f"{self._bridge}1", self._bridge, "02:00:00:00:00:01", "198.51.100.2/24", None)
        return "198.51.100.1", "198.51.100.2"

    def __exit__(self, *_: object) -> None:
        with Netlink() as netlink:
            for name in (f"{self._bridge}1", self._bridge):
                if (index := netlink.index_of(name)) is not None:
                    netlink.delete(index)


def kill(pid: int) -> None:
    pidfd = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    select.select([pidfd], [], [], 10)
    os.close(pidfd)


async def test_ensure_mends_whatever_is_missing(network: NatNetwork, instance: Instance) -> None:
    subnet = network.choose_subnet()
    await network.ensure(subnet)
    await network.publish("web", str(subnet.network_address + 2))
    router = str(subnet.network_address + 1)
    (first,) = name_servers(instance)

    await network.ensure(subnet)
    assert name_servers(instance) == [first], "nothing was missing, nothing was started"

    kill(first)
    await network.ensure(subnet)
    (second,) = name_servers(instance)
    assert second != first
    assert query(router, "web").count == 1, "records survive the name server"

    nft.delete_table(f"triarch_{instance.tag}")
    with Netlink() as netlink:
        index = netlink.index_of(instance.bridge)
        assert index is not None
        netlink.set_down(index)
        netlink.delete(index)
    await network.ensure(subnet)
    assert nft.table_exists("inet", f"triarch_{instance.tag}")
    assert query(router, "web").count == 1

    (Path(instance.run_dir) / "network/dnsmasq.pid").unlink()
    await NatNetwork(instance).ensure(subnet)
    (third,) = name_servers(instance)
    assert query(router, "web").count == 1, f"{third} took over from one that had lost its pid file"


async def test_a_new_daemon_adopts_and_ends_what_the_old_one_started(network: NatNetwork, instance: Instance) -> None:
    subnet = network.choose_subnet()
    await network.ensure(subnet)
    before = name_servers(instance)
    successor = NatNetwork(instance)
    assert successor.choose_subnet() == subnet, "the bridge that is there is not taken for somebody else's"
    await successor.ensure(subnet)
    assert name_servers(instance) == before
    await successor.teardown()
    await successor.teardown()
    assert leftovers(instance) == []


async def test_half_done_ensure_is_finished(network: NatNetwork, instance: Instance) -> None:
    subnet = network.choose_subnet()
    with Netlink() as netlink:
        netlink.add_bridge(instance.bridge)
        netlink.add_bridge(f"{instance.bridge}p")
    await network.ensure(subnet)
    assert query(str(subnet.network_address + 1), "web.triarch").code == NXDOMAIN


async def test_a_bridge_with_another_subnet_is_refused_with_the_way_out(network: NatNetwork) -> None:
    subnet = network.choose_subnet()
    await network.ensure(subnet)
    other = IPv4Network((int(subnet.network_address) ^ (1 << 14), subnet.prefixlen))
    with pytest.raises(Conflict, match="has the address") as caught:
        await network.ensure(other)
    assert caught.value.hint == "triarch down"


async def test_names_inject_nothing(network: NatNetwork, instance: Instance) -> None:
    await network.ensure(network.choose_subnet())
    for name in ("web\n10.0.0.1 bank", "../../evil", "a b", "", ".hidden", "web\n", "WEB"):
        with pytest.raises(Invalid):
            await network.publish(name, "10.0.0.9")
    with pytest.raises(Invalid, match="illegal address"):
        await network.publish("web", "10.0.0.9\n10.0.0.1 bank")
    assert list((Path(instance.run_dir) / "network/hosts").iterdir()) == []


async def test_two_instances_do_not_meet(network: NatNetwork, instance: Instance, tmp_path: Path) -> None:
    other_instance = instance_at(tmp_path / "other")
    other = NatNetwork(other_instance)
    try:
        subnet = network.choose_subnet()
        await network.ensure(subnet)
        other_subnet = other.choose_subnet()
        assert not other_subnet.overlaps(subnet)
        await other.ensure(other_subnet)
        await network.publish("web", str(subnet.network_address + 2))
        with namespaces(2) as (here, there):
            here_ip = await plug(network, instance, subnet, here, 1, "web")
            await plug(other, other_instance, other_subnet, there, 1)
            assert query(str(other_subnet.network_address + 1), "web").code == NXDOMAIN
            with listener(here) as (_, port), pytest.raises(TimeoutError):
                there.run(lambda: socket.create_connection((here_ip, port), 1))
        await other.teardown()
        assert query(str(subnet.network_address + 1), "web").count == 1
    finally:
        await other.teardown()
        assert leftovers(other_instance) == []
        Path(other_instance.run_dir).rmdir()


@pytest.fixture(autouse=True)
def no_stray_descriptors() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - the count is all that matters
    yield
    assert len(os.listdir("/proc/self/fd")) <= before + 2  # noqa: PTH208 - pytest's own may open
