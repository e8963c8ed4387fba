"""Snapshots, restore, copy and backups in the engine, with fake machines, a real pool and a real store."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio
from engine_rig import Engineer, engineer_at, new_engine

from triarch.drivers.fake.driver import FakeDriver
from triarch.errors import Busy, Damaged, Denied, Exists, NotFound, Unsupported, WrongState
from triarch.host.ext4_files import list_files, read_file, replace_file
from triarch.model.device import FolderDevice
from triarch.model.operation import OperationStatus
from triarch.model.policy import SnapshotSchedule
from triarch.model.snapshot import (
    Consistency,
    CopyMachine,
    CreateSnapshot,
    ExportMachine,
    ImportMachine,
    RestoreSnapshot,
)
from triarch.model.state import State


@pytest_asyncio.fixture
async def engineer(tmp_path: Path) -> AsyncIterator[Engineer]:
    async with engineer_at(tmp_path) as made:
        yield made


def delta(engineer: Engineer, name: str) -> Path:
    uuid = engineer.engine.machine(name).uuid
    return Path(engineer.engine.instance.state_dir) / "pool/deltas" / f"{uuid}.raw"


def sets(engineer: Engineer) -> list[str]:
    return sorted(path.name for path in (Path(engineer.engine.instance.state_dir) / "pool/sets").iterdir())


def write(engineer: Engineer, name: str, text: bytes) -> None:
    """As if the machine had written it: fake ones do not."""
    replace_file(delta(engineer, name), "upper/note", text, 0o644)


def read(engineer: Engineer, name: str) -> bytes:
    return read_file(delta(engineer, name), "upper/note")


async def snapshot(engineer: Engineer, name: str, snap: str) -> None:
    await engineer.done(await engineer.engine.snapshots.create(name, CreateSnapshot(name=snap)))


async def test_a_restore_brings_back_disks_and_settings_and_keeps_who_it_is(engineer: Engineer) -> None:
    await engineer.launch("web", start=False, color="red")
    write(engineer, "web", b"before")
    before = engineer.engine.machine("web")
    await snapshot(engineer, "web", "a")
    write(engineer, "web", b"after")
    kept = engineer.engine._services.machines.get("web")
    await engineer.engine._services.machines.put(msgspec.structs.replace(kept, environment={"color": "blue"}))
    await engineer.done(await engineer.engine.snapshots.restore("web", RestoreSnapshot(snapshot="a")))  # type: ignore[arg-type]
    assert read(engineer, "web") == b"before"
    after = engineer.engine._services.machines.get("web")
    assert after.environment["color"] == "red"
    assert (after.uuid, after.index) == (before.uuid, kept.index)
    assert after.state is State.STOPPED
    assert sets(engineer) == [engineer.engine.snapshots.get("web", "a").id]


async def test_a_running_machine_stands_still_and_goes_on(engineer: Engineer) -> None:
    await engineer.launch("web")
    started = engineer.engine.machine("web").started_at
    await snapshot(engineer, "web", "a")
    made = engineer.engine.snapshots.get("web", "a")
    assert made.consistency is Consistency.FROZEN
    assert made.frozen_seconds is not None and made.frozen_seconds > 0
    view = engineer.engine.machine("web")
    assert (view.state, view.started_at, view.snapshot_count) == (State.RUNNING, started, 1)
    await engineer.done(await engineer.engine.snapshots.restore("web", RestoreSnapshot(snapshot="a")))  # type: ignore[arg-type]
    view = engineer.engine.machine("web")
    assert view.state is State.RUNNING
    assert view.started_at != started


async def test_memory_comes_back_only_where_it_was_kept(engineer: Engineer) -> None:
    await engineer.launch("web")
    await engineer.done(await engineer.engine.snapshots.create("web", CreateSnapshot(name="mem", stateful=True)))
    await snapshot(engineer, "web", "plain")
    request = RestoreSnapshot(snapshot="mem", stateful=True)
    await engineer.done(await engineer.engine.snapshots.restore("web", request))  # type: ignore[arg-type]
    assert engineer.engine.machine("web").state is State.RUNNING
    with pytest.raises(Unsupported, match="holds no memory"):
        await engineer.engine.snapshots.restore("web", RestoreSnapshot(snapshot="plain", stateful=True, check=True))
    await engineer.launch("idle", start=False)
    with pytest.raises(WrongState, match="no memory to keep"):
        await engineer.engine.snapshots.create("idle", CreateSnapshot(stateful=True))


async def test_one_flipped_bit_is_refused_by_name_and_nothing_changes(engineer: Engineer) -> None:
    await engineer.launch("web")
    await snapshot(engineer, "web", "a")
    disk = Path(engineer.engine.instance.state_dir) / "pool/sets" / sets(engineer)[0] / "delta.raw"
    with disk.open("r+b") as file:
        file.seek(4096)
        byte = file.read(1)[0]
        file.seek(4096)
        file.write(bytes([byte ^ 1]))
    started, inode = engineer.engine.machine("web").started_at, delta(engineer, "web").stat().st_ino
    with pytest.raises(Damaged, match="snapshot 'a' of machine 'web' is damaged: its disk 'delta'"):
        await engineer.engine.snapshots.restore("web", RestoreSnapshot(snapshot="a", check=True))
    operation = await engineer.engine.snapshots.restore("web", RestoreSnapshot(snapshot="a"))
    assert operation is not None
    assert "snapshot 'a' of machine 'web' is damaged" in await engineer.failed(operation)
    view = engineer.engine.machine("web")
    assert (view.state, view.started_at) == (State.RUNNING, started)
    assert delta(engineer, "web").stat().st_ino == inode
    assert len(sets(engineer)) == 1


async def test_a_restore_that_does_not_start_brings_everything_back(engineer: Engineer) -> None:
    await engineer.launch("web", start=False, fake__fail_start="it is broken")
    write(engineer, "web", b"broken")
    await snapshot(engineer, "web", "broken")
    kept = engineer.engine._services.machines.get("web")
    await engineer.engine._services.machines.put(msgspec.structs.replace(kept, environment={}))
    write(engineer, "web", b"good")
    await engineer.done(await engineer.engine.start("web"))
    operation = await engineer.engine.snapshots.restore("web", RestoreSnapshot(snapshot="broken"))
    assert operation is not None
    assert "it is broken" in await engineer.failed(operation)
    assert engineer.engine.machine("web").state is State.RUNNING
    assert read(engineer, "web") == b"good"
    assert engineer.engine._services.machines.get("web").environment == {}
    assert len(sets(engineer)) == 1


async def test_two_at_once_name_the_operation(engineer: Engineer) -> None:
    await engineer.launch("web")
    first = await engineer.engine.snapshots.create("web", CreateSnapshot())
    with pytest.raises(Busy, match=f"operation {first.id} \\(snapshot\\) holds it"):
        await engineer.engine.snapshots.create("web", CreateSnapshot())
    await engineer.done(first)


async def test_names_are_unique_numbered_and_changeable(engineer: Engineer) -> None:
    await engineer.launch("web", start=False)
    for expected in ("snap0", "snap1"):
        operation = await engineer.done(await engineer.engine.snapshots.create("web", CreateSnapshot()))
        assert operation.result == expected
    with pytest.raises(Exists):
        await engineer.engine.snapshots.create("web", CreateSnapshot(name="snap0"))
    await engineer.done(await engineer.engine.snapshots.rename("web", "snap0", "first"))
    assert [each.name for each in engineer.engine.snapshots.list("web")] == ["first", "snap1"]
    with pytest.raises(NotFound, match="did you mean 'snap1'"):
        engineer.engine.snapshots.get("web", "snap2")
    await engineer.done(await engineer.engine.snapshots.delete("web", "first"))
    assert len(sets(engineer)) == 1


async def test_snapshots_follow_a_rename_and_go_with_the_machine(engineer: Engineer) -> None:
    from triarch.model.machine import RenameMachine

    await engineer.launch("web", start=False)
    await snapshot(engineer, "web", "a")
    await engineer.done(await engineer.engine.rename("web", RenameMachine(name="www")))
    assert [each.name for each in engineer.engine.snapshots.list("www")] == ["a"]
    await engineer.done(await engineer.engine.delete("www"))
    assert sets(engineer) == []
    assert await engineer.engine._services.store.list("snapshots/") == ()


async def test_a_copy_is_another_machine(engineer: Engineer) -> None:
    await engineer.launch("web")
    write(engineer, "web", b"of web")
    for name, text in (("machine-id", b"0" * 32), ("hostname", b"web\n")):
        replace_file(delta(engineer, "web"), f"upper/{name}", text, 0o444)
    await snapshot(engineer, "web", "a")
    write(engineer, "web", b"later")
    await engineer.done(await engineer.engine.backups.copy("web", CopyMachine(name="now", start=True)))
    await engineer.done(await engineer.engine.backups.copy("web", CopyMachine(name="past", snapshot="a")))
    assert (read(engineer, "now"), read(engineer, "past")) == (b"later", b"of web")
    views = {view.name: view for view in engineer.engine.machines()}
    assert len({view.uuid for view in views.values()}) == 3
    assert (views["now"].state, views["past"].state) == (State.RUNNING, State.STOPPED)
    with pytest.raises(Exists):
        await engineer.engine.backups.copy("web", CopyMachine(name="now"))
    assert len(sets(engineer)) == 1


def test_an_identity_is_renewed(tmp_path: Path) -> None:
    from triarch.host.ext4 import check_filesystem, make_delta_image
    from triarch.host.process import run
    from triarch.templates.identity import renew_identity

    image = tmp_path / "delta.raw"
    make_delta_image(image, 64 << 20)
    run(["debugfs", "-w", "-f", "-", str(image)], input_bytes=b"mkdir upper/etc\nmkdir upper/etc/ssh\n")
    old_id = b"0123456789abcdef0123456789abcdef\n"
    replace_file(image, "upper/etc/machine-id", old_id, 0o444)
    replace_file(image, "upper/etc/hostname", b"web\n", 0o644)
    replace_file(image, "upper/etc/ssh/ssh_host_ed25519_key", b"old", 0o600)
    replace_file(image, "upper/etc/ssh/sshd_config", b"kept", 0o644)
    renew_identity(image, "web", "copy")
    check_filesystem(image)
    new_id = read_file(image, "upper/etc/machine-id")
    assert new_id != old_id and len(new_id) == 33
    assert read_file(image, "upper/etc/hostname") == b"copy\n"
    assert set(list_files(image, "upper/etc/ssh")) == {
        "ssh_host_ed25519_key",
        "ssh_host_ed25519_key.pub",
        "sshd_config",
    }
    assert read_file(image, "upper/etc/ssh/ssh_host_ed25519_key").startswith(b"-----BEGIN OPENSSH PRIVATE KEY-----")


async def exported(engineer: Engineer, name: str, request: ExportMachine | None = None) -> bytes:
    operation = await engineer.done(await engineer.engine.backups.export(name, request or ExportMachine()))
    assert operation.result is not None
    spool = engineer.engine.backups.spool
    content = spool.whole(operation.result).read_bytes()
    spool.remove(operation.result)
    return content


def upload(engineer: Engineer, content: bytes) -> str:
    backup_id = os.urandom(16).hex()
    spool = engineer.engine.backups.spool
    spool.begin(backup_id, len(content))
    half = len(content) // 2
    spool.append(backup_id, 0, content[:half])
    assert spool.begin(backup_id, len(content)).received_bytes == half
    spool.append(backup_id, half, content[half:])
    return backup_id


async def test_a_backup_goes_out_and_comes_in(engineer: Engineer) -> None:
    await engineer.launch("web", color="red")
    write(engineer, "web", b"of web")
    content = await exported(engineer, "web")
    uuid = engineer.engine.machine("web").uuid
    operation = await engineer.engine.backups.import_(upload(engineer, content), ImportMachine(name="twin"))
    await engineer.done(operation)
    assert read(engineer, "twin") == b"of web"
    assert engineer.engine.machine("twin").uuid != uuid
    await engineer.done(await engineer.engine.delete("web", force=True))
    operation = await engineer.engine.backups.import_(upload(engineer, content), ImportMachine(start=True))
    assert (await engineer.done(operation)).result == "web"
    view = engineer.engine.machine("web")
    assert (view.uuid, view.state) == (uuid, State.RUNNING)
    assert engineer.engine._services.machines.get("web").environment["color"] == "red"
    assert sets(engineer) == [] and engineer.engine.backups.spool.all() == ()


async def test_a_backup_without_its_template_names_the_digest(engineer: Engineer, tmp_path: Path) -> None:
    await engineer.launch("web", start=False)
    content = await exported(engineer, "web")
    digest = engineer.engine.template("tiny").digest
    await engineer.done(await engineer.engine.delete("web"))
    await engineer.done(await engineer.engine.delete_template("tiny"))
    with pytest.raises(NotFound, match=digest) as caught:
        await engineer.engine.backups.import_(upload(engineer, content), ImportMachine())
    assert "--with-template" in (caught.value.hint or "")


@pytest.mark.parametrize("damage", ["cut", "bit", "tail"])
async def test_a_damaged_backup_is_refused_and_leaves_nothing(engineer: Engineer, damage: str) -> None:
    await engineer.launch("web", start=False)
    content = bytearray(await exported(engineer, "web"))
    if damage == "cut":
        del content[len(content) * 2 // 3 :]
    elif damage == "bit":
        content[len(content) // 2] ^= 1
    else:
        content += b"more"
    backup_id = upload(engineer, bytes(content))
    try:
        operation = await engineer.engine.backups.import_(backup_id, ImportMachine(name="twin"))
    except Damaged as error:
        message = error.message
    else:
        message = await engineer.failed(operation)
    assert "the backup is damaged in its part '" in message
    await engineer.idle()
    assert [view.name for view in engineer.engine.machines()] == ["web"]
    assert sets(engineer) == [] and engineer.engine.backups.spool.all() == ()


async def test_a_backup_gets_nothing_of_this_host_that_nobody_here_grants(engineer: Engineer) -> None:
    await engineer.launch("web", start=False)
    kept = engineer.engine._services.machines.get("web")
    own = msgspec.structs.replace(kept.own, devices={"all": FolderDevice(source="/", path="/host")})
    await engineer.engine._services.machines.put(msgspec.structs.replace(kept, own=own))
    backup_id = upload(engineer, await exported(engineer, "web"))
    with pytest.raises(Denied, match="asks for / of this host") as caught:
        await engineer.engine.backups.import_(backup_id, ImportMachine(name="twin", start=True))
    assert "--host-devices" in (caught.value.hint or "")
    assert [view.name for view in engineer.engine.machines()] == ["web"]
    operation = await engineer.engine.backups.import_(backup_id, ImportMachine(name="twin", host_devices=True))
    await engineer.done(operation)
    assert list(engineer.engine.machine("twin").devices) == ["all"]


async def scheduled(engineer: Engineer, name: str, schedule: SnapshotSchedule) -> None:
    kept = engineer.engine._services.machines.get(name)
    own = msgspec.structs.replace(kept.own, snapshots=schedule)
    await engineer.engine._services.machines.put(msgspec.structs.replace(kept, own=own, snapshots=schedule))


async def test_a_schedule_makes_keeps_and_expires(engineer: Engineer) -> None:
    await engineer.launch("web")
    await scheduled(engineer, "web", SnapshotSchedule(every_seconds=60, keep=2))
    schedule, now = engineer.engine._schedule, datetime.now(UTC)
    await schedule.look(now)
    assert engineer.engine.snapshots.list("web") == ()
    for minute in (2, 3, 10):
        await schedule.look(now + timedelta(minutes=minute))
        await schedule.look(now + timedelta(minutes=minute, seconds=5))
    assert len(engineer.engine.snapshots.list("web")) == 2
    assert all(each.scheduled for each in engineer.engine.snapshots.list("web"))
    await engineer.done(
        await engineer.engine.snapshots.create("web", CreateSnapshot(name="mine", expires_after_seconds=3600))
    )
    await schedule.look(now + timedelta(minutes=10, seconds=20))
    assert engineer.engine.snapshots.get("web", "mine")
    await schedule.look(now + timedelta(hours=2))
    assert "mine" not in [each.name for each in engineer.engine.snapshots.list("web")]


async def test_a_schedule_survives_a_restart_and_leaves_idle_machines_alone(tmp_path: Path) -> None:
    async with engineer_at(tmp_path) as engineer:
        await engineer.launch("web", start=False)
        await scheduled(engineer, "web", SnapshotSchedule(every_seconds=60))
        now = datetime.now(UTC)
        await engineer.engine._schedule.look(now + timedelta(minutes=2))
        await engineer.engine._schedule.look(now + timedelta(minutes=4))
        assert len(engineer.engine.snapshots.list("web")) == 1
        await engineer.engine.close()
        engineer.engine = await new_engine(engineer.engine.instance)
        write(engineer, "web", b"new")
        await engineer.engine._schedule.look(now + timedelta(minutes=4, seconds=30))
        assert len(engineer.engine.snapshots.list("web")) == 1
        await engineer.engine._schedule.look(now + timedelta(hours=3))
        assert len(engineer.engine.snapshots.list("web")) == 2


async def test_a_freeze_that_ends_too_early_makes_no_snapshot(
    engineer: Engineer, monkeypatch: pytest.MonkeyPatch
) -> None:
    await engineer.launch("web")
    monkeypatch.setattr("triarch.drivers.fake.driver.FREEZE_SECONDS", 0.0)
    operation = await engineer.engine.snapshots.create("web", CreateSnapshot(name="a"))
    assert "not held still for long enough" in await engineer.failed(operation)
    assert engineer.engine.snapshots.list("web") == () and sets(engineer) == []


async def test_cancelling_a_snapshot_lets_the_machine_go_on(engineer: Engineer) -> None:
    await engineer.launch("web")
    operation = await engineer.engine.snapshots.create("web", CreateSnapshot(name="a"))
    engineer.engine.cancel(operation.id)
    ended = await engineer.engine.wait(operation.id)
    assert ended.status in (OperationStatus.CANCELLED, OperationStatus.SUCCEEDED)
    driver = engineer.engine._services.architectures.driver("fake")
    assert isinstance(driver, FakeDriver)
    machine = driver.host.find_uuid(engineer.engine.machine("web").uuid)
    assert machine is not None and not machine.is_frozen
    assert len(sets(engineer)) == len(engineer.engine.snapshots.list("web"))
