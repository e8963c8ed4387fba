"""The NAT network of an instance: a bridge, an nftables table, a name server. Made at first use, gone after `down`."""

from __future__ import annotations

import asyncio
import re
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path

from triarch.errors import Conflict, Denied, Error, Exists, Invalid, NotFound, Unavailable
from triarch.host import iptables, nft, sysctl
from triarch.host.dnsmasq import Dnsmasq
from triarch.host.netlink import Netlink
from triarch.host.process import find_program
from triarch.host.rights import rights
from triarch.model.instance import Instance
from triarch.model.machine import Machine
from triarch.model.names import check_machine_name
from triarch.model.network import BridgeLink, Nic
from triarch.network.addresses import PREFIX_LENGTH, bridge_mac, choose, gateway, machine_nic

DOMAIN = "triarch"
FORWARDING = "net.ipv4.ip_forward"
_ANY_SUBNET = IPv4Network((0, PREFIX_LENGTH))


class NatNetwork:
    """Everything on the host is named after the instance, so that any daemon of it finds what another one made.

    IPv4 forwarding is a switch of the whole host. It is turned on where it is off and left on at teardown: nobody can
    know who came to rely on it since (Docker, Podman and libvirt do the same).
    """

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._table = f"triarch_{instance.tag}"
        self._dns = Dnsmasq(Path(instance.run_dir) / "network", DOMAIN)
        self._lock = asyncio.Lock()
        self._filtered: IPv4Network | None = None
        self._probed = False

    # -- pure

    def nic(self, subnet: IPv4Network, index: int) -> Nic:
        """Address and MAC of machine `index`. Raises `Exhausted`."""
        return machine_nic(self._instance.tag, subnet, index)

    def link(self, subnet: IPv4Network, machine: Machine) -> BridgeLink:
        """How the machine is plugged in."""
        router = str(gateway(subnet).ip)
        return BridgeLink(
            bridge=self._instance.bridge,
            host_interface=self._instance.host_interface(machine.index),
            nic=machine.nic or self.nic(subnet, machine.index),
            gateway=router,
            nameserver=router,
            domain=DOMAIN,
        )

    # -- asking the host

    def probe(self) -> None:
        """Try to make a bridge. Raises `Unavailable` with the reason, or `MissingProgram`; success is remembered."""
        if self._probed:
            return
        find_program("nft")
        find_program("dnsmasq")
        try:
            with Netlink() as netlink:
                if not netlink.link_exists(self._instance.bridge):
                    _try_bridge(netlink, f"{self._instance.bridge}p")
            self._dns.argv(gateway(_ANY_SUBNET).ip)
            nft.check_table(self._table, _chains(self._instance.bridge, _ANY_SUBNET))
        except Error as error:
            raise Unavailable(
                f"this host allows no NAT network: {error.message}",
                hint=error.hint or "use --network user (hosted machines) or --network none",
            ) from error
        if not sysctl.can_be(FORWARDING, "1"):
            raise Unavailable(
                "this host allows no NAT network: IPv4 forwarding is off and cannot be turned on from here",
                hint=f"sysctl -w {FORWARDING}=1",
            )
        self._probed = True

    def choose_subnet(self) -> IPv4Network:
        """An address range free of every address and route of the host, or the one that our bridge has already.

        Raises `Exhausted` when there is none.
        """
        with Netlink() as netlink:
            index = netlink.index_of(self._instance.bridge)
            if index is not None:
                for own in netlink.addresses(index):
                    if own == gateway(own.network) and own.network.prefixlen == PREFIX_LENGTH:
                        return own.network
            taken = [address.network for address in netlink.addresses()]
            return choose(self._instance.tag, [*taken, *netlink.routes()])

    # -- changing the host

    async def ensure(self, subnet: IPv4Network) -> None:
        """Bridge, NAT and name server are there when this returns, whatever was there of them before.

        Cheap when nothing is missing: no process is started. Raises `Unavailable`, `MissingProgram`, `Conflict` (the
        bridge has another subnet) or `CommandFailed`.
        """
        # What it makes belongs to the instance: an operation that is cancelled meanwhile lets it come to its end.
        await asyncio.shield(self._ensure(subnet))

    async def publish(self, name: str, ip: str) -> None:
        """Machines find `name` and `name.triarch` at `ip`. Raises `Invalid` for what is neither."""
        check_machine_name(name)
        try:
            address = IPv4Address(ip)
        except ValueError as error:
            raise Invalid(f"illegal address {ip!r} for machine '{name}': it needs four numbers with '.'") from error
        self._dns.publish(name, address)

    async def withdraw(self, name: str) -> None:
        """Machines find `name` no longer. Absent is success."""
        self._dns.withdraw(check_machine_name(name))

    async def release(self, index: int) -> None:
        """Drop what a machine's run may have left: its host interface. Absent is success."""
        await asyncio.to_thread(_delete_links, re.escape(self._instance.host_interface(index)))

    async def teardown(self) -> None:
        """Remove the name server, the rules, every machine's host interface and the bridge. Absent is success."""
        async with self._lock:
            await self._dns.clear()
            self._filtered = None
            if rights().networks:
                await asyncio.to_thread(self._remove)

    async def _ensure(self, subnet: IPv4Network) -> None:
        async with self._lock:
            await asyncio.to_thread(self._ensure_bridge, subnet)
            if self._filtered != subnet or not nft.table_exists("inet", self._table):
                await asyncio.to_thread(self._ensure_filter, subnet)
                self._filtered = subnet
            await self._dns.ensure(gateway(subnet).ip)

    def _ensure_bridge(self, subnet: IPv4Network) -> None:
        self.probe()
        name, own = self._instance.bridge, gateway(subnet)
        with Netlink() as netlink:
            index = netlink.index_of(name)
            if index is None:
                netlink.add_bridge(name, bridge_mac(self._instance.tag))
                index = _index(netlink, name)
            addresses = netlink.addresses(index)
            if others := [str(address) for address in addresses if address != own]:
                raise Conflict(
                    f"bridge '{name}' has the address {others[0]}, this instance needs {own}", hint="triarch down"
                )
            if own not in addresses:
                netlink.add_address(index, own)
            netlink.set_up(index)

    def _ensure_filter(self, subnet: IPv4Network) -> None:
        if sysctl.read(FORWARDING) != "1":
            sysctl.write(FORWARDING, "1")
        bridge = self._instance.bridge
        nft.replace_table(self._table, _chains(bridge, subnet))
        iptables.allow(
            self._table,
            (
                ("FORWARD", "-i", bridge),
                ("FORWARD", "-o", bridge, "-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED"),
                ("INPUT", "-i", bridge, "-p", "udp", "--dport", "53"),
                ("INPUT", "-i", bridge, "-p", "tcp", "--dport", "53"),
            ),
        )

    def _remove(self) -> None:
        nft.delete_table(self._table)
        iptables.remove(self._table)
        bridge = re.escape(self._instance.bridge)
        _delete_links(rf"{bridge}m[0-9]+")
        _delete_links(rf"{bridge}p?")


