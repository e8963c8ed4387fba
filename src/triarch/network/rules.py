"""The firewall of an instance as nft(8) reads it: pure functions of the plan, the only place where rules are written.

Two tables. `inet triarch_TAG` has what is routed: which networks reach what, NAT, port forwards. `bridge triarch_TAG`
has what passes through a machine's own port, whoever is at the other end: that it sends under its own addresses only,
rates, access lists. The latter needs no connection tracking, which not every kernel has for bridges: a TCP segment that
opens no connection passes, as do answers to UDP that was let through within three minutes, and answers and errors of
ICMP.

Nothing that a person chose is written here but addresses, numbers and interface names, which all have narrow patterns.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Interface

import msgspec

from triarch.host.nft_sets import key
from triarch.model.instance import Instance
from triarch.model.network import AclRule, Direction, Forward, NetworkKind, Nic, Protocol
from triarch.network.addresses import gateway, gateway6, link_local
from triarch.network.plan import ANY_ADDRESS, Port, Segment, bridged, peers, selected

# What comes at once even at a low rate: several segments of 64 KiB, which a real card would cut up. The kernel's bucket
# holds one second's worth beside the burst (nft_limit.c).
_BUCKET_BYTES = 256 << 10
_LEAST_BURST_BYTES = 64 << 10
_SPOOF_KINDS = {
    "macs": "type ifname . ether_addr",
    "addresses4": "type ifname . ipv4_addr",
    "addresses6": "type ifname . ipv6_addr",
    "targets6": "typeof iifname . @th,64,128",
    "unchecked": "type ifname",
}
_CACHED_CARDS = 16_384
_ROUTED_INPUT = "{ 53, 67, 547 }"


def table_name(instance: Instance) -> str:
    return f"triarch_{instance.tag}"


def machine_interfaces(instance: Instance) -> str:
    """The pattern of every machine's host interface."""
    return f'"{instance.bridge}m*"'


# -- what is routed


def routed_chains(segments: Sequence[Segment], ports: Sequence[Port]) -> str:
    """The body of `inet triarch_TAG`.

    Machines reach one another, and out under the host's address; they send from the subnet's addresses only. From
    outside, other instances and networks included, come only answers and what is forwarded to them; nor is a bridge's
    own address, with its name server, to be reached from there. The first rules are for hosts that pass bridged packets
    through here (br_netfilter).
    """
    own = [segment for segment in segments if bridged(segment)]
    return "".join(
        (
            _chain("forward", "filter hook forward priority filter", _forward_rules(own)),
            _chain("input", "filter hook input priority filter", (r for s in own for r in _input_rules(s))),
            _chain("guard", "filter hook prerouting priority raw", (_guard(s) for s in own)),
            _chain("prerouting", "nat hook prerouting priority dstnat", _forwards(ports, local=False)),
            _chain("output", "nat hook output priority -100", _forwards(ports, local=True)),
            _chain("postrouting", "nat hook postrouting priority srcnat", (r for s in own for r in _masquerade(s))),
        )
    )


def _chain(name: str, hook: str, rules: Iterable[str]) -> str:
    head = f"        type {hook}; policy accept;\n" if hook else ""
    return f"    chain {name} {{\n{head}" + "".join(f"        {rule}\n" for rule in rules) + "    }\n"


def _forward_rules(segments: Sequence[Segment]) -> list[str]:
    """Who must not get out comes before who may be let in, and that before who may go anywhere: no network is another
    one's way in."""
    return [
        *(f'iifname "{segment.bridge}" oifname "{segment.bridge}" accept' for segment in segments),
        *(rule for segment in segments if segment.network.kind is not NetworkKind.NAT for rule in _confined(segment)),
        *(rule for segment in segments for rule in _closed(segment)),
        *(rule for segment in segments if segment.network.kind is NetworkKind.NAT for rule in _outbound(segment)),
    ]


def _confined(segment: Segment) -> list[str]:
    return [f'iifname "{segment.bridge}" ct state established,related accept', f'iifname "{segment.bridge}" drop']


def _closed(segment: Segment) -> list[str]:
    out = f'oifname "{segment.bridge}"'
    return [f"{out} ct state established,related accept", f"{out} ct status dnat accept", f"{out} drop"]


