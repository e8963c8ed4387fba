"""The engine on a real store and pool, with the fake driver: every verb, its refusals, and what an observer sees."""

from __future__ import annotations

import asyncio
import os
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from engine_rig import Collected, Engineer, add_tiny_template, engineer_at, machine_request, new_engine

from triarch.errors import (
    Busy,
    Damaged,
    DriverUnavailable,
    Exhausted,
    Exists,
    InUse,
    Invalid,
    NotFound,
    Unsupported,
    WrongState,
)
from triarch.model.driver import ExecRequest, Stream
from triarch.model.instance import instance_at
from triarch.model.machine import CreateMachine, RenameMachine, SetMachine, StopMachine, SwitchMachine
from triarch.model.network import Forward
from triarch.model.operation import Operation
from triarch.model.settings import Settings
from triarch.model.state import State
from triarch.storage.directory import DirectoryPool
from triarch.store.sqlite import SqliteStore


@pytest.fixture
async def web(tmp_path: Path) -> AsyncIterator[Engineer]:
    """An engine with one running machine 'web'."""
    async with engineer_at(tmp_path) as engineer:
        await engineer.launch("web")
        yield engineer


async def test_a_life_from_launch_to_delete(web: Engineer) -> None:
    engine = web.engine
    view = engine.machine("web")
    assert (view.state, view.desired, view.architecture) == (State.RUNNING, State.RUNNING, "fake")
    await web.done(await engine.stop("web", StopMachine()))
    assert engine.machine("web").state is State.STOPPED
    await web.done(await engine.start("web"))
    await web.done(await engine.restart("web", StopMachine()))
    assert engine.machine("web").state is State.RUNNING
    await web.done(await engine.kill("web"))
    stopped = engine.machine("web")
    assert (stopped.state, stopped.last_exit and stopped.last_exit.code) == (State.STOPPED, 137)
    await web.done(await engine.delete("web"))
    assert engine.machines() == ()
    assert list((Path(engine.instance.state_dir) / "pool/deltas").iterdir()) == []


async def test_pause_and_resume(web: Engineer) -> None:
    await web.done(await web.engine.pause("web"))
    assert web.engine.machine("web").state is State.PAUSED
    with pytest.raises(WrongState, match="cannot stop machine 'web': it is paused; stop needs running"):
        await web.engine.stop("web", StopMachine())
    await web.done(await web.engine.resume("web"))
    assert web.engine.machine("web").state is State.RUNNING


async def test_switch_keeps_the_delta(web: Engineer) -> None:
    engine = web.engine
    delta = Path(engine.instance.state_dir) / "pool/deltas" / f"{engine.machine('web').uuid}.raw"
    before = delta.stat().st_ino
    await web.done(await engine.switch("web", SwitchMachine(architecture="other")))
    view = engine.machine("web")
    assert (view.architecture, view.state, delta.stat().st_ino) == ("other", State.RUNNING, before)
    await web.done(await engine.switch("web", SwitchMachine(architecture="fake")))
    assert engine.machine("web").architecture == "fake"


async def test_a_switch_whose_start_fails_goes_back_to_where_it_was(web: Engineer) -> None:
    engine = web.engine
    await web.launch("bad", other__fail_start="no such device")
    message = await web.failed(await engine.switch("bad", SwitchMachine(architecture="other")))
    assert "no such device" in message
    view = engine.machine("bad")
    assert (view.architecture, view.state, view.desired) == ("fake", State.RUNNING, State.RUNNING)
    far_end = Collected()
    await engine.terminals.exec("bad", ExecRequest(command=("echo", "alive")), far_end)
    assert far_end.output[Stream.STDOUT] == b"alive\n"
    await web.done(await engine.stop("bad", StopMachine()))


async def test_switches_that_cannot_be_are_refused_and_a_check_changes_nothing(web: Engineer) -> None:
    engine = web.engine
    with pytest.raises(Invalid, match="already under architecture 'fake'"):
        await engine.switch("web", SwitchMachine(architecture="fake"))
    with pytest.raises(Invalid, match="unknown architecture 'vmware'"):
        await engine.switch("web", SwitchMachine(architecture="vmware"))
    assert await engine.switch("web", SwitchMachine(architecture="other", check=True)) is None
    assert engine.machine("web").architecture == "fake"


async def test_rename(web: Engineer) -> None:
    engine = web.engine
    with pytest.raises(WrongState, match="rename needs failed or stopped"):
        await engine.rename("web", RenameMachine(name="www"))
    await web.done(await engine.stop("web", StopMachine()))
    await web.launch("taken", start=False)
    with pytest.raises(Exists, match="machine 'taken' exists already"):
        await engine.rename("web", RenameMachine(name="taken"))
    await web.done(await engine.rename("web", RenameMachine(name="www")))
    assert [view.name for view in engine.machines()] == ["taken", "www"]


async def test_a_failed_launch_leaves_nothing(web: Engineer) -> None:
    engine = web.engine
    message = await web.failed(await engine.create(machine_request("bad", fake__fail_start="no such device")))
    assert "no such device" in message
    assert [view.name for view in engine.machines()] == ["web"]
    deltas = Path(engine.instance.state_dir) / "pool/deltas"
    assert [path.stem for path in deltas.iterdir()] == [engine.machine("web").uuid]