def _chains(bridge: str, subnet: IPv4Network) -> str:
    """Machines reach one another, and out under the host's address; they send from the subnet's addresses only.

    From outside, other instances included, come only answers; nor is the bridge's own address, with its name server,
    to be reached from there. The first rule is for hosts that pass bridged packets through here (br_netfilter).
    """
    return f"""
    chain forward {{
        type filter hook forward priority filter; policy accept;
        iifname "{bridge}" oifname "{bridge}" accept
        iifname "{bridge}" ip saddr {subnet} accept
        iifname "{bridge}" drop
        oifname "{bridge}" ct state established,related accept
        oifname "{bridge}" drop
    }}
    chain input {{
        type filter hook input priority filter; policy accept;
        ip daddr {gateway(subnet).ip} iifname != {{ "{bridge}", "lo" }} drop
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr {subnet} oifname != "{bridge}" masquerade
    }}
"""


def _try_bridge(netlink: Netlink, name: str) -> None:
    try:
        # It is there already where an earlier probe was killed, or where another one is under way.
        with suppress(Exists):
            netlink.add_bridge(name)
    except Denied as error:
        raise Denied(
            "bridges need CAP_NET_ADMIN, which this process lacks", hint="run as root with CAP_NET_ADMIN"
        ) from error
    _delete(netlink, netlink.index_of(name))


def _delete(netlink: Netlink, index: int | None) -> None:
    """Gone already is success: another process, or the end of a namespace, may be faster."""
    if index is not None:
        with suppress(NotFound):
            netlink.delete(index)


def _index(netlink: Netlink, name: str) -> int:
    index = netlink.index_of(name)
    if index is None:
        raise NotFound(f"interface '{name}' is gone right after it was made", interface=name)
    return index


def _delete_links(pattern: str) -> None:
    with Netlink() as netlink:
        for link in netlink.links():
            if re.fullmatch(pattern, link.name):
                _delete(netlink, link.index)
