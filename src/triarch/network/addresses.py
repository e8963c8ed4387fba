"""Which addresses an instance and its machines have. Pure, but for what the caller says of the host."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from itertools import chain

from triarch.errors import Exhausted, Invalid
from triarch.model.instance import DEFAULT_TAG
from triarch.model.network import Nic

PREFIX_LENGTH = 18  # 16,382 hosts: twice the machines that an instance takes
_DEFAULT_SUBNET = IPv4Network("10.77.0.0/18")
_FIRST, _LAST = IPv4Network("10.80.0.0/18"), IPv4Network("10.191.192.0/18")
_SPARE = IPv4Network("172.16.0.0/12")
_SIZE = _FIRST.num_addresses
_SLOTS = (int(_LAST.network_address) - int(_FIRST.network_address)) // _SIZE + 1
# A VPN that takes everything routes 0.0.0.0/1 and 128.0.0.0/1: as little a claim to each address as a default route.
_SHORTEST_CLAIM = 8


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


def machine_nic(tag: str, subnet: IPv4Network, index: int) -> Nic:
    """Address and MAC of machine `index` (from 1): the same for as long as the machine has its index.

    Raises `Exhausted` where the subnet has no such address.
    """
    if index < 1:
        raise Invalid(f"illegal machine index {index}: the first is 1")
    address = int(subnet.network_address) + 1 + index
    if address >= int(subnet.broadcast_address):
        raise Exhausted(
            f"no address left for machine {index}: {subnet} has {subnet.num_addresses - 3} for machines", index=index
        )
    return Nic(mac=_mac(tag, index), address=f"{IPv4Address(address)}/{subnet.prefixlen}")


def bridge_mac(tag: str) -> str:
    """Index 0: no machine has it."""
    return _mac(tag, 0)


def _mac(tag: str, index: int) -> str:
    """02: locally administered, unicast. Three bytes of the instance, two of the machine."""
    return bytes((0x02, *_hash(tag)[:3], *index.to_bytes(2, "big"))).hex(":")


def _hash(tag: str) -> bytes:
    return hashlib.sha256(tag.encode()).digest()
