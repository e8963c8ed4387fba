"""A machine's network cards, made from outside: the host's end on the host, the other in the machine's namespace."""

from __future__ import annotations

from contextlib import suppress
from ipaddress import IPv4Address, IPv4Interface, IPv6Address, IPv6Interface

from triarch.errors import Exists, Failed, NotFound
from triarch.host.launcher.protocol import Interface
from triarch.host.netlink import Netlink

_LOOPBACK_INDEX = 1


def connect(interfaces: tuple[Interface, ...], network_fd: int) -> None:
    """Raise loopback and make each card, with its addresses and routes. Raises what netlink does, `NotFound`."""
    for interface in interfaces:
        make_card(interface, network_fd)
    with Netlink(network_fd) as inside:
        inside.set_up(_LOOPBACK_INDEX)
        for interface in interfaces:
            configure_card(inside, interface)


def make_card(interface: Interface, network_fd: int) -> None:
    """The card is in the machine's namespace, still down, and plugged in on the host. What a run left goes first."""
    with Netlink() as host:
        try:
            _make(host, interface, network_fd)
        except Exists:
            # The kernel tears a network namespace down some time after its last process.
            left_over = host.index_of(interface.host_name)
            if left_over is not None:
                with suppress(NotFound):
                    host.delete(left_over)
            _make(host, interface, network_fd)


def _make(host: Netlink, interface: Interface, network_fd: int) -> None:
    if interface.parent:
        parent = _needed(host, interface.parent, "interface")
        host.add_macvlan(interface.name, parent, interface.mac, network_fd, tap=False)
        return
    bridge = _needed(host, interface.bridge, "bridge")
    host.add_veth(interface.host_name, bridge, interface.name, network_fd, interface.mac)


def _needed(host: Netlink, name: str, what: str) -> int:
    index = host.index_of(name)
    if index is None:
        raise NotFound(f"there is no {what} '{name}' on this host")
    return index


def configure_card(inside: Netlink, interface: Interface) -> None:
    """Raise it and give it its addresses; one without is left to the machine's own DHCP client."""
    index = inside.index_of(interface.name)
    if index is None:
        raise Failed(f"the interface '{interface.name}' vanished from the machine's network namespace")
    inside.set_up(index)
    if interface.address:
        inside.add_address(index, IPv4Interface(interface.address))
    if interface.address6:
        inside.add_address(index, IPv6Interface(interface.address6))
    if interface.gateway and interface.address:
        inside.add_default_route(IPv4Address(interface.gateway))
    if interface.gateway6 and interface.address6:
        inside.add_default_route(IPv6Address(interface.gateway6))


def remove_card(interface: Interface, network_fd: int) -> None:
    """Take a card out of a machine's namespace. Absent is success."""
    with Netlink(network_fd) as inside:
        index = inside.index_of(interface.name)
        if index is not None:
            with suppress(NotFound):
                inside.delete(index)
