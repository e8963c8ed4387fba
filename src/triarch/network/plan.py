"""What is to hold on the host: networks with their bridges, and the cards that are plugged into them. Values only."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network

import msgspec

from triarch.model.network import AclRule, Forward, Network, NetworkKind, Nic

# What a person writes for "on every address of the host".
ANY_ADDRESS = "0.0.0.0"


class Port(msgspec.Struct, frozen=True, kw_only=True):
    """One card of one running machine. `names` are what DNS answers to: the machine's name, then its aliases."""

    network: str
    machine: str
    host_interface: str
    nic: Nic
    names: tuple[str, ...] = ()
    labels: dict[str, str] = {}
    forwards: tuple[Forward, ...] = ()
    receive_bytes_per_second: int | None = None
    send_bytes_per_second: int | None = None


class Segment(msgspec.Struct, frozen=True, kw_only=True):
    """A network on this host: its bridge (empty for a macvlan), and whether the host itself has a way out over IPv6."""

    network: Network
    bridge: str
    routed6: bool = False

    @property
    def ipv4(self) -> IPv4Network | None:
        return IPv4Network(self.network.ipv4) if self.network.ipv4 else None

    @property
    def ipv6(self) -> IPv6Network | None:
        return IPv6Network(self.network.ipv6) if self.network.ipv6 else None


def selected(rule: AclRule, ports: tuple[Port, ...]) -> tuple[Port, ...]:
    """The cards of a network that a rule is for."""
    return tuple(
        port
        for port in ports
        if (rule.machine is None or port.machine == rule.machine)
        and (rule.label is None or has_label(port, rule.label))
    )


def peers(rule: AclRule, ports: tuple[Port, ...]) -> tuple[Port, ...] | None:
    """The cards, of whatever network, that a rule's `peer` names; None where it is a CIDR or anybody."""
    kind, colon, value = (rule.peer or "").partition(":")
    if colon and kind == "machine":
        return tuple(port for port in ports if port.machine == value)
    if colon and kind == "label":
        return tuple(port for port in ports if has_label(port, value))
    return None


def has_label(port: Port, text: str) -> bool:
    """`KEY=VALUE`, or `KEY` with whatever value."""
    key, equals, value = text.partition("=")
    return key in port.labels and (not equals or port.labels[key] == value)


def bridged(segment: Segment) -> bool:
    return segment.network.kind is not NetworkKind.MACVLAN
