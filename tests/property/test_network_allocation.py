"""Addresses and MACs: whatever comes and goes, no two cards ever share one, and none has the host's."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network

from hypothesis import given
from hypothesis import strategies as st

from triarch.errors import Exhausted, Invalid
from triarch.network.addresses import card_number, check_static, gateway, mac, pick, pick6

SUBNET6 = IPv6Network("fd00:1:2:3::/64")
# A change: machine index, whether it comes (or goes), and the address that it insists on, as an offset.
CHANGES = st.lists(st.tuples(st.integers(1, 40), st.booleans(), st.none() | st.integers(0, 40)), max_size=60)


@given(prefix=st.integers(26, 29), changes=CHANGES)
def test_no_two_machines_share_an_address(prefix: int, changes: list[tuple[int, bool, int | None]]) -> None:
    subnet = IPv4Network(f"10.9.0.0/{prefix}")
    reserved = {IPv4Address("10.9.0.3")}
    held: dict[int, IPv4Address] = {}
    for index, comes, offset in changes:
        held.pop(index, None)
        if not comes:
            continue
        try:
            if offset is None:
                address = IPv4Interface(pick(subnet, index, set(held.values()), reserved)).ip
            else:
                address = check_static(subnet, str(subnet.network_address + offset), "machine 'x'")
                if address in held.values() or address in reserved:
                    continue
        except Invalid:
            continue
        except Exhausted:
            assert len({*held.values(), *reserved}) == subnet.num_addresses - 3
            continue
        assert address not in held.values()
        held[index] = address
        assert address in subnet
        assert address not in (subnet.network_address, subnet.broadcast_address, gateway(subnet).ip, *reserved)


@given(st.lists(st.integers(1, 8175), max_size=60))
def test_no_two_cards_share_an_ipv6_address(indexes: list[int]) -> None:
    taken: set[IPv6Address] = set()
    for index in indexes:
        address = IPv6Interface(pick6(SUBNET6, index, taken)).ip
        assert address not in taken
        taken.add(address)


@given(st.tuples(st.integers(1, 8175), st.integers(0, 7)), st.tuples(st.integers(1, 8175), st.integers(0, 7)))
def test_a_mac_belongs_to_one_card(one: tuple[int, int], other: tuple[int, int]) -> None:
    assert (mac("0", *one) == mac("0", *other)) == (one == other)
    assert card_number(mac("0", *one)) == one[1]
