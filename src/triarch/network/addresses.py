"""Which addresses an instance, its networks and its machines have. Pure, but for what the caller says of the host."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from itertools import chain

from triarch.errors import Exhausted, Invalid
from triarch.model.instance import DEFAULT_TAG, MAX_MACHINES

PREFIX_LENGTH = 18  # 16,382 hosts: twice the machines that an instance takes
PREFIX_LENGTH_6 = 64
MAX_CARDS = 8
_DEFAULT_SUBNET = IPv4Network("10.77.0.0/18")
_FIRST, _LAST = IPv4Network("10.80.0.0/18"), IPv4Network("10.191.192.0/18")
_SPARE = IPv4Network("172.16.0.0/12")
_SIZE = _FIRST.num_addresses
_SLOTS = (int(_LAST.network_address) - int(_FIRST.network_address)) // _SIZE + 1
# A VPN that takes everything routes 0.0.0.0/1 and 128.0.0.0/1: as little a claim to each address as a default route.
_SHORTEST_CLAIM = 8
_SHORTEST_CLAIM_6 = 16
_CARD_SHIFT = 13
assert MAX_MACHINES < 1 << _CARD_SHIFT


# -- networks


def choose(tag: str, taken: Iterable[IPv4Network]) -> IPv4Network:
    """A subnet for instance `tag` that overlaps none of `taken`: the same one each time, while that is free.

    Raises `Exhausted`.
    """
    claims = [network for network in taken if network.prefixlen >= _SHORTEST_CLAIM]
    for subnet in _candidates(tag):
        if not any(subnet.overlaps(claim) for claim in claims):
            return subnet
    raise Exhausted(
        f"no free address range: the host's routes cover all of 10.77.0.0/18, {_FIRST.network_address} to "
        f"{_LAST.broadcast_address} and {_SPARE}",
        hint="ip route",
    )


def choose6(tag: str, index: int, taken: Iterable[IPv6Network]) -> IPv6Network:
    """A /64 of the instance's own unique local range (RFC 4193) for its network `index`. Raises `Exhausted`.

    Where the host has that one already, the next free one.
    """
    claims = [network for network in taken if network.prefixlen >= _SHORTEST_CLAIM_6]
    base = (0xFD << 120) | int.from_bytes(_hash(tag)[:5], "big") << 80
    for step in range(1 << 10):
        subnet = IPv6Network((base | ((index + (step << 6)) & 0xFFFF) << 64, PREFIX_LENGTH_6))
        if not any(subnet.overlaps(claim) for claim in claims):
            return subnet
    raise Exhausted("no free IPv6 range: the host's routes cover all that this instance would take", hint="ip -6 route")


def _candidates(tag: str) -> Iterator[IPv4Network]:
    if tag == DEFAULT_TAG:
        yield _DEFAULT_SUBNET
    start = int.from_bytes(_hash(tag)[:4], "big") % _SLOTS
    base = int(_FIRST.network_address)
    slots = (IPv4Network((base + (start + step) % _SLOTS * _SIZE, PREFIX_LENGTH)) for step in range(_SLOTS))
    yield from chain(slots, _SPARE.subnets(new_prefix=PREFIX_LENGTH))


def gateway(subnet: IPv4Network) -> IPv4Interface:
    """The bridge's own address: the first of the subnet."""
    return IPv4Interface((int(subnet.network_address) + 1, subnet.prefixlen))


def gateway6(subnet: IPv6Network) -> IPv6Interface:
    """The same in IPv6."""
    return IPv6Interface((int(subnet.network_address) + 1, subnet.prefixlen))


# -- machines


def pick(subnet: IPv4Network, index: int, taken: Collection[IPv4Address], reserved: Collection[IPv4Address]) -> str:
    """A free address for machine `index` (from 1), in CIDR form: its own slot while nobody took it, else any.

    The first address, the last and those in `reserved` are nobody's. Raises `Exhausted`.
    """
    if index < 1:
        raise Invalid(f"illegal machine index {index}: the first is 1")
    first, end = int(subnet.network_address) + 2, int(subnet.broadcast_address)
    for number in chain((first + index - 1,), range(min(first + MAX_MACHINES, end), end), range(first, end)):
        address = IPv4Address(number)
        if first <= number < end and address not in taken and address not in reserved:
            return f"{address}/{subnet.prefixlen}"
    raise Exhausted(
        f"no address left for machine {index}: {subnet} has {max(0, subnet.num_addresses - 3)} for machines",
        index=index,
    )


def pick6(subnet: IPv6Network, index: int, taken: Collection[IPv6Address]) -> str:
    """The same in IPv6, where there is always room."""
    first = int(subnet.network_address) + 2
    for number in chain((first + index - 1,), range(first + MAX_MACHINES, first + 3 * MAX_MACHINES)):
        address = IPv6Address(number)
        if address in subnet and address not in taken:
            return f"{address}/{subnet.prefixlen}"
    raise Exhausted(f"no IPv6 address left for machine {index} in {subnet}", index=index)


def check_static(subnet: IPv4Network, text: str, who: str) -> IPv4Address:
    """The address that somebody asks for. Raises `Invalid` for one that no machine of `subnet` can have."""
    address = IPv4Address(text)
    if address not in subnet:
        raise Invalid(f"address {address} of {who} is outside its network {subnet}")
    if address in (subnet.network_address, subnet.broadcast_address):
        raise Invalid(f"address {address} of {who} is the network's own: {subnet} begins and ends with such")
    if address == gateway(subnet).ip:
        raise Invalid(f"address {address} of {who} is the gateway's")
    return address


def check_static6(subnet: IPv6Network, text: str, who: str) -> IPv6Address:
    """The same in IPv6. Raises `Invalid`, for what is no address at all too."""
    try:
        address = IPv6Address(text)
    except ValueError as error:
        raise Invalid(f"illegal IPv6 address '{text}' of {who}: it needs a form such as fd00::5") from error
    if address not in subnet or address.scope_id is not None:
        raise Invalid(f"address {address} of {who} is outside its network {subnet}")
    if address in (subnet.network_address, gateway6(subnet).ip):
        raise Invalid(f"address {address} of {who} is the network's or the gateway's")
    return address


def bridge_mac(tag: str, network_index: int = 0) -> str:
    """Of machine index 0, which there is not: the bridge of the built-in network, or that of another one."""
    return mac(tag, 0) if network_index == 0 else bytes((0x06, *_hash(tag)[:3], *_two(network_index))).hex(":")


def mac(tag: str, index: int, card: int = 0) -> str:
    """02: locally administered, unicast. Three bytes of the instance, two of the machine and its card (0 to 7)."""
    return bytes((0x02, *_hash(tag)[:3], *_two(index | card << _CARD_SHIFT))).hex(":")


def card_number(text: str) -> int:
    """Which of a machine's cards has the address `text`."""
    return int(text.replace(":", "")[-4:], 16) >> _CARD_SHIFT


def link_local(text: str) -> IPv6Address:
    """The address that a kernel makes of a MAC by itself (RFC 4291, appendix A)."""
    octets = bytes.fromhex(text.replace(":", ""))
    return IPv6Address(b"\xfe\x80" + bytes(6) + bytes((octets[0] ^ 2, *octets[1:3], 0xFF, 0xFE, *octets[3:])))


def _two(number: int) -> bytes:
    return number.to_bytes(2, "big")


def _hash(tag: str) -> bytes:
    return hashlib.sha256(tag.encode()).digest()
