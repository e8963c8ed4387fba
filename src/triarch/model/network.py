"""Networks and what a machine has of them."""

from __future__ import annotations

from typing import Annotated

import msgspec

Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]
_OCTET = r"(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
# In Python `$` alone would let a last newline pass.
IPV4_PATTERN = rf"^{_OCTET}(\.{_OCTET}){{3}}$(?!\n)"
IPv4Text = Annotated[str, msgspec.Meta(pattern=IPV4_PATTERN)]


class Nic(msgspec.Struct, frozen=True, kw_only=True):
    """A machine's network identity; it survives every switch of architecture.

    `address` is in CIDR form (`10.77.0.9/16`); `mac` is lower-case with colons.
    """

    mac: str
    address: str

    @property
    def ip(self) -> str:
        return self.address.partition("/")[0]


class Forward(msgspec.Struct, frozen=True, kw_only=True):
    """A TCP port of the host that leads to a port of the machine."""

    host_port: Port
    machine_port: Port
    host_address: IPv4Text = "127.0.0.1"


class BridgeLink(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="bridge"):
    """The machine is plugged into a bridge of this instance through `host_interface` (a veth end or a tap)."""

    bridge: str
    host_interface: str
    nic: Nic
    gateway: str
    nameserver: str
    domain: str


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


Link = BridgeLink | UserLink | NoLink
