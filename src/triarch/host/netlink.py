"""rtnetlink: links, addresses and routes of a network namespace.

A start of a machine makes six requests on its hot path, inside a fork server that imports little: hence no package.
Wire format: netlink(7), rtnetlink(7), `linux/rtnetlink.h`, `linux/if_link.h`.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from types import TracebackType

from triarch.errors import Failed, Invalid
from triarch.host.netlink_wire import ACKNOWLEDGE, DUMP, NEW, NetlinkSocket, attribute, attributes, translate

_RTM_NEWLINK, _RTM_DELLINK, _RTM_GETLINK = 16, 17, 18
_RTM_NEWADDR, _RTM_DELADDR, _RTM_GETADDR = 20, 21, 22
_RTM_NEWROUTE, _RTM_GETROUTE = 24, 26

_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_LINK, _IFLA_MASTER, _IFLA_LINKINFO = 1, 3, 5, 10, 18
_IFLA_NET_NS_FD, _IFLA_EXT_MASK = 28, 29
_IFLA_INFO_KIND, _IFLA_INFO_DATA = 1, 2
_RTEXT_FILTER_SKIP_STATS = 1 << 3
_VETH_INFO_PEER = 1
_MACVLAN_INFO_MODE, _MACVLAN_MODE_BRIDGE = 1, 4
_IFA_ADDRESS, _IFA_LOCAL, _IFA_BROADCAST = 1, 2, 4
# Nobody else can have it (the bridge lets nobody else send under it), so nobody need wait until that is found out.
_IFA_F_NODAD = 0x02
_RTA_DST, _RTA_GATEWAY = 1, 5
_RT_TABLE_MAIN, _RTPROT_STATIC, _RTN_UNICAST = 254, 4, 1

_IFF_UP = 1
_CLONE_NEWNET = 0x40000000
_INTERFACE_NAME_MAX_BYTES = 15
_DUMP_TRIES = 10

_LINK = struct.Struct("=BxHiII")  # ifinfomsg: family, hardware type, index, flags, change mask
_ADDRESS = struct.Struct("=BBBBI")  # ifaddrmsg: family, prefix length, flags, scope, index
_ROUTE = struct.Struct("=8BI")  # rtmsg: family, dst_len, src_len, tos, table, protocol, scope, type, flags
_U32 = struct.Struct("=I")


@dataclass(frozen=True, slots=True)
class LinkInfo:
    """One network interface. `kind` is the kernel's name (`bridge`, `veth`, `tun`), empty for hardware.

    `master_index` is the bridge that the interface is plugged into, or None.
    """

    index: int
    name: str
    kind: str
    master_index: int | None
    up: bool


class Netlink:
    """One rtnetlink socket; blocking, for one thread at a time.

    Every method raises `Exists`, `NotFound`, `Denied`, `Unsupported` or `Failed`, named after the interface; the
    `OSError` with the kernel's errno is the `__cause__`.
    """

    def __init__(self, netns_fd: int | None = None) -> None:
        """Open in the calling thread's network namespace, or in the one that `netns_fd` refers to."""
        self._socket = _open_socket() if netns_fd is None else _open_socket_in(netns_fd)

    def __enter__(self) -> Netlink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    # -- links

    def index_of(self, name: str) -> int | None:
        """The index of the interface `name`, or None when there is none."""
        body = _link(0) + _name(name) + _u32(_IFLA_EXT_MASK, _RTEXT_FILTER_SKIP_STATS)
        try:
            replies = self._socket.exchange(_RTM_GETLINK, ACKNOWLEDGE, body)
        except OSError as error:
            if error.errno == errno.ENODEV:
                return None
            raise translate(error, f"look up interface '{name}'") from error
        return _parse_link(replies[0]).index if replies else None

    def link_exists(self, name: str) -> bool:
        return self.index_of(name) is not None

    def links(self) -> tuple[LinkInfo, ...]:
        """Every interface of the namespace."""
        body = _link(0) + _u32(_IFLA_EXT_MASK, _RTEXT_FILTER_SKIP_STATS)
        return tuple(_parse_link(reply) for reply in self._dump(_RTM_GETLINK, body, "list interfaces"))

    def add_bridge(self, name: str, mac: str | None = None) -> None:
        """Create a bridge, still down. With `mac` its address stays; without, it changes with the ports it gets."""
        body = _link(0) + _name(name)
        if mac is not None:
            body += attribute(_IFLA_ADDRESS, _mac_bytes(mac))
        body += attribute(_IFLA_LINKINFO, attribute(_IFLA_INFO_KIND, b"bridge"))
        self._change(_RTM_NEWLINK, NEW, body, f"create bridge '{name}'")

    def add_veth(self, name: str, bridge_index: int, peer_name: str, peer_netns_fd: int, peer_mac: str) -> None:
        """Create a veth pair in one request: `name` here, up and plugged into the bridge; the peer in its namespace.

        The peer is down (the kernel refuses to raise it before the pair is complete) and has the address `peer_mac`.
        """
        peer = (
            _link(0)
            + _name(peer_name)
            + attribute(_IFLA_ADDRESS, _mac_bytes(peer_mac))
            + _u32(_IFLA_NET_NS_FD, peer_netns_fd)
        )
        kind = attribute(_IFLA_INFO_KIND, b"veth")
        data = attribute(_IFLA_INFO_DATA, attribute(_VETH_INFO_PEER, peer))
        body = _link(0, _IFF_UP, _IFF_UP) + _name(name) + _u32(_IFLA_MASTER, bridge_index)
        body += attribute(_IFLA_LINKINFO, kind + data)
        self._change(_RTM_NEWLINK, NEW, body, f"create the veth pair '{name}' and '{peer_name}'")

    def add_macvlan(self, name: str, parent_index: int, mac: str, netns_fd: int | None = None, *, tap: bool) -> None:
        """Create a macvlan (with `tap` a macvtap, the kind for VMs) on an interface, still down.

        With `netns_fd` it is made in that namespace. Machines on one parent reach each other, not the host itself.
        """
        mode = attribute(_IFLA_INFO_DATA, _u32(_MACVLAN_INFO_MODE, _MACVLAN_MODE_BRIDGE))
        kind = attribute(_IFLA_INFO_KIND, b"macvtap" if tap else b"macvlan")
        body = _link(0) + _name(name) + attribute(_IFLA_ADDRESS, _mac_bytes(mac)) + _u32(_IFLA_LINK, parent_index)
        if netns_fd is not None:
            body += _u32(_IFLA_NET_NS_FD, netns_fd)
        body += attribute(_IFLA_LINKINFO, kind + mode)
        self._change(_RTM_NEWLINK, NEW, body, f"create interface '{name}' on interface {parent_index}")

    def add_to_bridge(self, index: int, bridge_index: int) -> None:
        """Plug an interface into a bridge."""
        body = _link(index) + _u32(_IFLA_MASTER, bridge_index)
        self._change(_RTM_NEWLINK, 0, body, f"plug interface {index} into bridge {bridge_index}")

    def set_up(self, index: int) -> None:
        self._change(_RTM_NEWLINK, 0, _link(index, _IFF_UP, _IFF_UP), f"raise interface {index}")

    def set_down(self, index: int) -> None:
        self._change(_RTM_NEWLINK, 0, _link(index, 0, _IFF_UP), f"take down interface {index}")

    def delete(self, index: int) -> None:
        """Delete a virtual interface; a veth takes its peer along."""
        self._change(_RTM_DELLINK, 0, _link(index), f"delete interface {index}")

    # -- addresses and routes

    def add_address(self, index: int, interface: IPv4Interface | IPv6Interface) -> None:
        """Give an interface an address with its prefix length and, in IPv4, broadcast address."""
        body = _address_body(index, interface)
        if interface.version == 4 and interface.network.prefixlen < 31:
            body += attribute(_IFA_BROADCAST, interface.network.broadcast_address.packed)
        self._change(_RTM_NEWADDR, NEW, body, f"give interface {index} the address {interface}")

    def remove_address(self, index: int, interface: IPv4Interface | IPv6Interface) -> None:
        self._change(_RTM_DELADDR, 0, _address_body(index, interface), f"take the address {interface}")

    def add_default_route(self, gateway: IPv4Address | IPv6Address) -> None:
        """Route everything through `gateway`, which must be on a link that is up."""
        family = socket.AF_INET if gateway.version == 4 else socket.AF_INET6
        body = _ROUTE.pack(family, 0, 0, 0, _RT_TABLE_MAIN, _RTPROT_STATIC, 0, _RTN_UNICAST, 0)
        body += attribute(_RTA_GATEWAY, gateway.packed)
        self._change(_RTM_NEWROUTE, NEW, body, f"add the default route through {gateway}")

    def addresses(self, index: int | None = None) -> tuple[IPv4Interface, ...]:
        """Every IPv4 address of the namespace, or of one interface."""
        return tuple(IPv4Interface(found) for found in self._addresses(socket.AF_INET, _IFA_LOCAL, index))

    def addresses6(self, index: int | None = None) -> tuple[IPv6Interface, ...]:
        """Every IPv6 address that is not link-local, of the namespace or of one interface."""
        every = (IPv6Interface(found) for found in self._addresses(socket.AF_INET6, _IFA_ADDRESS, index))
        return tuple(found for found in every if not found.is_link_local)

    def _addresses(self, family: int, kind: int, index: int | None) -> list[tuple[bytes, int]]:
        found = []
        for reply in self._dump(_RTM_GETADDR, _ADDRESS.pack(family, 0, 0, 0, 0), "list addresses"):
            _, prefix, _, _, owner = _ADDRESS.unpack_from(reply)
            value = dict(attributes(reply, _ADDRESS.size)).get(kind)
            if value is not None and index in (None, owner):
                found.append((value, prefix))
        return found

    def routes(self) -> tuple[IPv4Network, ...]:
        """The destination of every IPv4 route in every table; a default route is `0.0.0.0/0`."""
        return tuple(IPv4Network(found) for found in self._routes(socket.AF_INET, 4))

    def routes6(self) -> tuple[IPv6Network, ...]:
        """The same in IPv6. A default route that refuses (`unreachable default`) is none."""
        return tuple(IPv6Network(found) for found in self._routes(socket.AF_INET6, 16))

    def _routes(self, family: int, size: int) -> list[tuple[bytes, int]]:
        found = []
        for reply in self._dump(_RTM_GETROUTE, _ROUTE.pack(family, *(0,) * 8), "list routes"):
            _, prefix, _, _, _, _, _, kind, _ = _ROUTE.unpack_from(reply)
            if prefix or kind == _RTN_UNICAST:
                found.append((dict(attributes(reply, _ROUTE.size)).get(_RTA_DST, bytes(size)), prefix))
        return found

    # -- messages

    def _change(self, kind: int, flags: int, body: bytes, what: str) -> None:
        try:
            self._socket.exchange(kind, ACKNOWLEDGE | flags, body)
        except OSError as error:
            raise translate(error, what) from error

    def _dump(self, kind: int, body: bytes, what: str) -> list[bytes]:
        for _ in range(_DUMP_TRIES):
            try:
                return self._socket.exchange(kind, DUMP, body)
            except InterruptedError:
                continue
            except OSError as error:
                raise translate(error, what) from error
        raise Failed(f"cannot {what}: they changed during each of {_DUMP_TRIES} attempts")