def _outbound(segment: Segment) -> list[str]:
    ranges = [f"ip saddr {segment.ipv4}"] if segment.ipv4 else []
    ranges += [f"ip6 saddr {segment.ipv6}"] if segment.ipv6 else []
    return [*(f'iifname "{segment.bridge}" {own} accept' for own in ranges), f'iifname "{segment.bridge}" drop']


def _guard(segment: Segment) -> str:
    """`route_localnet` is on for a bridge with forwards from the host itself: no machine must come in by it. Answers to
    the host have the bridge's address here, before they are translated back."""
    return f'iifname "{segment.bridge}" ip daddr 127.0.0.0/8 drop'


def _input_rules(segment: Segment) -> list[str]:
    bridge = segment.bridge
    if not segment.network.served:
        return []
    rules = []
    if segment.ipv4:
        rules.append(f'ip daddr {gateway(segment.ipv4).ip} iifname != {{ "{bridge}", "lo" }} drop')
    if segment.ipv6:
        rules.append(f'ip6 daddr {gateway6(segment.ipv6).ip} iifname != {{ "{bridge}", "lo" }} drop')
    if segment.network.kind is NetworkKind.ISOLATED:
        rules += [
            f'iifname "{bridge}" ct state established,related accept',
            f'iifname "{bridge}" meta l4proto {{ icmp, ipv6-icmp }} accept',
            f'iifname "{bridge}" udp dport {_ROUTED_INPUT} accept',
            f'iifname "{bridge}" tcp dport 53 accept',
            f'iifname "{bridge}" drop',
        ]
    return rules


def _masquerade(segment: Segment) -> list[str]:
    """What leaves a network gets the host's address; so does what is forwarded into it and could not find back."""
    bridge, rules = segment.bridge, []
    if segment.network.kind is NetworkKind.NAT:
        if segment.ipv4:
            rules.append(f'ip saddr {segment.ipv4} oifname != "{bridge}" masquerade')
            rules.append(f'ip saddr {{ 127.0.0.0/8, {segment.ipv4} }} oifname "{bridge}" ct status dnat masquerade')
        if segment.ipv6 and segment.routed6:
            rules.append(f'ip6 saddr {segment.ipv6} oifname != "{bridge}" masquerade')
    else:
        # Its machines may have another way out than through this host, or none at all.
        rules.append(f'oifname "{bridge}" ct status dnat masquerade')
    return rules


def _forwards(ports: Sequence[Port], *, local: bool) -> list[str]:
    """`local`: as the host's own programs see them, those on its loopback address included."""
    return [rule for port in ports for forward in port.forwards for rule in _forward(port, forward, local)]


def _forward(port: Port, forward: Forward, local: bool) -> list[str]:
    if not port.nic.ip or (not local and forward.host_address.startswith("127.")):
        return []
    where = "fib daddr type local" if forward.host_address == ANY_ADDRESS else f"ip daddr {forward.host_address}"
    to = f"dnat ip to {port.nic.ip}:{forward.machine_port}"
    return [f"{where} {forward.protocol.value} dport {forward.host_port} {to}"]


def wants_loopback(port: Port) -> bool:
    """Whether the host reaches it through its own loopback address."""
    return any(f.host_address == ANY_ADDRESS or f.host_address.startswith("127.") for f in port.forwards)


# -- what passes through a machine's port


def port_chains(instance: Instance, segments: Sequence[Segment], ports: Sequence[Port]) -> str:
    """The body of `bridge triarch_TAG`."""
    own = {segment.network.name: segment for segment in segments if bridged(segment)}
    plugged = tuple(port for port in ports if port.network in own)
    listed = [segment for segment in own.values() if segment.network.acl]
    every = machine_interfaces(instance)
    sent = [f"iifname {every} jump spoofed", *(r for p in plugged for r in _limit(p, p.send_bytes_per_second, "iif"))]
    received = [r for p in plugged for r in _limit(p, p.receive_bytes_per_second, "oif")]
    for segment in listed:
        names = _names(port for port in plugged if port.network == segment.network.name)
        if names:
            sent.append(f"iifname {names} goto egress{segment.network.index}")
            received.append(f"oifname {names} goto ingress{segment.network.index}")
    chains = [
        _spoof_sets(plugged),
        _flow_sets() if listed else "",
        _chain("spoofed", "", _spoof_rules()),
        *(_access(segment, direction, plugged) for segment in listed for direction in Direction),
        _chain("remember", "", _remember()) if listed else "",
        _chain("sent", "filter hook prerouting priority -300", sent),
        _chain("received", "filter hook postrouting priority 300", received),
    ]
    return "".join(chains)


