"""All networks of an instance on this host: bridges, firewall, names and addresses, and who is plugged in."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Interface, IPv6Network
from pathlib import Path

from triarch.errors import Error, Invalid, Unavailable
from triarch.host import iptables, nft, sysctl
from triarch.host.dnsmasq import Dnsmasq, Record, Serving
from triarch.host.netlink import Netlink
from triarch.host.nft import Table
from triarch.host.nft_sets import change_elements
from triarch.host.process import find_program
from triarch.host.rights import rights
from triarch.model.instance import Instance
from triarch.model.names import check_machine_name
from triarch.model.network import BridgeLink, MacvlanLink, Network, NetworkKind, Nic
from triarch.network import bridges
from triarch.network.addresses import PREFIX_LENGTH, choose, choose6, gateway, gateway6, mac
from triarch.network.plan import Port, Segment, bridged
from triarch.network.rules import port_chains, routed_chains, spoof_keys, table_name, wants_loopback, without_elements

log = logging.getLogger(__name__)

WATCH_SECONDS = 2.0
_ANY_SUBNET = IPv4Network((0, PREFIX_LENGTH))
# A name that the kernel would take and no shell, nor nft's own syntax, would read otherwise.
_INTERFACE = re.compile(r"[A-Za-z0-9_.-]{1,15}\Z")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}\Z")


class HostNetworks:
    """Everything on the host is named after the instance, so that any daemon of it finds what another one made.

    What should hold is kept in memory: segments (networks in use) and ports. The host is made to agree with it at each
    change, and by `watch` when somebody else undid it.
    """

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._table = table_name(instance)
        self._lock = asyncio.Lock()
        self._segments: dict[str, Segment] = {}
        self._ports: dict[str, Port] = {}
        self._servers: dict[int, Dnsmasq] = {}
        self._published: dict[str, Port] = {}
        self._applied: tuple[Table, ...] = ()
        self._keys: dict[str, set[bytes]] = {}
        self._allowed: tuple[str, ...] = ()
        self._seen: tuple[int, str | None] | None = None
        self._stale = asyncio.Event()
        self._watcher: asyncio.Task[None] | None = None
        self._probed = False

    # -- pure

    def host_interface(self, machine_index: int, card: int = 0) -> str:
        """The host's end of a machine's card: at most 15 characters (IFNAMSIZ)."""
        return self._instance.host_interface(machine_index) + ("" if card == 0 else chr(ord("a") + card - 1))

    def mac(self, machine_index: int, card: int = 0) -> str:
        return mac(self._instance.tag, machine_index, card)

    def link(self, network: Network, nic: Nic, host_interface: str) -> BridgeLink | MacvlanLink:
        """How a card is plugged in."""
        if network.kind is NetworkKind.MACVLAN:
            return MacvlanLink(
                parent=network.parent or "",
                host_interface=host_interface,
                nic=nic,
                gateway=network.gateway or "",
                nameserver=network.nameserver or "",
            )
        segment = self._segments.get(network.name) or self._segment(network)
        router = str(gateway(segment.ipv4).ip) if segment.ipv4 is not None and network.served else ""
        routed = network.kind is NetworkKind.NAT
        outside6 = routed and segment.routed6 and segment.ipv6 is not None and nic.address6
        return BridgeLink(
            bridge=segment.bridge,
            host_interface=host_interface,
            nic=nic,
            gateway=router if routed else network.gateway or "",
            nameserver=router if network.served and network.dns else network.nameserver or "",
            domain=bridges.DOMAIN if network.served and network.dns else "",
            gateway6=str(gateway6(segment.ipv6).ip) if outside6 and segment.ipv6 is not None else "",
        )

    def _segment(self, network: Network, *, routed6: bool = False) -> Segment:
        bridge = bridges.bridge_name(self._instance, network)
        return Segment(network=network, bridge=bridge, routed6=routed6 and network.kind is NetworkKind.NAT)

    # -- asking the host

    def probe(self) -> None:
        """Try to make a bridge. Raises `Unavailable` with the reason, or `MissingProgram`; success is remembered."""
        if self._probed:
            return
        find_program("nft")
        find_program("dnsmasq")
        bridge = self._instance.bridge
        try:
            with Netlink() as netlink:
                if not netlink.link_exists(bridge):
                    bridges.try_bridge(netlink, f"{bridge}p")
            bridges.name_server(self._instance, _TRIAL).argv(Serving(bridge=bridge, address=gateway(_ANY_SUBNET).ip))
            nft.check_tables(*self._tables((Segment(network=_TRIAL, bridge=bridge),), ()))
        except Error as error:
            raise Unavailable(
                f"this host allows no NAT network: {error.message}",
                hint=error.hint or "use --network user (hosted machines) or --network none",
            ) from error
        if not sysctl.can_be(bridges.FORWARDING, "1"):
            raise Unavailable(
                "this host allows no NAT network: IPv4 forwarding is off and cannot be turned on from here",
                hint=f"sysctl -w {bridges.FORWARDING}=1",
            )
        self._probed = True

    def choose_subnet(self, others: Iterable[Network] = (), network: Network | None = None) -> IPv4Network:
        """An IPv4 range free of every address and route of the host and of `others`.

        For the built-in network (or `network`) it is the one that its bridge has already. Raises `Exhausted`.
        """
        with Netlink() as netlink:
            bridge = bridges.bridge_name(self._instance, network) if network is not None else self._instance.bridge
            index = netlink.index_of(bridge)
            if index is not None:
                for own in netlink.addresses(index):
                    if own == gateway(own.network) and own.network.prefixlen == PREFIX_LENGTH:
                        return own.network
            taken = [address.network for address in netlink.addresses()]
            taken += [IPv4Network(other.ipv4, strict=False) for other in others if other.ipv4]
            return choose(self._instance.tag, [*taken, *netlink.routes()])

    def choose_subnet6(self, index: int, others: Iterable[Network] = ()) -> IPv6Network | None:
        """An IPv6 range of the instance's own; None on a host without IPv6. Raises `Exhausted`."""
        if not bridges.host_has_ipv6():
            return None
        with Netlink() as netlink:
            name = self._instance.bridge if index == 0 else f"{self._instance.bridge}n{index}"
            own = netlink.index_of(name)
            if own is not None and (found := netlink.addresses6(own)):
                return found[0].network
            taken = [IPv6Network(other.ipv6, strict=False) for other in others if other.ipv6]
            return choose6(self._instance.tag, index, [*taken, *netlink.routes6()])

    def check_free(self, subnet: IPv4Network | IPv6Network) -> None:
        """Raise `Invalid` for a range that the host uses or routes somewhere."""
        with Netlink() as netlink:
            routes: tuple[IPv4Network | IPv6Network, ...] = (
                netlink.routes() if isinstance(subnet, IPv4Network) else netlink.routes6()
            )
        for route in routes:
            if route.prefixlen > 7 and route.overlaps(subnet):
                raise Invalid(f"the range {subnet} is in use on this host: it has a route to {route}", hint="ip route")

    def check_parent(self, network: Network, *, force: bool) -> None:
        """Raise `NotFound`, or `InUse` for an interface that a network cannot stand on."""
        if network.parent is None:
            return
        with Netlink() as netlink:
            if network.kind is NetworkKind.MACVLAN:
                bridges.try_macvlan(netlink, network.parent)
            else:
                bridges.check_parent(netlink, network.parent, bridges.bridge_name(self._instance, network), force=force)

    # -- changing the host

    async def ensure(self, network: Network) -> None:
        """Bridge, rules and dnsmasq are there when this returns, whatever was there of them before.

        Cheap when nothing is missing: no process is started. Raises `Unavailable`, `MissingProgram`, `Conflict` (the
        bridge has another subnet), `NotFound` (its parent is gone) or `CommandFailed`.
        """
        # What it makes belongs to the instance: an operation that is cancelled meanwhile lets it come to its end.
        await asyncio.shield(self._ensure(network))

    async def plug(self, network: Network, port: Port) -> None:
        """`ensure`, and the card's names, addresses, forwards, rates and filters hold from now on. Idempotent.

        What it says takes the place of what an earlier call said of the same card.
        """
        _check_port(port)
        before = self._ports.get(port.host_interface)
        self._ports[port.host_interface] = port
        try:
            await asyncio.shield(self._ensure(network))
        except BaseException:
            if before is None:
                self._ports.pop(port.host_interface, None)
            raise

    async def unplug(self, host_interface: str) -> None:
        """Nothing of a card is left, on the host's side. Absent is success."""
        port = self._ports.pop(host_interface, None)
        if rights().networks:
            await asyncio.to_thread(_delete_links, re.escape(host_interface))
        for server in self._servers.values():
            server.withdraw(host_interface)
        if port is None:
            return
        segment = self._segments.get(port.network)
        listed = any(segment.network.acl for segment in self._segments.values())
        if port.forwards or listed or segment is None:
            async with self._lock:
                await asyncio.to_thread(self._apply)
        else:
            # Nobody can have its addresses before the next `plug`, which writes the rules anew.
            self._stale.set()

    async def refresh(self, ports: Iterable[Port]) -> None:
        """Cards that are plugged in have other names, labels, forwards or rates now."""
        changed = {port.host_interface: port for port in ports if port.host_interface in self._ports}
        for port in changed.values():
            _check_port(port)
        self._ports.update(changed)
        async with self._lock:
            for port in changed.values():
                self._publish(port)
            await asyncio.to_thread(self._apply)

    async def replace(self, network: Network) -> None:
        """A network that is in use has another access list, or services."""
        if network.name in self._segments:
            await self.ensure(network)

    async def remove(self, network: Network) -> None:
        """Nothing of a network is left on the host. Absent is success; nobody may be plugged in."""
        async with self._lock:
            self._segments.pop(network.name, None)
            await (self._servers.pop(network.index, None) or bridges.name_server(self._instance, network)).clear()
            if rights().networks:
                bridge = bridges.bridge_name(self._instance, network)
                if bridge:
                    await asyncio.to_thread(_delete_links, re.escape(bridge))
                await asyncio.to_thread(self._apply)

    async def restore(self, networks: Iterable[Network], ports: Iterable[Port]) -> None:
        """At a daemon's start: what should hold, from the records. One network that cannot be is no other's end."""
        self._ports = {port.host_interface: port for port in ports} | self._ports
        used = {port.network for port in self._ports.values()}
        for network in networks:
            server = bridges.name_server(self._instance, network)
            for key in server.keys() - self._ports.keys():
                server.withdraw(key)
            if network.name in used:
                try:
                    await self.ensure(network)
                except Error:
                    log.exception("cannot mend network '%s' of running machines", network.name)

    async def teardown(self) -> None:
        """Remove the name servers, the rules, every machine's host interface and the bridges. Absent is success."""
        async with self._lock:
            for server in self._servers.values():
                await server.clear()
            for path in Path(self._instance.run_dir).glob("network/n*"):
                await Dnsmasq(path, bridges.DOMAIN).clear()
            await bridges.name_server(self._instance, _TRIAL).clear()
            self._ports.clear()
            self._segments.clear()
            self._servers.clear()
            self._applied, self._allowed, self._seen = (), (), None
            if rights().networks:
                await asyncio.to_thread(self._remove)

    def _remove(self) -> None:
        for family in ("inet", "bridge"):
            nft.delete_table(self._table, family)
        iptables.remove(self._table)
        bridge = re.escape(self._instance.bridge)
        _delete_links(rf"{bridge}m[0-9]+[a-g]?")
        _delete_links(rf"{bridge}(p|n[0-9]+)?")

    async def _ensure(self, network: Network) -> None:
        async with self._lock:
            segment = await asyncio.to_thread(self._ensure_segment, network)
            self._segments[network.name] = segment
            await asyncio.to_thread(self._apply)
            await self._serve(segment)

    def _ensure_segment(self, network: Network) -> Segment:
        if network.kind is NetworkKind.MACVLAN:
            self.check_parent(network, force=True)
            return self._segment(network)
        self.probe()
        with Netlink() as netlink:
            segment = self._segment(network, routed6=IPv6Network("::/0") in netlink.routes6())
            bridges.ensure_bridge(netlink, self._instance, segment)
        if network.kind is NetworkKind.NAT:
            bridges.ensure_forwarding(segment)
        return segment

    async def _serve(self, segment: Segment) -> None:
        network = segment.network
        if not network.served:
            return
        server = self._servers.setdefault(network.index, bridges.name_server(self._instance, network))
        for name in self._plugged(network.name):
            # A new dnsmasq directory knows nobody; else only what is new is written.
            if self._published.get(name) != self._ports[name] or not server.knows(name):
                self._publish(self._ports[name])
        wanted = bridges.serving(segment)
        if wanted is None:
            await server.stop()
        else:
            await server.ensure(wanted)

    def _publish(self, port: Port) -> None:
        segment = self._segments.get(port.network)
        server = self._servers.get(segment.network.index) if segment is not None else None
        if server is not None:
            server.publish(port.host_interface, _record(port))
            self._published[port.host_interface] = port

    def _tables(self, segments: Iterable[Segment], ports: Iterable[Port]) -> tuple[Table, ...]:
        ordered = sorted(segments, key=lambda segment: segment.network.index)
        plugged = sorted(ports, key=lambda port: port.host_interface)
        return (
            Table("inet", self._table, routed_chains(ordered, plugged)),
            Table("bridge", self._table, port_chains(self._instance, ordered, plugged)),
        )

    def _apply(self) -> None:
        """Make the firewall what it should be; nothing is run where it is (blocking)."""
        segments = [segment for segment in self._segments.values() if bridged(segment)]
        if not segments and not self._applied:
            return
        self._stale.clear()
        tables = self._tables(segments, self._ports.values())
        for port in self._ports.values():
            if wants_loopback(port) and port.network in self._segments:
                bridges.ensure_loopback_route(self._segments[port.network])
        if not all(nft.table_exists(table.family, table.name) for table in tables):
            self._applied = ()
        if tables != self._applied:
            self._write(segments, tables)
        names = tuple(sorted(segment.bridge for segment in segments if segment.network.served))
        if names != self._allowed:
            iptables.allow(self._table, [rule for name in names for rule in _accepts(name)])
            self._allowed = names

    def _write(self, segments: list[Segment], tables: tuple[Table, ...]) -> None:
        """Where nothing but elements of sets differs, only those are changed, which takes no process."""
        keys = spoof_keys(segments, tuple(self._ports.values()))
        rules = [without_elements(table.text) for table in tables]
        if rules == [without_elements(table.text) for table in self._applied]:
            added = {name: keys[name] - self._keys[name] for name in keys}
            removed = {name: self._keys[name] - keys[name] for name in keys}
            try:
                change_elements("bridge", self._table, added, removed)
            except Error:
                # Somebody else changed them: all is written anew.
                self._applied = ()
        if not self._applied or rules != [without_elements(table.text) for table in self._applied]:
            nft.replace_tables(*tables)
            self._seen = None
            self._stale.set()
        self._applied, self._keys = tables, keys

    # -- watching

    def start_watch(self) -> None:
        """From now on what others undo is mended within seconds, while machines are plugged in."""
        if self._watcher is None:
            self._watcher = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """Stop watching; everything stays as it is."""
        if self._watcher is not None:
            self._watcher.cancel()
            with suppress(asyncio.CancelledError):
                await self._watcher
            self._watcher = None

    async def _watch(self) -> None:
        while True:
            # Not wait_for: before Python 3.12 it loses a cancellation that comes as the event does.
            with suppress(TimeoutError):
                async with asyncio.timeout(WATCH_SECONDS):
                    await self._stale.wait()
            self._stale.clear()
            try:
                await self.mend()
            except Error:
                log.exception("cannot mend the network of running machines")
            # Changes come in bursts.
            await asyncio.sleep(WATCH_SECONDS / 10)

    async def mend(self) -> bool:
        """Look after everything that running machines need, and put back what is gone; whether anything was."""
        used = {port.network for port in self._ports.values()}
        if not used and not self._segments:
            return False
        async with self._lock:
            await asyncio.to_thread(self._apply)
            lost = await asyncio.to_thread(self._lost, used)
            if "rules" in lost:
                self._applied = ()
        for name in used & self._segments.keys():
            segment = self._segments[name]
            server, wanted = self._servers.get(segment.network.index), bridges.serving(segment)
            if server is not None and wanted is not None and server.running(wanted) is None:
                lost.append(f"dnsmasq of network '{name}'")
        if not lost:
            return False
        log.warning("mending the network: %s was gone or changed", ", ".join(lost))
        for name in used & self._segments.keys():
            await self.ensure(self._segments[name].network)
            await asyncio.to_thread(self._plug_again, self._segments[name])
        return True

    def _lost(self, used: Iterable[str]) -> list[str]:
        """What is not as it was left (blocking)."""
        lost: list[str] = []
        with Netlink() as netlink:
            for name in used:
                if (segment := self._segments.get(name)) is not None:
                    lost += bridges.missing(netlink, segment, self._plugged(name))
        if not self._applied:
            return lost
        names = [(table.family, table.name) for table in self._applied]
        generation = nft.generation()
        if self._seen is None:
            self._seen = (generation, nft.listing(*names))
        elif generation != self._seen[0]:
            listed = nft.listing(*names)
            if listed != self._seen[1]:
                lost.append("rules")
            self._seen = (generation, listed)
        if self._seen is not None and self._seen[1] is None and "rules" not in lost:
            lost.append("rules")
        return lost

    def _plugged(self, network: str) -> tuple[str, ...]:
        return tuple(port.host_interface for port in self._ports.values() if port.network == network)

    def _plug_again(self, segment: Segment) -> None:
        """A bridge that was removed and made again has lost its ports (blocking)."""
        with Netlink() as netlink:
            bridge = netlink.index_of(segment.bridge) if segment.bridge else None
            if bridge is None:
                return
            for name in bridges.missing(netlink, segment, self._plugged(segment.network.name)):
                index = netlink.index_of(name)
                if index is not None and index != bridge:
                    netlink.add_to_bridge(index, bridge)