def _open_socket() -> NetlinkSocket:
    try:
        return NetlinkSocket(socket.NETLINK_ROUTE)
    except OSError as error:
        raise translate(error, "open a netlink socket") from error


def _open_socket_in(netns_fd: int) -> NetlinkSocket:
    """A socket belongs to the namespace of the thread that made it: go there, make it, come back."""
    home_fd = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        enter_network_namespace(netns_fd)
        try:
            return _open_socket()
        finally:
            enter_network_namespace(home_fd)
    finally:
        os.close(home_fd)


def enter_network_namespace(netns_fd: int) -> None:
    """Move the calling thread (setns(2)). Raises `Denied` or `Failed`."""
    # Python has os.setns from 3.12 on; ctypes costs more to import than the rest of this module.
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(netns_fd, _CLONE_NEWNET):
        error = OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        raise translate(error, "enter a network namespace") from error


def _address_body(index: int, interface: IPv4Interface | IPv6Interface) -> bytes:
    family, flags = (socket.AF_INET, 0) if interface.version == 4 else (socket.AF_INET6, _IFA_F_NODAD)
    packed = interface.ip.packed
    body = _ADDRESS.pack(family, interface.network.prefixlen, flags, 0, index)
    return body + attribute(_IFA_LOCAL, packed) + attribute(_IFA_ADDRESS, packed)


