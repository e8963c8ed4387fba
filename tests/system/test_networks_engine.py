"""Networks in the engine: what is refused, what is chosen, what lives on, and what a kill of the daemon leaves."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator
from ipaddress import IPv4Interface, IPv4Network
from pathlib import Path

import msgspec
import pytest
from crash_rig import CrashRig, Point, settled
from engine_rig import Engineer, engineer_at, machine_request, new_engine
from network_rig import instance_with_networks

from triarch.client import Client
from triarch.errors import Error, Exists, InUse, Invalid, NotFound, Unsupported, WrongState
from triarch.host.netlink import Netlink
from triarch.model.device import NicDevice
from triarch.model.instance import Instance
from triarch.model.machine import CreateMachine, SetMachine
from triarch.model.network import AclRule, AddAclRule, CreateNetwork, Direction, EditNetwork, Forward, NetworkKind
from triarch.model.operation import Operation
from triarch.model.settings import Settings

LAB = CreateNetwork(name="lab", kind=NetworkKind.ISOLATED, ipv4="10.199.7.0/29", ipv6="none")
PATIENCE_SECONDS = 30.0


@pytest.fixture
async def engineer(tmp_path: Path) -> AsyncIterator[Engineer]:
    instance_with_networks(tmp_path / "probe")
    async with engineer_at(tmp_path) as made:
        yield made


def on(name: str, network: str = "lab", *, start: bool = False, **settings: object) -> CreateMachine:
    said = Settings(network=network, **settings)  # type: ignore[arg-type]
    return msgspec.structs.replace(machine_request(name, start=start), settings=said)


async def make(engineer: Engineer, *requests: CreateMachine) -> None:
    for request in requests:
        await engineer.done(await engineer.engine.create(request))


def bridges(instance: Instance) -> list[str]:
    with Netlink() as netlink:
        return sorted(link.name for link in netlink.links() if link.name.startswith(instance.bridge))


async def test_a_network_is_made_used_and_deleted(engineer: Engineer) -> None:
    engine = engineer.engine
    await engineer.done(await engine.networks.create(LAB))
    assert bridges(engine.instance) == [f"{engine.instance.bridge}n1"]
    await make(engineer, on("web", start=True))
    view = engine.networks.get("lab")
    assert (view.machines, view.ipv6, view.index) == (("web",), None, 1)
    assert engine.machine("web").address == "10.199.7.2"
    with pytest.raises(InUse, match="network 'lab' is in use by 'web'"):
        await engine.networks.delete("lab")
    await engineer.done(await engine.delete("web", force=True))
    await engineer.done(await engine.networks.delete("lab"))
    assert bridges(engine.instance) == []
    with pytest.raises(NotFound, match="there is no network 'lab'"):
        await engine.create(on("web"))


@pytest.mark.parametrize(
    ("request_", "error", "reason"),
    [
        (CreateNetwork(name="nat"), Invalid, "has a meaning of its own"),
        (CreateNetwork(name="user"), Invalid, "has a meaning of its own"),
        (CreateNetwork(name='a"; drop'), Invalid, "illegal network name"),
        (CreateNetwork(name="x" * 33), Invalid, "illegal network name"),
        (CreateNetwork(name="x", ipv4="10.1.2.3/24"), Invalid, "host bits"),
        (CreateNetwork(name="x", ipv4="10.1.2.0/30"), Invalid, "between /8 and /29"),
        (CreateNetwork(name="x", ipv4="8.8.8.0/24"), Invalid, "private"),
        (CreateNetwork(name="x", ipv4="10.999.0.0/24"), Invalid, "illegal IPv4 range"),
        (CreateNetwork(name="x", ipv6="fe80::/64"), Invalid, "illegal IPv6 range"),
        (CreateNetwork(name="x", ipv4="127.0.0.0/8"), Invalid, "in use on this host"),
        (CreateNetwork(name="x", kind=NetworkKind.BRIDGE), Invalid, "needs an interface of the host"),
        (CreateNetwork(name="x", kind=NetworkKind.BRIDGE, parent="nosuch0"), NotFound, "no interface 'nosuch0'"),
        (CreateNetwork(name="x", kind=NetworkKind.BRIDGE, parent="lo"), InUse, "cannot be put into a bridge"),
        (CreateNetwork(name="x", parent="eth0"), Invalid, "stands on no interface"),
        (
            CreateNetwork(
                name="x", kind=NetworkKind.MACVLAN, parent="lo", acl=(AclRule(direction=Direction.EGRESS, allow=False),)
            ),
            Unsupported,
            "cannot have an access list",
        ),
        (
            CreateNetwork(name="x", acl=(AclRule(direction=Direction.EGRESS, allow=False, peer="10.0.0.1/8"),)),
            Invalid,
            "illegal peer",
        ),
    ],
)
async def test_what_cannot_be_a_network_is_refused(
    engineer: Engineer, request_: CreateNetwork, error: type[Error], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        await engineer.engine.networks.create(request_)
    assert engineer.engine.networks.list() == ()
    assert bridges(engineer.engine.instance) == []


async def test_names_and_ranges_are_one_networks_own(engineer: Engineer) -> None:
    await engineer.done(await engineer.engine.networks.create(LAB))
    with pytest.raises(Exists):
        await engineer.engine.networks.create(LAB)
    with pytest.raises(InUse, match="overlaps"):
        await engineer.engine.networks.create(CreateNetwork(name="other", ipv4="10.199.0.0/16"))
    await engineer.done(await engineer.engine.networks.create(CreateNetwork(name="second")))
    await engineer.done(await engineer.engine.networks.create(CreateNetwork(name="third")))
    ranges = [IPv4Network(view.ipv4 or "") for view in engineer.engine.networks.list()]
    assert not any(one.overlaps(other) for one in ranges for other in ranges if one is not other)


async def test_an_interface_that_the_host_uses_is_left_alone(engineer: Engineer) -> None:
    """Of interfaces with addresses only the loopback is sure to be there; a bridge of the test's own is no port."""
    name = f"{engineer.engine.instance.bridge}w"
    with Netlink() as netlink:
        netlink.add_bridge(f"{name}x")
        bridge = netlink.index_of(f"{name}x")
        assert bridge is not None
        own = Path("/proc/self/ns/net").open("rb")  # noqa: SIM115 - closed below
        netlink.add_veth(name, bridge, f"{name}y", own.fileno(), "02:ff:00:00:00:02")
        own.close()
        request = CreateNetwork(name="lan", kind=NetworkKind.BRIDGE, parent=name)
        try:
            with pytest.raises(InUse, match="belongs to"):
                await engineer.engine.networks.create(request)
            netlink.delete(bridge)
            index = netlink.index_of(name)
            assert index is not None
            netlink.add_address(index, IPv4Interface("198.51.100.9/24"))
            with pytest.raises(InUse, match=r"has the address 198\.51\.100\.9"):
                await engineer.engine.networks.create(request)
            await engineer.done(await engineer.engine.networks.create(msgspec.structs.replace(request, force=True)))
            await engineer.done(await engineer.engine.networks.delete("lan"))
        finally:
            found = netlink.index_of(name)
            if found is not None:
                netlink.delete(found)