_TRIAL = Network(
    name="nat", index=0, kind=NetworkKind.NAT, ipv4=str(_ANY_SUBNET), created_at=datetime.fromtimestamp(0, UTC)
)


def _record(port: Port) -> Record:
    return Record(
        names=port.names,
        mac=port.nic.mac,
        address=IPv4Interface(port.nic.address).ip if port.nic.address else None,
        address6=IPv6Interface(port.nic.address6).ip if port.nic.address6 else None,
    )


def _check_port(port: Port) -> None:
    """Every word that reaches a rule, a file or a line of another program. Raises `Invalid`."""
    for name in (port.machine, *port.names):
        check_machine_name(name)
    if not _INTERFACE.match(port.host_interface):
        raise Invalid(f"illegal interface name {port.host_interface!r}")
    if not _MAC.match(port.nic.mac):
        raise Invalid(f"illegal hardware address {port.nic.mac!r} of machine '{port.machine}'")
    try:
        _record(port)
        for forward in port.forwards:
            IPv4Address(forward.host_address)
    except ValueError as error:
        raise Invalid(f"illegal address of machine '{port.machine}': {error}") from error


def _accepts(bridge: str) -> tuple[tuple[str, ...], ...]:
    """Where a host's own iptables filter drops, this much of ours must be let through."""
    return (
        ("FORWARD", "-i", bridge),
        ("FORWARD", "-o", bridge, "-m", "conntrack", "--ctstate", "RELATED,ESTABLISHED,DNAT"),
        ("INPUT", "-i", bridge, "-p", "udp", "-m", "multiport", "--dports", "53,67"),
        ("INPUT", "-i", bridge, "-p", "tcp", "--dport", "53"),
    )


def _delete_links(pattern: str) -> None:
    with Netlink() as netlink:
        for link in netlink.links():
            if re.fullmatch(pattern, link.name):
                bridges.delete_link(netlink, link.index)
