"""What a process may do follows from its capabilities and its user namespace, not from its user id."""

from __future__ import annotations

import os

import pytest

from triarch.host.rights import Capability, Rights, mapped_ids, rights

ALL = (1 << 41) - 1
HOST_IDS = 2**32 - 1
ROOT = Rights(user_id=0, capabilities=ALL, id_count=HOST_IDS)
# capabilities(7) of a container of Docker's: no CAP_SYS_ADMIN, no CAP_NET_ADMIN.
LOCKED_DOWN = Rights(user_id=0, capabilities=0xA80425FB, id_count=HOST_IDS)
STRIPPED = Rights(user_id=0, capabilities=0, id_count=HOST_IDS)
ROOT_OF_ONE_ID = Rights(user_id=0, capabilities=ALL, id_count=1, own_network=False)
ROOT_OF_MANY_IDS = Rights(user_id=0, capabilities=ALL, id_count=65_536)
PLAIN_USER = Rights(user_id=1000, capabilities=0, id_count=HOST_IDS)


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        (LOCKED_DOWN, "this is root without CAP_SYS_ADMIN, CAP_NET_ADMIN"),
        (STRIPPED, "this is root without CAP_SYS_ADMIN, CAP_NET_ADMIN, CAP_SETUID, CAP_SETGID"),
        (ROOT_OF_ONE_ID, "this is root of a user namespace, not of the host"),
        (ROOT_OF_MANY_IDS, "this is root of a user namespace, not of the host"),
        (PLAIN_USER, "user 1000 is not root"),
    ],
)
def test_the_obstacle_is_named_with_its_remedy(own: Rights, reason: str) -> None:
    assert own.obstacle is not None
    assert own.obstacle.reason == reason
    assert own.obstacle.remedy


def test_root_of_the_host_meets_no_obstacle() -> None:
    assert ROOT.obstacle is None
    assert ROOT.other_users and ROOT.networks and ROOT.chroot


@pytest.mark.parametrize(
    ("own", "other_users", "networks", "chroot"),
    [
        (LOCKED_DOWN, True, False, True),
        (STRIPPED, False, False, False),
        (ROOT_OF_ONE_ID, False, False, False),
        (ROOT_OF_MANY_IDS, False, True, True),
        (PLAIN_USER, False, False, False),
    ],
)
def test_what_is_left(own: Rights, other_users: bool, networks: bool, chroot: bool) -> None:
    assert (own.other_users, own.networks, own.chroot) == (other_users, networks, chroot)


def test_id_maps_are_added_up() -> None:
    assert mapped_ids("         0          0 4294967295\n") == HOST_IDS
    assert mapped_ids("         0       1001          1\n         1     100000      65535\n") == 65_536
    assert mapped_ids("") == 0


def test_this_process() -> None:
    own = rights()
    assert own.user_id == os.geteuid()
    assert own.id_count > 0
    if own.user_id != 0:
        assert own.obstacle is not None
    assert own.lacks(Capability.CAP_CHOWN) == (() if own.has(Capability.CAP_CHOWN) else ("CAP_CHOWN",))