async def test_a_guest_that_does_not_stop_keeps_running_unless_forced(web: Engineer) -> None:
    await web.launch("deaf", fake__ignore_stop="1")
    message = await web.failed(await web.engine.stop("deaf", StopMachine(timeout_seconds=0.2)))
    assert "deaf" in message
    view = web.engine.machine("deaf")
    assert (view.state, view.desired) == (State.RUNNING, State.RUNNING)
    await web.done(await web.engine.stop("deaf", StopMachine(timeout_seconds=0.2, force=True)))
    assert web.engine.machine("deaf").state is State.STOPPED


async def test_a_machine_that_ends_by_itself_is_seen(web: Engineer) -> None:
    await web.launch("brief", "exit", "42")
    async with asyncio.timeout(10):
        while web.engine.machine("brief").state is State.RUNNING:
            await asyncio.sleep(0.01)
    await web.idle()
    ended = web.engine.machine("brief").last_exit
    assert ended is not None and ended.code == 42


async def test_an_ephemeral_machine_is_deleted_when_it_stops(web: Engineer) -> None:
    request = machine_request("brief", "sleep", "0.2")
    request = CreateMachine(**{**{f: getattr(request, f) for f in request.__struct_fields__}, "ephemeral": True})
    await web.done(await web.engine.create(request))
    async with asyncio.timeout(10):
        while "brief" in [view.name for view in web.engine.machines()]:
            await asyncio.sleep(0.01)


async def test_refusals_name_the_object_and_what_was_needed(web: Engineer) -> None:
    engine = web.engine
    with pytest.raises(Exists, match="machine 'web' exists already"):
        await engine.create(machine_request("web"))
    with pytest.raises(Invalid, match="illegal machine name 'Web_1': it needs 1 to 63 characters"):
        await engine.create(machine_request("Web_1"))
    with pytest.raises(NotFound, match="there is no template 'tine', did you mean 'tiny'"):
        await engine.create(CreateMachine(name="x", template="tine"))
    with pytest.raises(NotFound, match="template 'tiny' has no level 9: its newest is 1"):
        await engine.create(CreateMachine(name="x", template="tiny@9"))
    with pytest.raises(NotFound, match="there is no machine 'wep', did you mean 'web'"):
        engine.machine("wep")
    with pytest.raises(WrongState, match="cannot start machine 'web': it is running; start needs failed or stopped"):
        await engine.start("web")
    with pytest.raises(WrongState, match="cannot delete machine 'web': it is running"):
        await engine.delete("web")
    with pytest.raises(InUse, match="template 'tiny' is in use by 'web'"):
        await engine.delete_template("tiny")
    with pytest.raises(Exists, match="template 'tiny' exists already"):
        await engine.import_template("tiny", Path("/nonexistent"))
    with pytest.raises(Unsupported, match="network 'none' has none, networks of kind nat"):
        await engine.create(
            CreateMachine(
                name="x",
                template="tiny",
                settings=Settings(network="none", forwards=(Forward(host_port=1, machine_port=1),)),
            )
        )
    assert [view.name for view in engine.machines()] == ["web"]


async def test_a_template_is_in_use_by_its_name_and_not_by_its_tree(web: Engineer, tmp_path: Path) -> None:
    for name in ("one", "two"):
        archive = tmp_path / f"{name}.tar"
        with tarfile.open(archive, "w") as tar:
            tar.addfile(tarfile.TarInfo("./etc"))
        await web.done(await web.engine.import_template(name, archive))
    one, two = web.engine.template("one"), web.engine.template("two")
    assert one.digest == two.digest
    await web.done(await web.engine.create(msgspec.structs.replace(machine_request("user"), template="one")))
    await web.done(await web.engine.delete_template("two"))
    with pytest.raises(InUse, match="template 'one' is in use by 'user'"):
        await web.engine.delete_template("one")
    layer = DirectoryPool("default", Path(web.engine.instance.state_dir) / "pool").verify_layer(one.layers[0])
    assert layer.exists()


async def test_machines_made_at_once_share_no_name_and_no_address(tmp_path: Path) -> None:
    async with engineer_at(tmp_path) as engineer:
        network = "nat" if os.geteuid() == 0 else "none"
        request = msgspec.structs.replace(
            machine_request("x", start=False), name=None, settings=Settings(network=network)
        )
        operations = await asyncio.gather(*(engineer.engine.create(request) for _ in range(60)))
        for operation in operations:
            await engineer.done(operation)
        views = engineer.engine.machines()
        assert len(views) == 60
        assert len({view.address for view in views}) == (60 if network == "nat" else 1)


async def test_a_record_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    instance = instance_at(tmp_path)
    store = SqliteStore(tmp_path / "triarch.db")
    await store.open()
    await store.put("machines/1234", b'{"name": "from-the-future"}')
    await store.close()
    with pytest.raises(Damaged, match="record 'machines/1234' in the store cannot be read: object missing"):
        await new_engine(instance)


