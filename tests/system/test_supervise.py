"""Restarts, health, order and boot, on the fake architecture."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
from engine_rig import Engineer, add_tiny_template, engineer_at, machine_request, new_engine

from triarch.engine import health, supervise
from triarch.errors import Denied, Invalid
from triarch.model.instance import instance_at
from triarch.model.machine import CreateMachine, MachineView, StopMachine
from triarch.model.network import Forward
from triarch.model.operation import OperationStatus
from triarch.model.policy import Health, HealthCheck, Probe, RestartPolicy
from triarch.model.settings import Settings
from triarch.model.state import State

PATIENCE_SECONDS = 20.0


@pytest.fixture(autouse=True)
def short_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "FIRST_DELAY_SECONDS", 0.1)
    monkeypatch.setattr(supervise, "MAX_DELAY_SECONDS", 0.4)
    monkeypatch.setattr(health, "FIRST_DELAY_SECONDS", 0.05)


@pytest.fixture
async def web(tmp_path: Path) -> AsyncIterator[Engineer]:
    async with engineer_at(tmp_path) as engineer:
        yield engineer


def request(
    name: str, *command: str, start: bool = True, environment: dict[str, str] | None = None, **settings: object
) -> CreateMachine:
    base = machine_request(name, *command, start=start)
    given: dict[str, object] = {"network": "none", "environment": environment or {}, **settings}
    return msgspec.structs.replace(base, settings=Settings(**given))  # type: ignore[arg-type]


async def until(engineer: Engineer, name: str, holds: Callable[[MachineView], bool]) -> MachineView:
    end = time.monotonic() + PATIENCE_SECONDS
    while not holds(view := engineer.engine.machine(name)):
        assert time.monotonic() < end, view
        await asyncio.sleep(0.02)
    return view


def running(view: MachineView) -> bool:
    return view.state is State.RUNNING and view.operation is None


@asynccontextmanager
async def listener(port: int, answer: bytes = b"") -> AsyncIterator[asyncio.Server]:
    """Stands for the machine behind its forwarded port: answers every connection with `answer`."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", port)
    try:
        yield server
    finally:
        server.close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# -- restarts


async def test_a_machine_that_fails_is_started_again_after_growing_delays(web: Engineer) -> None:
    events = web.engine.events()
    delays: list[str] = []

    async def collect() -> None:
        async for event in events:
            if event.kind == "machine-restarting":
                delays.append(str(event.fields["delay"]))

    task = asyncio.create_task(collect())
    await web.done(
        await web.engine.create(request("web", "sh", "-c", "sleep 0.02; exit 3", restart=RestartPolicy.ON_FAILURE))
    )
    view = await until(web, "web", lambda view: view.restarts >= 4)
    task.cancel()
    assert delays[:4] == ["0.1 s", "0.2 s", "0.4 s", "0.4 s"]
    assert view.desired is State.RUNNING


async def test_an_end_without_failure_rests_under_on_failure_and_not_under_always(web: Engineer) -> None:
    command = ("sh", "-c", "sleep 0.02; exit 0")
    await web.done(await web.engine.create(request("rests", *command, restart=RestartPolicy.ON_FAILURE)))
    await web.done(await web.engine.create(request("goes-on", *command, restart=RestartPolicy.ALWAYS)))
    await until(web, "goes-on", lambda view: view.restarts >= 2)
    view = await until(web, "rests", lambda view: view.desired is State.STOPPED)
    assert (view.state, view.restarts, view.next_start_at) == (State.STOPPED, 0, None)


async def test_a_reboot_inside_is_a_restart_under_any_policy(web: Engineer) -> None:
    command = ("sh", "-c", "sleep 0.02; exit 0")
    await web.done(await web.engine.create(request("web", *command, environment={"fake.exit-reason": "rebooted"})))
    await until(web, "web", lambda view: view.restarts >= 2)


@pytest.mark.parametrize("verb", ["stop", "kill"])
async def test_nothing_is_restarted_after_the_operators_stop_or_kill(web: Engineer, verb: str) -> None:
    await web.done(await web.engine.create(request("web", restart=RestartPolicy.ALWAYS)))
    asked = web.engine.stop("web", StopMachine()) if verb == "stop" else web.engine.kill("web")
    await web.done(await asked)
    await asyncio.sleep(0.5)
    view = web.engine.machine("web")
    assert (view.state, view.desired, view.next_start_at) == (State.STOPPED, State.STOPPED, None)