def _limit(port: Port, rate: int | None, side: str) -> list[str]:
    if rate is None:
        return []
    burst = max(_BUCKET_BYTES - rate, _LEAST_BURST_BYTES)
    return [f'{side}name "{port.host_interface}" limit rate over {rate} bytes/second burst {burst} bytes drop']


def _names(ports: Iterable[Port]) -> str:
    names = sorted(f'"{port.host_interface}"' for port in ports)
    return f"{{ {', '.join(names)} }}" if names else ""


class _Element(msgspec.Struct, frozen=True):
    """One member of a spoof filter's set, as it is written and as the kernel has it."""

    set_name: str
    text: str
    key: bytes


@lru_cache(_CACHED_CARDS)
def _elements(host_interface: str, nic: Nic) -> tuple[_Element, ...]:
    """What a card may send as. One whose address comes from elsewhere is held to its MAC alone.

    Kept, because all cards are looked at whenever one comes or goes.
    """
    name = f'"{host_interface}"'
    macs = _Element("macs", f"{name} . {nic.mac}", key(host_interface, bytes.fromhex(nic.mac.replace(":", ""))))
    if not nic.address:
        return (macs, _Element("unchecked", name, key(host_interface)))
    found = [macs, _Element("addresses4", f"{name} . {nic.ip}", key(host_interface, IPv4Address(nic.ip).packed))]
    own6 = [link_local(nic.mac), *([IPv6Interface(nic.address6).ip] if nic.address6 else [])]
    for address in own6:
        packed = key(host_interface, address.packed)
        found.append(_Element("addresses6", f"{name} . {address}", packed))
        found.append(_Element("targets6", f"{name} . 0x{address.packed.hex()}", packed))
    return tuple(found)


def _spoof_sets(ports: Sequence[Port]) -> str:
    """Whose addresses are whose."""
    held: dict[str, list[str]] = {name: [] for name in _SPOOF_KINDS}
    for port in ports:
        for element in _elements(port.host_interface, port.nic):
            held[element.set_name].append(element.text)
    return "".join(_set(name, kind, held[name]) for name, kind in _SPOOF_KINDS.items())


def spoof_keys(segments: Sequence[Segment], ports: Sequence[Port]) -> dict[str, set[bytes]]:
    """The elements of the same sets, as the kernel has them."""
    found: dict[str, set[bytes]] = {name: set() for name in _SPOOF_KINDS}
    own = {segment.network.name for segment in segments if bridged(segment)}
    for port in ports:
        if port.network in own:
            for element in _elements(port.host_interface, port.nic):
                found[element.set_name].add(element.key)
    return found


def without_elements(text: str) -> str:
    """Rules alone: two texts that are the same without elements differ by nothing but what is in the sets."""
    return re.sub(r"(?m)^ +elements = .*\n", "", text)


def _set(name: str, kind: str, elements: Sequence[str]) -> str:
    held = f"        elements = {{ {', '.join(elements)} }}\n" if elements else ""
    return f"    set {name} {{\n        {kind}\n{held}    }}\n"


def _spoof_rules() -> list[str]:
    """A machine sends IP and ARP under its own addresses, and is no router. `@th,64,128` is what a neighbour
    advertisement is about (RFC 4861, 4.4)."""
    return [
        "iifname . ether saddr != @macs drop",
        "ether type != { arp, ip, ip6 } drop",
        "ether type arp iifname . arp saddr ether != @macs drop",
        "icmpv6 type { nd-router-advert, nd-redirect } drop",
        "udp sport { 67, 547 } drop",
        "iifname @unchecked return",
        "arp saddr ip 0.0.0.0 return",
        "ether type arp iifname . arp saddr ip != @addresses4 drop",
        "ip saddr 0.0.0.0 udp sport 68 udp dport 67 return",
        "ether type ip iifname . ip saddr != @addresses4 drop",
        "icmpv6 type nd-neighbor-advert iifname . @th,64,128 != @targets6 drop",
        "ip6 saddr :: meta l4proto ipv6-icmp return",
        "ether type ip6 iifname . ip6 saddr != @addresses6 drop",
    ]


# -- access lists