async def test_more_than_the_host_has_is_refused(web: Engineer) -> None:
    with pytest.raises(Exhausted, match=r"asks for 1\.0 TiB of memory: this host has"):
        await web.engine.create(
            CreateMachine(name="big", template="tiny", settings=Settings(network="none", memory_bytes=1 << 40))
        )
    with pytest.raises(Exhausted, match="asks for 4096 cpus: this host has"):
        await web.engine.create(
            CreateMachine(name="big", template="tiny", settings=Settings(network="none", cpus=4096))
        )


async def test_two_clients_on_one_machine(web: Engineer) -> None:
    await web.launch("slow", start=False, fake__start_seconds="1")
    operation = await web.engine.start("slow")
    with pytest.raises(Busy, match=rf"machine 'slow' is busy: operation {operation.id} \(start\) holds it"):
        await web.engine.delete("slow")
    assert web.engine.machine("slow").operation == operation.id
    await web.done(operation)


async def test_cancelling_a_launch_removes_the_machine(web: Engineer) -> None:
    operation = await web.engine.create(machine_request("slow", fake__start_seconds="30"))
    async with asyncio.timeout(10):
        while web.engine.operation(operation.id).progress.step != "boot":
            await asyncio.sleep(0.01)
    web.engine.cancel(operation.id)
    ended = await web.engine.wait(operation.id, 10)
    assert ended.status == "cancelled"
    assert [view.name for view in web.engine.machines()] == ["web"]


async def test_exec_run_and_logs(web: Engineer) -> None:
    far_end = Collected()
    ended = await web.engine.terminals.exec("web", ExecRequest(command=("echo", "hello")), far_end)
    assert (ended.code, far_end.output[Stream.STDOUT]) == (0, b"hello\n")
    far_end = Collected()
    ended = await web.engine.run(machine_request("brief", "exit", "7"), far_end, None)
    assert ended.code == 7
    assert [view.name for view in web.engine.machines()] == ["web"]
    with pytest.raises(Invalid, match="needs a command"):
        await web.engine.terminals.exec("web", ExecRequest(command=()), far_end)


async def test_indexes_are_never_shared_even_by_concurrent_creates(web: Engineer) -> None:
    operations = await asyncio.gather(*(web.engine.create(machine_request(f"m{i}", start=False)) for i in range(20)))
    for operation in operations:
        await web.done(operation)
    store = web.engine._services.machines
    indexes = [kept.value.index for kept in store.all()]
    assert len(set(indexes)) == len(indexes) == 21


async def test_a_new_daemon_adopts_what_runs_and_records_what_ended_unseen(tmp_path: Path) -> None:
    instance = instance_at(tmp_path / "root")
    Path(instance.state_dir).mkdir()
    await add_tiny_template(instance, tmp_path)
    first = Engineer(await new_engine(instance))
    await first.launch("stays")
    await first.launch("goes", "sleep", "0.3")
    await first.engine.close()
    await asyncio.sleep(0.5)
    second = Engineer(await new_engine(instance))
    await second.idle()
    assert second.engine.machine("stays").state is State.RUNNING
    assert second.engine.machine("goes").state is State.STOPPED
    await second.bring_down()


async def test_after_a_reboot_nothing_runs_and_everything_starts_again(tmp_path: Path) -> None:
    import shutil

    instance = instance_at(tmp_path / "root")
    Path(instance.state_dir).mkdir()
    await add_tiny_template(instance, tmp_path)
    first = Engineer(await new_engine(instance))
    await first.launch("web")
    await first.engine.close()
    shutil.rmtree(instance.run_dir)
    second = Engineer(await new_engine(instance))
    await second.idle()
    view = second.engine.machine("web")
    assert view.state in (State.STOPPED, State.FAILED) and view.last_exit is not None
    assert "host restarted" in view.last_exit.reason
    await second.done(await second.engine.start("web"))
    await second.bring_down()


async def test_an_architecture_that_is_not_here_is_refused_with_its_reason(web: Engineer) -> None:
    class Missing(type(web.engine._services.architectures.driver("other"))):  # type: ignore[misc]
        async def probe(self) -> None:
            raise DriverUnavailable("this host has no such processor")

    web.engine._services.architectures._drivers["other"] = Missing(web.engine.instance)
    with pytest.raises(
        DriverUnavailable, match="architecture 'other' cannot run here: this host has no such processor"
    ):
        await web.engine.switch("web", SwitchMachine(architecture="other"))
    assert web.engine.machine("web").architecture == "fake"


async def test_a_machine_whose_disk_is_lost_is_told_so(web: Engineer) -> None:
    await web.launch("db", start=False)
    Path(web.engine._services.pool.delta_path(web.engine.machine("db").uuid)).unlink()
    for change in (
        web.engine.start("db"),
        web.engine.set("db", SetMachine(values={"disk": "20G"})),
    ):
        operation = await change
        assert isinstance(operation, Operation)
        assert "the disk is lost: there is no file" in await web.failed(operation)
