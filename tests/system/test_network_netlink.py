"""Netlink against the kernel, in a namespace of the test's own."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Iterator
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path

import pytest
from network_rig import LOOPBACK, Namespace, namespaces

from triarch.errors import Error, Exists, Failed, NotFound
from triarch.host.netlink import Netlink

SIOCGIFHWADDR = 0x8927  # netdevice(7)
BRIDGE_MAC, PEER_MAC = "02:11:22:33:44:55", "02:11:22:33:44:06"
ROUTER = IPv4Interface("10.9.0.1/18")


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    if os.geteuid() != 0:
        pytest.skip("needs root: network namespaces")
    with namespaces(1) as (made,):
        yield made


@pytest.fixture
def netlink(namespace: Namespace) -> Iterator[Netlink]:
    with Netlink(namespace.fd) as opened:
        yield opened


def add_bridge(netlink: Netlink, name: str = "br0") -> int:
    netlink.add_bridge(name, BRIDGE_MAC)
    index = netlink.index_of(name)
    assert index is not None
    return index


def test_a_socket_opened_elsewhere_stays_there_and_the_thread_does_not(namespace: Namespace) -> None:
    home = Path("/proc/thread-self/ns/net").readlink()
    with Netlink(namespace.fd) as inside, Netlink() as outside:
        assert Path("/proc/thread-self/ns/net").readlink() == home
        assert [link.name for link in inside.links()] == ["lo"]
        add_bridge(inside, "trinltest")
        assert inside.link_exists("trinltest")
        assert not outside.link_exists("trinltest")


def test_a_machine_is_plugged_in_with_one_request(netlink: Netlink, namespace: Namespace) -> None:
    bridge = add_bridge(netlink)
    netlink.set_up(bridge)
    netlink.add_veth("host0", bridge, "eth0", namespace.fd, PEER_MAC)
    links = {link.name: link for link in netlink.links()}
    assert (links["host0"].kind, links["host0"].master_index, links["host0"].up) == ("veth", bridge, True)
    assert (links["eth0"].kind, links["eth0"].master_index, links["eth0"].up) == ("veth", None, False)
    assert (links["br0"].kind, links["br0"].up) == ("bridge", True)

    def address(name: str) -> str:
        with socket.socket() as any_socket:
            return fcntl.ioctl(any_socket, SIOCGIFHWADDR, struct.pack("256s", name.encode()))[18:24].hex(":")

    netlink.set_up(links["eth0"].index)
    assert namespace.run(lambda: address("eth0")) == PEER_MAC
    assert namespace.run(lambda: address("br0")) == BRIDGE_MAC, "a port with a lower address changed nothing"
    netlink.delete(links["host0"].index)
    assert not netlink.link_exists("eth0"), "the peer goes along"


def test_addresses_and_routes(netlink: Netlink) -> None:
    netlink.set_up(LOOPBACK)
    bridge = add_bridge(netlink)
    netlink.set_up(bridge)
    netlink.add_address(bridge, ROUTER)
    assert netlink.addresses(bridge) == (ROUTER,)
    assert set(netlink.addresses()) == {ROUTER, IPv4Interface("127.0.0.1/8")}
    assert ROUTER.network in netlink.routes()
    netlink.add_default_route(IPv4Address("10.9.0.77"))
    assert IPv4Network("0.0.0.0/0") in netlink.routes()


def test_down_and_up(netlink: Netlink) -> None:
    bridge = add_bridge(netlink)
    for change, up in ((netlink.set_up, True), (netlink.set_down, False)):
        change(bridge)
        assert {link.name: link.up for link in netlink.links()}["br0"] is up


@pytest.mark.parametrize(
    ("act", "kind", "number"),
    [
        (lambda netlink, bridge: netlink.add_bridge("br0"), Exists, errno.EEXIST),
        (lambda netlink, bridge: netlink.delete(4242), NotFound, errno.ENODEV),
        (lambda netlink, bridge: netlink.add_to_bridge(LOOPBACK, bridge), Failed, errno.EINVAL),
        (lambda netlink, bridge: netlink.add_default_route(IPv4Address("192.0.2.1")), Failed, errno.ENETUNREACH),
    ],
    ids=["taken", "absent", "loopback", "unreachable"],
)
def test_refusals_name_the_object_and_keep_the_errno(
    netlink: Netlink, act: Callable[[Netlink, int], None], kind: type[Error], number: int
) -> None:
    bridge = add_bridge(netlink)
    with pytest.raises(kind) as caught:
        act(netlink, bridge)
    assert caught.value.message.startswith("cannot ")
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == number
    assert [link.name for link in netlink.links()] == ["lo", "br0"], "the socket is usable after a refusal"


def test_a_long_list_comes_whole(netlink: Netlink) -> None:
    names = [f"many{number}" for number in range(300)]
    for name in names:
        netlink.add_bridge(name)
    assert [link.name for link in netlink.links()] == ["lo", *names]


def test_a_file_that_is_no_namespace_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "plain").open("w") as plain, pytest.raises(Error, match="cannot enter a network namespace"):
        Netlink(plain.fileno())
    with Netlink() as netlink:
        assert netlink.link_exists("lo")
