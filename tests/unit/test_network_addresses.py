"""Addresses: deterministic, apart from the host's, and finite."""

from __future__ import annotations

from ipaddress import IPv4Interface, IPv4Network

import pytest

from triarch.errors import Exhausted, Invalid
from triarch.network.addresses import PREFIX_LENGTH, bridge_mac, choose, gateway, machine_nic

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
    nics = [machine_nic("0", SUBNET, index) for index in range(1, 8001)]
    assert nics[0].address == "10.77.0.2/18"
    assert len({nic.ip for nic in nics}) == len({nic.mac for nic in nics}) == 8000
    for nic in nics:
        assert IPv4Interface(nic.address).network == SUBNET
        assert int(nic.mac[:2], 16) & 3 == 2, "locally administered and unicast"
    assert bridge_mac("0") not in {nic.mac for nic in nics}


def test_the_last_address_is_the_last() -> None:
    last = SUBNET.num_addresses - 3
    assert machine_nic("0", SUBNET, last).ip == "10.77.63.254"
    with pytest.raises(Exhausted, match="no address left for machine 16382"):
        machine_nic("0", SUBNET, last + 1)
    with pytest.raises(Invalid):
        machine_nic("0", SUBNET, 0)


def test_macs_of_two_instances_differ() -> None:
    assert len({machine_nic(tag, SUBNET, 1).mac for tag in TAGS}) == len(TAGS)