async def test_stop_calls_off_a_start_that_is_waited_for(web: Engineer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervise, "FIRST_DELAY_SECONDS", 30.0)
    monkeypatch.setattr(supervise, "MAX_DELAY_SECONDS", 30.0)
    await web.done(
        await web.engine.create(request("web", "sh", "-c", "sleep 0.02; exit 3", restart=RestartPolicy.ALWAYS))
    )
    view = await until(web, "web", lambda view: view.next_start_at is not None)
    assert view.state is State.STOPPED
    await web.done(await web.engine.stop("web", StopMachine()))
    view = web.engine.machine("web")
    assert (view.next_start_at, view.desired, view.last_exit and view.last_exit.code) == (None, State.STOPPED, 3)


async def test_what_ended_while_no_daemon_watched_is_restarted_by_the_next(tmp_path: Path) -> None:
    instance = instance_at(tmp_path / "root")
    Path(instance.state_dir).mkdir()
    await add_tiny_template(instance, tmp_path)
    first = Engineer(await new_engine(instance))
    command = ("sh", "-c", "sleep 0.3; exit 3")
    await first.done(await first.engine.create(request("again", *command, restart=RestartPolicy.ON_FAILURE)))
    await first.done(await first.engine.create(request("rests", *command)))
    await first.engine.close()
    await asyncio.sleep(0.4)
    second = Engineer(await new_engine(instance))
    try:
        await until(second, "again", lambda view: view.restarts >= 1)
        assert (await until(second, "rests", lambda view: view.desired is State.STOPPED)).restarts == 0
    finally:
        await second.bring_down()


async def test_a_start_that_fails_is_tried_again(web: Engineer) -> None:
    command = ("sh", "-c", "sleep 0.3; exit 1")
    await web.done(await web.engine.create(request("web", *command, restart=RestartPolicy.ALWAYS)))
    layer = next(Path(web.engine.instance.state_dir).glob("pool/layers/*.erofs"))
    hidden = layer.rename(layer.with_suffix(".hidden"))
    events = web.engine.events()
    async with asyncio.timeout(PATIENCE_SECONDS):
        async for event in events:
            if event.operation is not None and event.operation.status is OperationStatus.FAILED:
                break
    assert web.engine.machine("web").desired is State.RUNNING
    hidden.rename(layer)
    await until(web, "web", lambda view: view.restarts >= 1)


# -- health


def checked(name: str, check: HealthCheck, port: int | None = None, **settings: object) -> CreateMachine:
    if port is not None:
        settings |= {"network": "user", "forwards": (Forward(host_port=port, machine_port=80),)}
    return request(name, health=check, **settings)


QUICK = {"interval_seconds": 0.1, "timeout_seconds": 0.5, "grace_seconds": 0.0, "retries": 2}


async def test_a_command_that_succeeds_is_health_and_one_that_fails_is_not(web: Engineer) -> None:
    await web.done(await web.engine.create(checked("good", HealthCheck(command=("true",), **QUICK))))
    await web.done(await web.engine.create(checked("bad", HealthCheck(command=("false",), **QUICK))))
    assert (await web.engine.wait_machine("good", {"healthy"}, PATIENCE_SECONDS)).health is Health.HEALTHY
    assert (await web.engine.wait_machine("bad", {"unhealthy"}, PATIENCE_SECONDS)).health is Health.UNHEALTHY
    await web.done(await web.engine.stop("bad", StopMachine()))
    assert web.engine.machine("bad").health is None


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (("sleep", "1000"), "no answer within 0.5 s"),
        (("seq", "1", "300000"), "more than 1 MiB"),
        (("sh", "-c", "echo because >&2; exit 4"), "exit code 4: because"),
    ],
)
async def test_a_check_that_hangs_or_floods_is_cut_short(web: Engineer, command: tuple[str, ...], reason: str) -> None:
    events = web.engine.events()
    await web.done(await web.engine.create(checked("web", HealthCheck(command=command, **QUICK))))
    async with asyncio.timeout(PATIENCE_SECONDS):
        async for event in events:
            if event.kind == "machine-unhealthy":
                break
    assert reason in str(event.fields["reason"])