def _flow_sets() -> str:
    def flows(version: int) -> str:
        address = f"ipv{version}_addr"
        kind = f"type {address} . {address} . inet_service . inet_service"
        limits = "size 65535; flags dynamic,timeout; timeout 3m;"
        return f"    set flows{version} {{\n        {kind}\n        {limits}\n    }}\n"

    return flows(4) + flows(6)


def _remember() -> list[str]:
    """What was let through may be answered."""
    return [
        "update @flows4 { ip saddr . ip daddr . udp sport . udp dport } accept",
        "update @flows6 { ip6 saddr . ip6 daddr . udp sport . udp dport } accept",
        "accept",
    ]


def _access(segment: Segment, direction: Direction, ports: tuple[Port, ...]) -> str:
    """One direction of a network's list. What a network needs to work (ARP, neighbours, its DHCP and DNS) passes."""
    network = segment.network
    members = tuple(port for port in ports if port.network == network.name)
    rules = [
        "ether type arp accept",
        "icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit, nd-router-advert } accept",
        "icmpv6 type { echo-reply, destination-unreachable, packet-too-big, time-exceeded, 130, 131, 132, 143 } accept",
        "icmp type { echo-reply, destination-unreachable, time-exceeded, parameter-problem } accept",
        # A fragment without its first one is worth nothing; that one has the ports.
        "ip frag-off & 0x1fff != 0 accept",
        "tcp flags & (syn | ack) != syn accept",
        "ip daddr . ip saddr . udp dport . udp sport @flows4 accept",
        "ip6 daddr . ip6 saddr . udp dport . udp sport @flows6 accept",
        *_services(segment, direction),
    ]
    rules += [text for rule in network.acl if rule.direction is direction for text in _acl(rule, members, ports)]
    return _chain(f"{direction.value}{network.index}", "", [*rules, "goto remember"])


def _services(segment: Segment, direction: Direction) -> list[str]:
    if not segment.network.served:
        return []
    side, port = ("saddr", "sport") if direction is Direction.INGRESS else ("daddr", "dport")
    rules = [
        "udp sport 68 udp dport 67 accept" if direction is Direction.EGRESS else "udp sport 67 udp dport 68 accept"
    ]
    own = [("ip", gateway(segment.ipv4).ip)] if segment.ipv4 else []
    own6 = [("ip6", gateway6(segment.ipv6).ip)] if segment.ipv6 else []
    for family, address in (*own, *own6):
        rules.append(f"{family} {side} {address} meta l4proto {{ tcp, udp }} th {port} 53 accept")
    return rules


def _acl(rule: AclRule, members: tuple[Port, ...], ports: tuple[Port, ...]) -> list[str]:
    """As many nft rules as there are families of peers; none where nobody is meant."""
    ingress = rule.direction is Direction.INGRESS
    who = ""
    if rule.machine is not None or rule.label is not None:
        who = _names(selected(rule, members))
        if not who:
            return []
        who = f"{'oifname' if ingress else 'iifname'} {who} "
    what = _traffic(rule)
    verdict = "goto remember" if rule.allow else "drop"
    side = "saddr" if ingress else "daddr"
    return [f"{who}{peer}{what}{verdict}" for peer in _peer_matches(rule, ports, side)]


def _peer_matches(rule: AclRule, ports: tuple[Port, ...], side: str) -> list[str]:
    if rule.peer is None:
        return [""]
    named = peers(rule, ports)
    if named is None:
        return [f"{'ip6' if ':' in rule.peer else 'ip'} {side} {rule.peer} "]
    v4 = sorted({port.nic.ip for port in named if port.nic.ip})
    v6 = sorted({port.nic.ip6 for port in named if port.nic.ip6})
    matches = [f"ip {side} {{ {', '.join(v4)} }} "] if v4 else []
    return [*matches, f"ip6 {side} {{ {', '.join(v6)} }} "] if v6 else matches


def _traffic(rule: AclRule) -> str:
    ports = f"{{ {', '.join(str(port) for port in sorted(set(rule.ports)))} }} " if rule.ports else ""
    if rule.protocol is Protocol.ICMP:
        return "meta l4proto { icmp, ipv6-icmp } "
    if rule.protocol is None:
        return f"meta l4proto {{ tcp, udp }} th dport {ports}" if ports else ""
    return f"{rule.protocol.value} dport {ports}" if ports else f"meta l4proto {rule.protocol.value} "
