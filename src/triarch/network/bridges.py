"""The host's part of one network: its bridge and its dnsmasq. Blocking, but for what starts or ends a process."""

from __future__ import annotations

from contextlib import suppress
from ipaddress import IPv4Interface, IPv6Interface
from pathlib import Path

from triarch.errors import Conflict, Denied, Exists, InUse, NotFound, Unavailable
from triarch.host import sysctl
from triarch.host.dnsmasq import Dnsmasq, Serving
from triarch.host.netlink import LinkInfo, Netlink
from triarch.model.instance import Instance
from triarch.model.network import Network, NetworkKind
from triarch.network.addresses import bridge_mac, gateway, gateway6
from triarch.network.plan import Segment, bridged

DOMAIN = "triarch"
FORWARDING = "net.ipv4.ip_forward"
FORWARDING_6 = "net.ipv6.conf.all.forwarding"
_ACCEPT_RA = "net.ipv6.conf.*.accept_ra"
_DISABLE_6 = "net.ipv6.conf.*.disable_ipv6"
_ROUTE_LOCALNET = "net.ipv4.conf.*.route_localnet"


def bridge_name(instance: Instance, network: Network) -> str:
    """Empty for a network without a bridge."""
    if network.kind is NetworkKind.MACVLAN:
        return ""
    return instance.bridge if network.index == 0 else f"{instance.bridge}n{network.index}"


def directory(instance: Instance, network: Network) -> Path:
    """Where its dnsmasq has its files."""
    base = Path(instance.run_dir) / "network"
    return base if network.index == 0 else base / f"n{network.index}"


def name_server(instance: Instance, network: Network) -> Dnsmasq:
    return Dnsmasq(directory(instance, network), DOMAIN)


def serving(segment: Segment) -> Serving | None:
    """What its dnsmasq is to do, None where it has none."""
    network, subnet, subnet6 = segment.network, segment.ipv4, segment.ipv6
    if not network.served or subnet is None or not (network.dns or network.dhcp):
        return None
    return Serving(
        bridge=segment.bridge,
        address=gateway(subnet).ip,
        address6=gateway6(subnet6).ip if subnet6 is not None else None,
        dns=network.dns,
        dhcp=subnet if network.dhcp else None,
        dhcp6=subnet6 if network.dhcp else None,
        routed=network.kind is NetworkKind.NAT,
        routed6=segment.routed6,
    )


def ensure_bridge(netlink: Netlink, instance: Instance, segment: Segment) -> None:
    """The bridge is there, up, with the host's addresses on it and its parent in it. Idempotent.

    Raises `Conflict` for a bridge with other addresses, `NotFound` or `InUse` for a parent that cannot be had.
    """
    name, network = segment.bridge, segment.network
    index = netlink.index_of(name)
    if index is None:
        netlink.add_bridge(name, bridge_mac(instance.tag, network.index))
        index = _index(netlink, name)
        _quiet(name, with_ipv6=segment.ipv6 is not None and network.served)
    if network.served:
        _ensure_addresses(netlink, index, segment)
    netlink.set_up(index)
    if network.parent is not None:
        parent = check_parent(netlink, network.parent, name)
        if parent.master_index != index:
            netlink.add_to_bridge(parent.index, index)
        netlink.set_up(parent.index)


def _ensure_addresses(netlink: Netlink, index: int, segment: Segment) -> None:
    own: list[IPv4Interface | IPv6Interface] = []
    there: list[IPv4Interface | IPv6Interface] = [*netlink.addresses(index)]
    if segment.ipv4 is not None:
        own.append(gateway(segment.ipv4))
    if segment.ipv6 is not None:
        own.append(gateway6(segment.ipv6))
        there += netlink.addresses6(index)
    if others := [str(address) for address in there if address not in own]:
        needed = " and ".join(str(address) for address in own)
        raise Conflict(
            f"bridge '{segment.bridge}' has the address {others[0]}, this instance needs {needed}", hint="triarch down"
        )
    for address in own:
        if address not in there:
            netlink.add_address(index, address)


def _quiet(bridge: str, *, with_ipv6: bool) -> None:
    """The host takes no routes from machines, and on networks of others has no address of its own making."""
    if sysctl.read(sysctl.of_interface(_DISABLE_6, bridge)) is None:
        return
    with suppress(Denied):
        sysctl.write(sysctl.of_interface(_ACCEPT_RA, bridge), "0")
        sysctl.write(sysctl.of_interface(_DISABLE_6, bridge), "0" if with_ipv6 else "1")