async def test_addresses_are_chosen_and_refused_beside_each_other(engineer: Engineer) -> None:
    engine = engineer.engine
    await engineer.done(await engine.networks.create(LAB))
    await make(engineer, on("first", address="10.199.7.3"), on("second"), on("third"))
    assert {view.name: view.address for view in engine.machines()} == {
        "first": "10.199.7.3",
        "second": "10.199.7.2",
        "third": "10.199.7.4",
    }
    for address, error, reason in (
        ("10.199.7.3", InUse, "already taken by machine 'first'"),
        ("10.199.8.1", Invalid, "outside its network"),
        ("10.199.7.1", Invalid, "the gateway's"),
        ("10.199.7.7", Invalid, "the network's own"),
    ):
        with pytest.raises(error, match=reason):
            await engine.create(on("fourth", address=address))
    with pytest.raises(Invalid, match="has no IPv6 range"):
        await engine.create(on("fourth", address6="fd00::5"))
    await make(engineer, on("fourth"), on("fifth"))
    with pytest.raises(Error, match="no address left"):
        await engine.create(on("sixth"))


async def test_two_at_once_never_get_the_same(engineer: Engineer) -> None:
    engine = engineer.engine
    await engineer.done(await engine.networks.create(LAB))
    first = await engine.create(on("first", address="10.199.7.5"))
    with pytest.raises(InUse, match="already taken by machine 'first'"):
        await engine.create(on("second", address="10.199.7.5"))
    await engineer.done(first)
    await make(engineer, on("third"))
    changing = await engine.set("third", SetMachine(settings=Settings(address="10.199.7.6")))
    with pytest.raises(InUse, match="already taken by machine 'third'"):
        await engine.create(on("second", address="10.199.7.6"))
    assert isinstance(changing, Operation)
    await engineer.done(changing)
    assert engine.machine("third").address == "10.199.7.6"


async def test_ports_of_the_host_have_one_owner(engineer: Engineer) -> None:
    engine = engineer.engine
    await engineer.done(await engine.networks.create(LAB))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InUse, match="taken by a program of the host"):
            await engine.create(on("web", forwards=(Forward(host_port=port, machine_port=80),)))
    await make(engineer, on("web", forwards=(Forward(host_port=port, machine_port=80),), start=True))
    everywhere = Forward(host_port=port, machine_port=8080, host_address="0.0.0.0")
    with pytest.raises(InUse, match="leads to machine 'web' already"):
        await engine.create(on("other", forwards=(everywhere,)))
    with pytest.raises(Unsupported, match="network 'none' has none"):
        await engine.create(on("other", "none", forwards=(everywhere,)))
    with pytest.raises(Invalid, match="cannot be had"):
        foreign = Forward(host_port=port, machine_port=80, host_address="203.0.113.9")
        await engine.create(on("other", forwards=(foreign,)))


