"""Networks and what a machine has of them."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated

import msgspec
from msgspec import UNSET, UnsetType

Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
# Not `\d`, which takes the digits of every script.
_OCTET = r"(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
# In Python `$` alone would let a last newline pass.
IPV4_PATTERN = rf"^{_OCTET}(\.{_OCTET}){{3}}$(?!\n)"
IPv4Text = Annotated[str, msgspec.Meta(pattern=IPV4_PATTERN)]
IPv6Text = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f:]{2,39}$(?!\n)")]
CidrText = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f.:]{2,39}/[0-9]{1,3}$(?!\n)")]


# Inside other patterns: a machine's name, and a label with or without its value.
_NAME = r"^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$(?!\n)"
_LABEL = r"[a-z0-9][a-z0-9._/-]{0,62}(=[^\x00-\x1f\x7f]{0,255})?"
PEER_PATTERN = rf"^([0-9a-f.:]{{2,39}}/[0-9]{{1,3}}|machine:[a-z][a-z0-9-]{{0,62}}|label:{_LABEL})$(?!\n)"
InterfaceName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.@-]{1,15}$(?!\n)")]

DEFAULT_NETWORK = "nat"
USER_NETWORK = "user"
NO_NETWORK = "none"


class NetworkKind(StrEnum):
    """How a network reaches beyond its machines."""

    NAT = "nat"
    BRIDGE = "bridge"
    ISOLATED = "isolated"
    MACVLAN = "macvlan"


class Direction(StrEnum):
    """As the machine sees it."""

    INGRESS = "ingress"
    EGRESS = "egress"


class Protocol(StrEnum):
    TCP = "tcp"
    UDP = "udp"
    ICMP = "icmp"


class AclRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One rule of a network's access list; the first that matches decides, and what no rule matches is allowed.

    `machine` and `label` (`role=web`, or `role`) choose the machines it is for, all of the network without them. `peer`
    is who is at the other end: a CIDR, `machine:NAME` or `label:KEY=VALUE`; anybody without it.
    """

    direction: Direction
    allow: bool
    machine: Annotated[str, msgspec.Meta(pattern=_NAME)] | None = None
    label: Annotated[str, msgspec.Meta(pattern=rf"^{_LABEL}$(?!\n)")] | None = None
    peer: Annotated[str, msgspec.Meta(pattern=PEER_PATTERN)] | None = None
    protocol: Protocol | None = None
    ports: tuple[Port, ...] = ()


class Network(msgspec.Struct, frozen=True, kw_only=True):
    """The stored record of a network.

    `index` names its interfaces, from 1; the built-in network `nat` has 0. `ipv4` and `ipv6` are its subnets; the first
    address of each is the host's own. A `bridge` is plugged into the host's interface `parent`, a `macvlan` stands
    on it; on both, addresses come from outside unless `ipv4` says which are ours to give, and `gateway` and
    `nameserver` are those of the world there. Machines of a network reach each other; `dns` answers for their names and
    aliases, `dhcp` gives those that ask the addresses that are theirs (both on `nat` and `isolated` only).
    """

    name: str
    index: int
    kind: NetworkKind
    ipv4: CidrText | None = None
    ipv6: CidrText | None = None
    parent: InterfaceName | None = None
    gateway: IPv4Text | None = None
    nameserver: IPv4Text | None = None
    dhcp: bool = True
    dns: bool = True
    acl: tuple[AclRule, ...] = ()
    description: str = ""
    labels: dict[str, str] = {}
    created_at: datetime

    @property
    def served(self) -> bool:
        """The host itself is on it: its gateway, name server and source of addresses."""
        return self.kind in (NetworkKind.NAT, NetworkKind.ISOLATED)


class CreateNetwork(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of create. Subnets that are None are chosen free of the host's own on `nat` and `isolated`.

    `ipv6` may be `none` there. `force` takes a `parent` that has addresses of its own, which a bridge port cannot use.
    """

    name: str
    kind: NetworkKind = NetworkKind.NAT
    ipv4: CidrText | None = None
    ipv6: Annotated[str, msgspec.Meta(pattern=r"^([0-9a-f:]{2,39}/[0-9]{1,3}|none)$(?!\n)")] | None = None
    parent: InterfaceName | None = None
    gateway: IPv4Text | None = None
    nameserver: IPv4Text | None = None
    dhcp: bool = True
    dns: bool = True
    acl: tuple[AclRule, ...] = ()
    description: Annotated[str, msgspec.Meta(max_length=1000)] = ""
    labels: dict[str, str] = {}
    force: bool = False


class EditNetwork(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Body of edit: what is not given stays. All of it is live. Kind, subnets and parent are a network's own."""

    gateway: IPv4Text | UnsetType | None = UNSET
    nameserver: IPv4Text | UnsetType | None = UNSET
    dhcp: bool | UnsetType = UNSET
    dns: bool | UnsetType = UNSET
    acl: tuple[AclRule, ...] | UnsetType = UNSET
    description: Annotated[str, msgspec.Meta(max_length=1000)] | UnsetType = UNSET
    labels: dict[str, str] | UnsetType = UNSET


class AddAclRule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of `acl add`: at `position` (from 1), or at the end."""

    rule: AclRule
    position: Annotated[int, msgspec.Meta(ge=1)] | None = None


class NetworkView(Network, frozen=True, kw_only=True):
    """A network as lists and `info` show it; `machines` are the names of those that have a card on it."""

    machines: tuple[str, ...] = ()
    operation: str | None = None


class Nic(msgspec.Struct, frozen=True, kw_only=True):
    """A machine's identity on a network; it survives every switch of architecture.

    `address` is in CIDR form (`10.77.0.9/16`), as is `address6`; `mac` is lower-case with colons. On a network that
    does not give addresses `address` is empty: the machine asks by DHCP, if it does.
    """

    mac: str
    address: str
    address6: str = ""

    @property
    def ip(self) -> str:
        return self.address.partition("/")[0]

    @property
    def ip6(self) -> str:
        return self.address6.partition("/")[0]


class Forward(msgspec.Struct, frozen=True, kw_only=True):
    """A TCP or UDP port of the host that leads to a port of the machine."""

    host_port: Port
    machine_port: Port
    host_address: IPv4Text = "127.0.0.1"
    protocol: Protocol = Protocol.TCP


class BridgeLink(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="bridge"):
    """The machine is plugged into a bridge of this instance through `host_interface` (a veth end or a tap).

    Empty `gateway`, `nameserver` and `domain` are left out.
    """

    bridge: str
    host_interface: str
    nic: Nic
    gateway: str = ""
    nameserver: str = ""
    domain: str = ""
    gateway6: str = ""


class MacvlanLink(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="macvlan"):
    """The machine has a macvlan interface (`host_interface`, a macvtap for VMs) on the host's interface `parent`."""

    parent: str
    host_interface: str
    nic: Nic
    gateway: str = ""
    nameserver: str = ""
    domain: str = ""
    gateway6: str = ""


class UserLink(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="user"):
    """QEMU's user-mode network, where the host allows no bridge: outbound traffic and forwards only.

    The guest sees `nic.address`'s MAC but the network of QEMU (10.0.2.0/24, gateway and resolver inside it).
    """

    nic: Nic
    gateway: str = "10.0.2.2"
    nameserver: str = "10.0.2.3"
    address: str = "10.0.2.15/24"
    domain: str = "triarch"
    forwards: tuple[Forward, ...] = ()


class NoLink(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="none"):
    """Loopback only."""


Link = BridgeLink | MacvlanLink | UserLink | NoLink
