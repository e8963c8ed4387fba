"""Where one thing of a machine meets another: names that others use, disks that others have, cards that stay."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import msgspec
import pytest
from engine_rig import Engineer, engineer_at, machine_request

from triarch.errors import Busy, Failed, InUse, Invalid, NotFound
from triarch.model.device import AddDevice, DiskDevice, NicDevice, VolumeDevice
from triarch.model.machine import CreateMachine, Machine, RenameMachine, SetMachine
from triarch.model.network import CreateNetwork, NetworkKind
from triarch.model.operation import Operation
from triarch.model.settings import Profile, Settings
from triarch.model.snapshot import (
    CopyMachine,
    CreateSnapshot,
    ExportMachine,
    ImportMachine,
    RestoreSnapshot,
)
from triarch.model.state import State
from triarch.model.template import Template

WEST = timezone(timedelta(hours=-12))


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


# -- two at once


async def test_two_networks_made_at_once_are_two(engineer: Engineer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engineer.engine._services.network, "check_parent", lambda *_, **__: None)
    requests = [CreateNetwork(name=name, kind=NetworkKind.ISOLATED) for name in ("lab", "test", "lab")]
    made = await asyncio.gather(*(engineer.engine.networks.create(each) for each in requests), return_exceptions=True)
    assert isinstance(made[2], Busy)
    for operation in made[:2]:
        assert isinstance(operation, Operation)
        await engineer.done(operation)
    lab, test = engineer.engine.networks.list()
    assert lab.index != test.index and lab.ipv4 != test.ipv4
    for name in ("lab", "test"):
        await engineer.done(await engineer.engine.networks.delete(name))


async def test_one_backup_does_not_become_one_machine_twice(engineer: Engineer) -> None:
    await make(engineer, "web")
    exported = await engineer.done(await engineer.engine.backups.export("web", ExportMachine()))
    assert exported.result is not None
    path = engineer.engine.backups.spool.whole(exported.result)
    other = path.with_name(f"{'0' * 32}.triarch")
    other.write_bytes(path.read_bytes())
    await engineer.done(await engineer.engine.delete("web"))
    first = await engineer.engine.backups.import_(exported.result, ImportMachine())
    with pytest.raises(Busy, match="import-machine"):
        await engineer.engine.backups.import_("0" * 32, ImportMachine(name="www"))
    with pytest.raises(Busy, match="import-machine"):
        engineer.engine.backups.remove(exported.result)
    await engineer.done(first)
    await engineer.done(await engineer.engine.backups.import_("0" * 32, ImportMachine(name="www")))
    assert record(engineer, "web").uuid != record(engineer, "www").uuid


async def test_an_export_that_let_its_machine_go_does_not_thaw_it_for_others(
    engineer: Engineer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triarch.drivers.fake.driver import FakeDriver
    from triarch.engine import backup_procedures

    def fail(*_: object, **__: object) -> None:
        raise Failed("no more pens")

    thawed: list[str] = []
    thaw = FakeDriver.thaw

    async def count(self: FakeDriver, spec: Any) -> float | None:
        thawed.append(spec.machine.name)
        return await thaw(self, spec)

    await engineer.launch("web")
    monkeypatch.setattr(backup_procedures, "write_backup", fail)
    monkeypatch.setattr(FakeDriver, "thaw", count)
    assert await engineer.failed(await engineer.engine.backups.export("web", ExportMachine())) == "no more pens"
    assert thawed == ["web"]


async def test_profile_and_template_of_a_machine_that_is_being_made_stay(engineer: Engineer) -> None:
    await engineer.done(await engineer.engine.profiles.create(Profile(name="small", settings=Settings())))
    operation = await engineer.engine.create(msgspec.structs.replace(stopped("web"), profiles=("small",)))
    with pytest.raises(InUse, match="profile 'small' is in use by 'web'"):
        await engineer.engine.profiles.delete("small")
    with pytest.raises(InUse, match="template 'tiny' is in use by 'web'"):
        await engineer.engine.delete_template("tiny")
    await engineer.done(operation)


async def test_nobody_gets_on_a_network_that_is_being_deleted(engineer: Engineer) -> None:
    await engineer.done(await engineer.engine.networks.create(CreateNetwork(name="lab", kind=NetworkKind.ISOLATED)))
    operation = await engineer.engine.networks.delete("lab")
    with pytest.raises(Busy, match="network 'lab' is being deleted"):
        await engineer.engine.create(stopped("web", network="lab"))
    await engineer.done(operation)
    with pytest.raises(NotFound):
        await engineer.engine.create(stopped("web", network="lab"))


async def test_an_address_is_taken_while_its_card_is_plugged_in(engineer: Engineer) -> None:
    network = CreateNetwork(name="lab", kind=NetworkKind.ISOLATED, ipv4="10.209.0.0/24")
    await engineer.done(await engineer.engine.networks.create(network))
    for name in ("web", "db"):
        await make(engineer, name)
    card = AddDevice(name="eth1", device=NicDevice(network="lab", address="10.209.0.9"))
    operation = await engineer.engine.devices.add("web", card)
    with pytest.raises(InUse, match=r"10\.209\.0\.9 of machine 'db' .* is already taken by machine 'web'"):
        await engineer.engine.devices.add("db", card)
    await engineer.done(operation)
    for name in ("web", "db"):
        await engineer.done(await engineer.engine.delete(name))
    await engineer.done(await engineer.engine.networks.delete("lab"))


async def test_layers_of_a_template_that_comes_are_not_swept_with_those_of_one_that_goes(
    engineer: Engineer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triarch.engine import backup_procedures
    from triarch.engine.template_procedures import remove_unused_layers

    await make(engineer, "web")
    exported = await engineer.done(await engineer.engine.backups.export("web", ExportMachine(with_template=True)))
    await engineer.done(await engineer.engine.delete("web"))
    await engineer.done(await engineer.engine.delete_template("tiny"))
    services = engineer.engine._services
    add = services.templates.add

    async def sweep_first(template: Template) -> None:
        """What the delete of another template does just then."""
        await asyncio.to_thread(remove_unused_layers, services)
        await add(template)

    async def sound(_: Path) -> None:
        """The layer of tests is no image."""

    monkeypatch.setattr(services.templates, "add", sweep_first)
    monkeypatch.setattr(backup_procedures, "check_image", sound)
    await engineer.done(await engineer.engine.backups.import_(exported.result or "", ImportMachine()))
    for layer in services.templates.get("tiny").layers:
        services.pool.verify_layer(layer)
    assert services.templates.coming == set()


# -- odd input


async def test_an_announced_upload_without_a_byte_hides_no_others(engineer: Engineer) -> None:
    await make(engineer, "web")
    exported = await engineer.done(await engineer.engine.backups.export("web", ExportMachine()))
    spool = engineer.engine.backups.spool
    spool.whole(exported.result or "").with_name(f"{'1' * 32}.size").write_text("7")
    assert [backup.id for backup in spool.all()] == [exported.result]
    with pytest.raises(NotFound):
        spool.get("1" * 32)


@pytest.mark.parametrize("moment", [datetime.min, datetime.max.replace(tzinfo=UTC), datetime.max.replace(tzinfo=WEST)])
async def test_an_account_of_the_end_of_time_is_one_of_what_is_known(engineer: Engineer, moment: datetime) -> None:
    began = time.monotonic()
    with suppress(Invalid):
        await engineer.engine.usages.account(end=moment)
    with suppress(Invalid):
        await engineer.engine.usages.account(begin=moment)
    assert time.monotonic() - began < 2


async def test_a_path_that_no_host_can_have_is_the_callers_mistake(engineer: Engineer) -> None:
    await make(engineer, "web")
    disk = DiskDevice(source=f"/{'a' * 300}")
    with pytest.raises(Invalid, match="file name too long"):
        await engineer.engine.devices.add("web", AddDevice(name="data", device=disk))
