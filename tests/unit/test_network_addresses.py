"""Addresses: deterministic, apart from the host's, and finite."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Network

import pytest

from triarch.errors import Exhausted, Invalid
from triarch.network.addresses import (
    PREFIX_LENGTH,
    bridge_mac,
    card_number,
    check_static,
    check_static6,
    choose,
    choose6,
    gateway,
    link_local,
    mac,
    pick,
    pick6,
)

SUBNET = IPv4Network("10.77.0.0/18")
TAGS = [f"{number * 7919:06x}" for number in range(200)]


def test_the_default_instance_prefers_its_own_range() -> None:
    assert choose("0", []) == SUBNET


@pytest.mark.parametrize("taken", ["10.77.5.0/24", "10.77.63.255/32", "10.64.0.0/12", "10.77.0.0/16"])
def test_a_range_that_the_host_uses_is_left_alone(taken: str) -> None:
    chosen = choose("0", [IPv4Network(taken)])
    assert not chosen.overlaps(IPv4Network(taken))
    assert chosen.prefixlen == PREFIX_LENGTH


def test_other_instances_spread_and_stay_where_they_are() -> None:
    chosen = {tag: choose(tag, []) for tag in TAGS}
    assert chosen == {tag: choose(tag, []) for tag in TAGS}
    assert len(set(chosen.values())) > len(TAGS) * 0.7
    for subnet in chosen.values():
        assert 80 <= subnet.network_address.packed[1] <= 191
        assert not subnet.overlaps(SUBNET)


def test_instances_that_hash_to_one_slot_do_not_share_it() -> None:
    first = choose("abcdef", [])
    assert choose("abcdef", [first]) != first


def test_default_routes_claim_nothing() -> None:
    everything = [IPv4Network("0.0.0.0/0"), IPv4Network("0.0.0.0/1"), IPv4Network("128.0.0.0/1")]
    assert choose("0", everything) == SUBNET


def test_a_host_that_routes_all_of_ten_still_gets_a_range() -> None:
    assert choose("0", [IPv4Network("10.0.0.0/8")]).subnet_of(IPv4Network("172.16.0.0/12"))


def test_no_range_left_is_said() -> None:
    with pytest.raises(Exhausted, match="no free address range"):
        choose("0", [IPv4Network("10.0.0.0/8"), IPv4Network("172.16.0.0/12")])


def test_gateway_is_the_first_address() -> None:
    assert gateway(SUBNET) == IPv4Interface("10.77.0.1/18")


def test_every_machine_has_an_address_and_mac_of_its_own() -> None:
    addresses = [pick(SUBNET, index, (), ()) for index in range(1, 8001)]
    macs = [mac("0", index, card) for index in range(1, 8001) for card in (0, 7)]
    assert addresses[0] == "10.77.0.2/18"
    assert len(set(addresses)) == 8000
    assert len(set(macs)) == 16_000
    assert all(IPv4Interface(address).network == SUBNET for address in addresses)
    assert all(int(text[:2], 16) & 3 == 2 for text in macs), "locally administered and unicast"
    assert bridge_mac("0") not in macs
    assert bridge_mac("0", 3) not in macs


def test_cards_are_told_by_their_mac() -> None:
    assert [card_number(mac("0", 8000, card)) for card in range(8)] == list(range(8))


def test_a_slot_that_somebody_took_is_left_to_him() -> None:
    taken = {IPv4Address("10.77.0.2")}
    found = pick(SUBNET, 1, taken, ())
    assert IPv4Interface(found).ip not in taken
    assert IPv4Interface(found).ip > IPv4Address("10.77.31.0"), "nor does it take the slot of another machine"


def test_a_small_subnet_is_used_to_its_end() -> None:
    subnet = IPv4Network("10.9.0.0/29")
    taken: set[IPv4Address] = set()
    for index in (900, 7, 8, 9, 10):
        taken.add(IPv4Interface(pick(subnet, index, taken, ())).ip)
    assert taken == {IPv4Address(f"10.9.0.{last}") for last in range(2, 7)}
    with pytest.raises(Exhausted, match=r"no address left for machine 11: 10\.9\.0\.0/29 has 5 for machines"):
        pick(subnet, 11, taken, ())
    with pytest.raises(Invalid):
        pick(subnet, 0, (), ())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("10.78.0.5", "outside its network"),
        ("10.77.0.0", "the network's own"),
        ("10.77.63.255", "the network's own"),
        ("10.77.0.1", "the gateway's"),
    ],
)
def test_an_address_that_cannot_be_is_refused(text: str, reason: str) -> None:
    with pytest.raises(Invalid, match=reason):
        check_static(SUBNET, text, "machine 'web'")


@pytest.mark.parametrize("text", ["fd00::5", "fd01::", "fd01::1", "::ffff:1.2.3.4", ":::", "1", "fd01::5%eth0"])
def test_an_ipv6_address_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(Invalid, match="machine 'web'"):
        check_static6(IPv6Network("fd01::/64"), text, "machine 'web'")


def test_ipv6_ranges_are_local_and_apart() -> None:
    found = [choose6("0", index, ()) for index in range(50)]
    assert len(set(found)) == 50
    assert all(subnet.subnet_of(IPv6Network("fd00::/8")) and subnet.prefixlen == 64 for subnet in found)
    assert choose6("0", 0, [found[0], IPv6Network("::/0")]) not in found
    assert choose6("1", 0, ()) not in found
    assert pick6(found[0], 1, ()) == f"{found[0].network_address + 2}/64"
    assert pick6(found[0], 1, {found[0].network_address + 2}) != pick6(found[0], 1, ())


def test_a_kernels_own_address_follows_from_the_mac() -> None:
    assert link_local("02:f6:b9:f1:00:02") == IPv6Address("fe80::f6:b9ff:fef1:2")


def test_macs_of_two_instances_differ() -> None:
    assert len({mac(tag, 1) for tag in TAGS}) == len(TAGS)