async def test_tcp_follows_what_listens(web: Engineer) -> None:
    port, check = free_port(), HealthCheck(probe=Probe.TCP, port=80, **QUICK)
    await web.done(await web.engine.create(checked("web", check, port)))
    async with listener(port) as server:
        await web.engine.wait_machine("web", {"healthy"}, PATIENCE_SECONDS)
        server.close()
        await server.wait_closed()
        view = await web.engine.wait_machine("web", {"unhealthy"}, PATIENCE_SECONDS)
        assert view.health is Health.UNHEALTHY


@pytest.mark.parametrize(
    ("answer", "word"),
    [
        (b"HTTP/1.1 204 No Content\r\n\r\n", "healthy"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\n\r\n", "healthy"),
        (b"HTTP/1.1 503 Busy\r\n\r\n", "unhealthy"),
        (b"SSH-2.0-x\r\n", "unhealthy"),
        (b"x" * 100_000, "unhealthy"),
    ],
)
async def test_http_wants_a_status_below_400_and_follows_nothing(web: Engineer, answer: bytes, word: str) -> None:
    port = free_port()
    check = HealthCheck(probe=Probe.HTTP, port=80, path="/healthz", **{**QUICK, "grace_seconds": 2.0})
    await web.done(await web.engine.create(checked("web", check, port)))
    async with listener(port, answer):
        view = await web.engine.wait_machine("web", {"healthy", "unhealthy"}, PATIENCE_SECONDS)
        assert view.health is Health(word)


async def test_an_unhealthy_machine_is_restarted_if_its_check_says_so(web: Engineer) -> None:
    check = HealthCheck(command=("false",), restart=True, **QUICK)
    await web.done(await web.engine.create(checked("web", check)))
    began = web.engine.machine("web").started_at
    view = await until(web, "web", lambda view: view.restarts >= 2 and running(view))
    assert began is not None and view.started_at is not None and view.started_at > began


async def test_bad_answers_in_the_grace_do_not_count(web: Engineer) -> None:
    check = msgspec.structs.replace(HealthCheck(command=("false",), **QUICK), grace_seconds=60.0)
    await web.done(await web.engine.create(checked("web", check)))
    await asyncio.sleep(0.6)
    assert web.engine.machine("web").health is Health.STARTING


async def test_two_hundred_checked_machines_cost_the_engine_little(web: Engineer) -> None:
    check = HealthCheck(command=("true",), interval_seconds=1.0, timeout_seconds=5.0, grace_seconds=0.0)
    for index in range(200):
        await web.done(await web.engine.create(checked(f"m{index}", check)))
    await until(web, "m199", lambda view: view.health is Health.HEALTHY)
    used = time.process_time()
    await asyncio.sleep(2.0)
    # 400 questions; the fake driver's own feed is read meanwhile too.
    assert time.process_time() - used < 1.8
    assert all(view.health is Health.HEALTHY for view in web.engine.machines())


# -- order


async def test_start_brings_up_what_a_machine_depends_on_and_waits_for_its_health(web: Engineer) -> None:
    port, check = free_port(), HealthCheck(probe=Probe.TCP, port=80, **{**QUICK, "grace_seconds": 30.0})
    await web.done(await web.engine.create(msgspec.structs.replace(checked("db", check, port), start=False)))
    await web.done(await web.engine.create(request("web", start=False, depends_on=("db",))))
    operation = await web.engine.start("web")
    await until(web, "db", running)
    await asyncio.sleep(0.3)
    assert web.engine.machine("web").state is State.STOPPED
    assert web.engine.operation(operation.id).progress.step == "dependencies"
    async with listener(port):
        await web.done(operation)
    assert (web.engine.machine("web").state, web.engine.machine("db").health) == (State.RUNNING, Health.HEALTHY)


async def test_a_start_names_the_dependency_that_did_not_come_up(web: Engineer) -> None:
    await web.done(await web.engine.create(request("web", start=False, depends_on=("db",))))
    assert await web.failed(await web.engine.start("web")) == "machine 'web' depends on 'db': there is no such machine"
    await web.done(await web.engine.create(request("db", start=False, environment={"fake.fail-start": "no disk"})))
    assert "depends on 'db': it did not start: cannot start machine 'db': no disk" in await web.failed(
        await web.engine.start("web")
    )
    assert web.engine.machine("web").state is State.STOPPED


async def test_what_could_not_start_again_is_not_stopped(web: Engineer) -> None:
    await web.done(await web.engine.create(request("db")))
    await web.done(await web.engine.create(request("web", depends_on=("db",))))
    await web.done(await web.engine.delete("db", force=True))
    assert "there is no such machine" in await web.failed(await web.engine.restart("web", StopMachine()))
    assert web.engine.machine("web").state is State.RUNNING


async def test_a_cycle_is_refused_when_it_would_come_to_be(web: Engineer) -> None:
    await web.done(await web.engine.create(request("web", start=False, depends_on=("db",))))
    with pytest.raises(Invalid, match="would depend on itself: "):
        await web.engine.create(request("db", start=False, depends_on=("web",)))


async def test_down_stops_dependents_first(web: Engineer) -> None:
    for name, needs in (("db", ()), ("cache", ("db",)), ("web", ("cache", "db"))):
        await web.done(await web.engine.create(request(name, depends_on=needs)))
    events, stopped = web.engine.events(), []
    await web.done(await web.engine.down())
    async for event in events:
        if event.kind == "machine-stopped":
            stopped.append(event.target)
        if len(stopped) == 3:
            break
    assert stopped == ["machine/web", "machine/cache", "machine/db"]


# -- boot


async def rebooted(engineer: Engineer, monkeypatch: pytest.MonkeyPatch, boot: str) -> Engineer:
    """What a power cut leaves to the daemon of the next boot."""
    import shutil

    instance = engineer.engine.instance
    await engineer.engine.close()
    shutil.rmtree(instance.run_dir)
    monkeypatch.setattr(supervise, "boot_id", lambda: boot)
    return Engineer(await new_engine(instance))


async def test_the_hosts_boot_starts_what_ran_and_what_is_to_start_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    instance = instance_at(tmp_path / "root")
    Path(instance.state_dir).mkdir()
    await add_tiny_template(instance, tmp_path)
    first = Engineer(await new_engine(instance))
    await first.done(await first.engine.create(request("web", depends_on=("db",), start=False)))
    await first.done(await first.engine.create(request("db")))
    await first.done(await first.engine.start("web"))
    await first.done(await first.engine.create(request("always", start=False, autostart=True)))
    await first.done(await first.engine.create(request("stopped", start=True)))
    await first.done(await first.engine.stop("stopped", StopMachine()))
    await first.done(await first.engine.create(request("job", "sh", "-c", "exit 0")))
    await until(first, "job", lambda view: view.desired is State.STOPPED)
    second = await rebooted(first, monkeypatch, "another boot")
    try:
        for name in ("web", "db", "always"):
            await until(second, name, running)
        started = {name: second.engine.machine(name).started_at for name in ("web", "db")}
        assert started["db"] < started["web"]  # type: ignore[operator]
        assert {second.engine.machine(name).state for name in ("stopped", "job")} == {State.STOPPED}
        assert {view.restarts for view in second.engine.machines()} == {0}
    finally:
        await second.bring_down()


async def test_a_restart_of_the_daemon_is_no_boot(tmp_path: Path) -> None:
    instance = instance_at(tmp_path / "root")
    Path(instance.state_dir).mkdir()
    await add_tiny_template(instance, tmp_path)
    first = Engineer(await new_engine(instance))
    await first.done(await first.engine.create(request("web", start=False, autostart=True)))
    await first.engine.close()
    second = Engineer(await new_engine(instance))
    try:
        await asyncio.sleep(0.3)
        assert second.engine.machine("web").state is State.STOPPED
    finally:
        await second.bring_down()


async def test_down_until_boot_lets_them_start_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    instance = instance_at(tmp_path / "root")
    Path(instance.state_dir).mkdir()
    await add_tiny_template(instance, tmp_path)
    first = Engineer(await new_engine(instance))
    await first.launch("web")
    await first.done(await first.engine.down(until_boot=True))
    second = await rebooted(first, monkeypatch, "another boot")
    try:
        await until(second, "web", running)
    finally:
        await second.bring_down()


# -- protection


async def test_a_protected_machine_is_not_deleted_even_with_force(web: Engineer) -> None:
    await web.done(await web.engine.create(request("web", protected=True)))
    for force in (False, True):
        with pytest.raises(Denied, match="it is protected") as caught:
            await web.engine.delete("web", force=force)
        assert caught.value.hint == "triarch set web protected=false"
    operation = await web.engine.kill("web")
    assert (await web.engine.wait(operation.id, 30)).status is OperationStatus.SUCCEEDED