def check_parent(netlink: Netlink, parent: str, bridge: str, *, force: bool = True) -> LinkInfo:
    """The interface that a network stands on. Without `force` it must have no address: as a port it could not use it.

    Raises `NotFound`, or `InUse`.
    """
    links = {link.name: link for link in netlink.links()}
    found = links.get(parent)
    if found is None:
        raise NotFound(f"this host has no interface '{parent}'", hint="ip link", interface=parent)
    if found.kind == "bridge" or parent == "lo":
        raise InUse(f"interface '{parent}' is a {found.kind or 'loopback'}: it cannot be put into a bridge")
    own = links.get(bridge)
    if found.master_index is not None and (own is None or found.master_index != own.index):
        master = next((link.name for link in links.values() if link.index == found.master_index), "another interface")
        raise InUse(f"interface '{parent}' belongs to '{master}' already", interface=parent)
    addresses = [*netlink.addresses(found.index), *netlink.addresses6(found.index)]
    if addresses and not force:
        raise InUse(
            f"interface '{parent}' has the address {addresses[0]}, which the host could not use any more",
            hint="give a network to an interface without addresses, or repeat with --force",
            interface=parent,
        )
    return found


def ensure_loopback_route(segment: Segment) -> None:
    """Let what the host sends to its own loopback address be forwarded to machines (ip-sysctl: `route_localnet`)."""
    name = sysctl.of_interface(_ROUTE_LOCALNET, segment.bridge)
    if sysctl.read(name) != "1":
        sysctl.write(name, "1")


def ensure_forwarding(segment: Segment) -> None:
    """Forwarding is a switch of the whole host. It is turned on where it is off and left on: nobody can know who came
    to rely on it since (Docker, Podman and libvirt do the same).

    A host that forwards IPv6 takes no router advertisements, its own addresses' included, unless told to.
    """
    if sysctl.read(FORWARDING) != "1":
        sysctl.write(FORWARDING, "1")
    if not segment.routed6 or segment.ipv6 is None or sysctl.read(FORWARDING_6) == "1":
        return
    with suppress(Denied):
        for interface in sysctl.interfaces(_ACCEPT_RA):
            setting = sysctl.of_interface(_ACCEPT_RA, interface)
            if sysctl.read(setting) == "1":
                sysctl.write(setting, "2")
        sysctl.write(FORWARDING_6, "1")


def host_has_ipv6() -> bool:
    return sysctl.read(sysctl.of_interface(_DISABLE_6, "default")) == "0"


def try_bridge(netlink: Netlink, name: str) -> None:
    """Make one and remove it. Raises `Denied` with the way out."""
    try:
        # It is there already where an earlier probe was killed, or where another one is under way.
        with suppress(Exists):
            netlink.add_bridge(name)
    except Denied as error:
        raise Denied(
            "bridges need CAP_NET_ADMIN, which this process lacks", hint="run as root with CAP_NET_ADMIN"
        ) from error
    delete_link(netlink, netlink.index_of(name))


def try_macvlan(netlink: Netlink, parent: str) -> None:
    """Whether the interface is there for a macvlan. Raises `Unavailable`."""
    if not netlink.link_exists(parent):
        raise Unavailable(f"this host has no interface '{parent}'", hint="ip link")


def delete_link(netlink: Netlink, index: int | None) -> None:
    """Gone already is success: another process, or the end of a namespace, may be faster."""
    if index is not None:
        with suppress(NotFound):
            netlink.delete(index)


def _index(netlink: Netlink, name: str) -> int:
    index = netlink.index_of(name)
    if index is None:
        raise NotFound(f"interface '{name}' is gone right after it was made", interface=name)
    return index


def missing(netlink: Netlink, segment: Segment, interfaces: tuple[str, ...]) -> list[str]:
    """Of the bridge and those that should be plugged into it, what is not as it should be."""
    if not bridged(segment):
        return []
    links = {link.name: link for link in netlink.links()}
    bridge = links.get(segment.bridge)
    if bridge is None or not bridge.up:
        return [segment.bridge]
    return [name for name in interfaces if name in links and links[name].master_index != bridge.index]