async def test_live_and_not(engineer: Engineer) -> None:
    engine = engineer.engine
    await engineer.done(await engine.networks.create(LAB))
    await make(engineer, on("web", start=True))
    live = await engine.set("web", SetMachine(settings=Settings(aliases=("www",), labels={"role": "web"})))
    assert isinstance(live, Operation)
    assert "next start" not in (await engineer.done(live)).result  # type: ignore[operator]
    (port,) = engine._services.network._ports.values()
    assert (port.names, port.labels) == (("web", "www"), {"role": "web"})
    with pytest.raises(WrongState, match="to another address: it is running"):
        await engine.set("web", SetMachine(settings=Settings(address="10.199.7.6")))
    with pytest.raises(InUse, match="alias 'www' of machine 'other' is already taken"):
        await engine.create(on("other", aliases=("www",)))


async def test_a_machine_has_several_cards(engineer: Engineer) -> None:
    engine = engineer.engine
    await engineer.done(await engine.networks.create(LAB))
    await engineer.done(await engine.networks.create(CreateNetwork(name="second", ipv4="10.198.7.0/24")))
    cards = {"eth1": NicDevice(network="second"), "eth2": NicDevice(network="lab", address="10.199.7.6")}
    await make(engineer, on("web", devices=cards))
    view = engine.machine("web")
    assert {name: nic.ip for name, nic in view.nics.items()} == {"eth1": "10.198.7.2", "eth2": "10.199.7.6"}
    assert len({view.mac, *(nic.mac for nic in view.nics.values())}) == 3
    assert engine.networks.get("second").machines == ("web",)
    spec = engine._services.spec(engine._services.machines.get("web"))
    links = {found.name: found.link for found in spec.devices}
    assert links["eth1"].bridge == f"{engine.instance.bridge}n2"  # type: ignore[union-attr]
    assert links["eth2"].host_interface == f"{engine.instance.bridge}m1b"  # type: ignore[union-attr]


async def test_access_lists_are_edited_by_position(engineer: Engineer) -> None:
    engine = engineer.engine
    await engineer.done(await engine.networks.create(LAB))
    rules = [AclRule(direction=Direction.EGRESS, allow=False, ports=(port,)) for port in (1, 2, 3)]
    await engineer.done(await engine.networks.add_rule("lab", AddAclRule(rule=rules[2])))
    await engineer.done(await engine.networks.add_rule("lab", AddAclRule(rule=rules[0], position=1)))
    await engineer.done(await engine.networks.add_rule("lab", AddAclRule(rule=rules[1], position=2)))
    assert list(engine.networks.get("lab").acl) == rules
    with pytest.raises(NotFound, match="no rule 4: it has 3"):
        await engine.networks.remove_rule("lab", 4)
    await engineer.done(await engine.networks.remove_rule("lab", 2))
    assert list(engine.networks.get("lab").acl) == [rules[0], rules[2]]
    with pytest.raises(Invalid, match="the host is its gateway"):
        await engine.networks.edit("lab", EditNetwork(gateway="10.199.7.3"))


async def test_a_new_daemon_knows_networks_and_who_is_plugged_in(engineer: Engineer) -> None:
    await engineer.done(await engineer.engine.networks.create(LAB))
    await make(engineer, on("web", start=True))
    await engineer.engine.close()
    engineer.engine = await new_engine(engineer.engine.instance)
    assert engineer.engine.networks.get("lab").ipv4 == LAB.ipv4


# -- a kill of the daemon


POINTS = [
    Point(verb, step, when)
    for verb, steps in (
        ("create-network", ("record", "host", "created")),
        ("edit-network", ("host", "record")),
        ("delete-network", ("host", "forget")),
    )
    for step in steps
    for when in ("before", "after")
]


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CrashRig]:
    instance_with_networks(tmp_path_factory.mktemp("probe"))
    with CrashRig(tmp_path_factory.mktemp("crash"), fake=True) as rig:
        yield rig


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_a_kill_amid_a_change_is_finished_or_undone(rig: CrashRig, point: Point) -> None:
    rig.restart(point)
    edit = EditNetwork(description="edited")
    with rig.client() as client:
        if point.verb != "create-network":
            client.finish(client.networks.create(LAB))
        try:
            match point.verb:
                case "create-network":
                    client.wait(client.networks.create(LAB))
                case "edit-network":
                    client.wait(client.networks.edit("lab", edit))
                case _:
                    client.wait(client.networks.delete("lab"))
        except (Error, OSError):
            pass
    assert rig.died(PATIENCE_SECONDS)
    rig.restart()
    with rig.client() as client:
        settled(client, PATIENCE_SECONDS)
        check_whole(client, rig)


def check_whole(client: Client, rig: CrashRig) -> None:
    """Recorded or gone, on the host and in the store alike; either way it can be made and deleted."""
    there = [view.name for view in client.networks.list() if view.name == "lab"]
    if not there:
        assert bridges(rig.instance) == []
        client.finish(client.networks.create(LAB))
    assert bridges(rig.instance) == [f"{rig.instance.bridge}n1"]
    client.finish(client.networks.delete("lab"))
    assert bridges(rig.instance) == []