def _u32(kind: int, value: int) -> bytes:
    return attribute(kind, _U32.pack(value))


def _link(index: int, flags: int = 0, change: int = 0) -> bytes:
    return _LINK.pack(socket.AF_UNSPEC, 0, index, flags, change)


def _name(name: str) -> bytes:
    encoded = os.fsencode(name)
    if not 1 <= len(encoded) <= _INTERFACE_NAME_MAX_BYTES or any(c in b"/: \t\n\0" for c in encoded):
        raise Invalid(
            f"illegal interface name {name!r}: it needs 1 to {_INTERFACE_NAME_MAX_BYTES} bytes, no space, '/' or ':'"
        )
    return attribute(_IFLA_IFNAME, encoded + b"\0")


def _mac_bytes(mac: str) -> bytes:
    parts = mac.split(":")
    try:
        if len(parts) == 6 and all(len(part) == 2 for part in parts):
            return bytes(int(part, 16) for part in parts)
    except ValueError:
        pass
    raise Invalid(f"illegal hardware address {mac!r}: it needs six pairs of hexadecimal digits with ':' between")


def _parse_link(payload: bytes) -> LinkInfo:
    _, _, index, flags, _ = _LINK.unpack_from(payload)
    found = dict(attributes(payload, _LINK.size))
    kind = dict(attributes(found.get(_IFLA_LINKINFO, b""))).get(_IFLA_INFO_KIND, b"")
    master = found.get(_IFLA_MASTER)
    return LinkInfo(
        index=index,
        name=os.fsdecode(found.get(_IFLA_IFNAME, b"").rstrip(b"\0")),
        kind=kind.rstrip(b"\0").decode(),
        master_index=None if master is None else _U32.unpack(master)[0],
        up=bool(flags & _IFF_UP),
    )
