"""Where one thing of a machine meets another: names that others use, disks that others have, cards that stay."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from engine_rig import Engineer, engineer_at, machine_request

from triarch.errors import Busy, InUse, Invalid
from triarch.model.device import AddDevice, DiskDevice, NicDevice, VolumeDevice
from triarch.model.machine import CreateMachine, Machine, RenameMachine, SetMachine
from triarch.model.network import CreateNetwork, NetworkKind
from triarch.model.operation import Operation
from triarch.model.snapshot import CopyMachine, CreateSnapshot, RestoreSnapshot
from triarch.model.state import State


@pytest.fixture
async def engineer(tmp_path: Path) -> AsyncIterator[Engineer]:
    async with engineer_at(tmp_path) as made:
        yield made


def stopped(name: str, **settings: object) -> CreateMachine:
    request = machine_request(name, start=False)
    return msgspec.structs.replace(request, settings=msgspec.structs.replace(request.settings, **settings))


async def make(engineer: Engineer, name: str, **settings: object) -> None:
    await engineer.done(await engineer.engine.create(stopped(name, **settings)))


def record(engineer: Engineer, name: str) -> Machine:
    return engineer.engine._services.machines.get(name)


# -- names


async def test_what_others_depend_on_keeps_its_name_and_is_deleted_only_by_force(engineer: Engineer) -> None:
    await make(engineer, "db")
    await make(engineer, "web", depends_on=("cache", "db"))
    with pytest.raises(InUse, match="cannot delete machine 'db': 'web' depends on it") as refusal:
        await engineer.engine.delete("db")
    assert refusal.value.hint == "triarch set web depends-on=cache"
    with pytest.raises(InUse, match="cannot rename machine 'db': 'web' depends on it"):
        await engineer.engine.rename("db", RenameMachine(name="sql"))
    await engineer.done(await engineer.engine.delete("db", force=True))


async def test_a_machine_is_not_renamed_to_what_another_is_called(engineer: Engineer) -> None:
    await make(engineer, "web", aliases=("www",))
    await make(engineer, "db")
    with pytest.raises(InUse, match="the name 'www' is an alias of machine 'web'"):
        await engineer.engine.rename("db", RenameMachine(name="www"))
    with pytest.raises(Invalid, match="alias 'www' of machine 'www' is there twice"):
        await engineer.engine.rename("web", RenameMachine(name="www"))


async def test_two_machines_do_not_get_one_name(engineer: Engineer) -> None:
    await make(engineer, "web")
    await make(engineer, "db")
    first = await engineer.engine.rename("web", RenameMachine(name="new"))
    with pytest.raises(Busy, match="machine 'new' is busy"):
        await engineer.engine.rename("db", RenameMachine(name="new"))
    with pytest.raises(Busy, match="machine 'new' is busy"):
        await engineer.engine.create(stopped("new"))
    await engineer.done(first)


# -- disks


async def test_a_disk_is_one_machines_however_it_comes_to_another(engineer: Engineer, tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(1 << 20))
    (tmp_path / "link").symlink_to(disk)
    await make(engineer, "web", devices={"data": DiskDevice(source=str(disk))})
    taken = "disk.raw is device 'data' of machine 'web'"
    with pytest.raises(InUse, match=taken):
        await engineer.engine.backups.copy("web", CopyMachine(name="copy"))
    with pytest.raises(InUse, match="link is device 'data' of machine 'web'"):
        await engineer.engine.create(stopped("db", devices={"data": DiskDevice(source=str(tmp_path / "link"))}))
    # A snapshot remembers a disk that another machine has by now.
    await engineer.done(await engineer.engine.snapshots.create("web", CreateSnapshot(name="a")))
    await engineer.done(await engineer.engine.devices.remove("web", "data"))
    await make(engineer, "db", devices={"data": DiskDevice(source=str(disk))})
    operation = await engineer.engine.snapshots.restore("web", RestoreSnapshot(snapshot="a"))
    assert operation is not None
    assert "disk.raw is device 'data' of machine 'db'" in await engineer.failed(operation)


# -- what comes back


async def test_a_restore_keeps_the_cards_as_the_machines_own(engineer: Engineer) -> None:
    network = CreateNetwork(name="lab", kind=NetworkKind.ISOLATED)
    await engineer.done(await engineer.engine.networks.create(network))
    await make(engineer, "web")
    await engineer.done(await engineer.engine.snapshots.create("web", CreateSnapshot(name="a")))
    for name, device in (("eth1", NicDevice(network="lab")), ("data", VolumeDevice(path="/data", size_bytes=16 << 20))):
        await engineer.done(await engineer.engine.devices.add("web", AddDevice(name=name, device=device)))
    nics = record(engineer, "web").nics
    operation = await engineer.engine.snapshots.restore("web", RestoreSnapshot(snapshot="a"))
    assert operation is not None
    await engineer.done(operation)
    restored = record(engineer, "web")
    assert (set(restored.devices), restored.nics) == ({"eth1"}, nics)
    answer = await engineer.engine.set("web", SetMachine(values={"label.a": "b"}))
    assert isinstance(answer, Operation)
    await engineer.done(answer)
    assert record(engineer, "web").nics == nics
    await engineer.done(await engineer.engine.devices.remove("web", "eth1"))
    await engineer.done(await engineer.engine.delete("web"))
    await engineer.done(await engineer.engine.networks.delete("lab"))


async def test_a_paused_machine_is_paused_after_a_restore_that_did_not_come_to_stop_it(
    engineer: Engineer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triarch.drivers.fake.driver import FakeDriver
    from triarch.errors import Failed

    await engineer.launch("web")
    await engineer.done(await engineer.engine.snapshots.create("web", CreateSnapshot(name="a")))
    await engineer.done(await engineer.engine.pause("web"))

    async def refuse(*_: object) -> None:
        raise Failed("it cannot be killed")

    with monkeypatch.context() as patch:
        patch.setattr(FakeDriver, "kill", refuse)
        operation = await engineer.engine.snapshots.restore("web", RestoreSnapshot(snapshot="a"))
        assert operation is not None
        assert await engineer.failed(operation) == "it cannot be killed"
    assert engineer.engine.machine("web").state is State.PAUSED
    await engineer.done(await engineer.engine.resume("web"))
