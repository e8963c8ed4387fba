"""Restarts and health of real machines, under both architectures, and across deaths of the daemon."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from container_rig import archive_of, busybox_tree, skip_without_busybox
from crash_rig import CrashRig, real_daemon

from triarch.client import Client
from triarch.errors import Error
from triarch.model.machine import CreateMachine, MachineView
from triarch.model.policy import Health, HealthCheck, Probe, RestartPolicy
from triarch.model.settings import Settings
from triarch.model.state import State
from triarch.model.template import Init

ARCHITECTURES = pytest.mark.parametrize("architecture", ["container", "hosted"])
PATIENCE_SECONDS = 120.0


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CrashRig]:
    skip_without_busybox()
    directory = tmp_path_factory.mktemp("supervised")
    tree = directory / "tree"
    busybox_tree(tree)
    for applet in ("httpd", "reboot"):
        (tree / "bin" / applet).unlink(missing_ok=True)
        (tree / "bin" / applet).symlink_to("busybox")
    with real_daemon(directory / "root") as rig:
        with rig.client() as client:
            client.finish(client.import_template("busy", archive_of(tree)))
        yield rig


@pytest.fixture
def client(rig: CrashRig) -> Iterator[Client]:
    with rig.client() as client:
        yield client
    with rig.client() as client:
        for view in client.machines():
            client.finish(client.delete(view.name, force=True))


def launch(client: Client, architecture: str, *command: str, network: str = "none", **settings: object) -> None:
    request = CreateMachine(
        template="busy",
        name="web",
        architecture=architecture,
        init=Init.APP if command else Init.SYSTEM,
        command=command,
        settings=Settings(network=network, **settings),  # type: ignore[arg-type]
        start=True,
    )
    client.finish(client.create(request))


def until(client: Client, holds: Callable[[MachineView], bool]) -> MachineView:
    end = time.monotonic() + PATIENCE_SECONDS
    while not holds(view := client.machine("web")):
        assert time.monotonic() < end, view
        time.sleep(0.1)
    return view


def checked(client: Client, word: str) -> None:
    view = client.wait_machine("web", word, wait_seconds=PATIENCE_SECONDS)
    assert view.health is Health(word), view


@ARCHITECTURES
def test_what_fails_is_started_again_and_stays_stopped_once_asked_to(client: Client, architecture: str) -> None:
    launch(client, architecture, "sh", "-c", "sleep 1; exit 3", restart=RestartPolicy.ON_FAILURE)
    until(client, lambda view: view.restarts >= 1 and view.state is State.RUNNING)
    until(client, lambda view: view.restarts >= 2 or view.next_start_at is not None)
    end = time.monotonic() + PATIENCE_SECONDS
    while client.machine("web").desired is not State.STOPPED:
        assert time.monotonic() < end
        try:
            client.finish(client.stop("web"))
        except Error:
            # It was just being started, or ended at this moment.
            time.sleep(0.1)
    time.sleep(2.5)
    view = client.machine("web")
    assert (view.state is State.RUNNING, view.next_start_at) == (False, None)


@ARCHITECTURES
def test_a_reboot_inside_is_a_restart(client: Client, architecture: str) -> None:
    launch(client, architecture)
    started = client.machine("web").started_at
    end = time.monotonic() + PATIENCE_SECONDS
    while client.execute("web", "true").exit.code != 0:
        assert time.monotonic() < end
        time.sleep(0.2)
    client.execute("web", "sh", "-c", "sync; reboot -f")
    view = until(client, lambda view: view.restarts == 1 and view.state is State.RUNNING)
    assert started is not None and view.started_at is not None and view.started_at > started


@ARCHITECTURES
def test_a_command_inside_says_whether_it_is_well(client: Client, architecture: str) -> None:
    check = HealthCheck(
        command=("test", "-e", "/tmp/well"), interval_seconds=0.5, timeout_seconds=20.0, grace_seconds=0.0, retries=2
    )
    launch(client, architecture, "sh", "-c", "touch /tmp/well; while true; do sleep 1; done", health=check)
    checked(client, "healthy")
    assert client.execute("web", "rm", "/tmp/well").exit.code == 0
    checked(client, "unhealthy")
    assert client.execute("web", "touch", "/tmp/well").exit.code == 0
    checked(client, "healthy")


@ARCHITECTURES
@pytest.mark.parametrize("probe", [Probe.TCP, Probe.HTTP])
def test_the_host_asks_for_a_port_of_the_machine(client: Client, architecture: str, probe: Probe) -> None:
    check = HealthCheck(
        probe=probe, port=80, path="/etc/passwd", interval_seconds=0.5, timeout_seconds=10.0, grace_seconds=60.0
    )
    try:
        launch(client, architecture, "httpd", "-f", "-p", "80", "-h", "/", network="nat", health=check)
    except Error as error:
        if error.code in ("unsupported", "unavailable", "driver-unavailable"):
            pytest.skip(error.message)
        raise
    checked(client, "healthy")


def test_a_check_that_hangs_in_the_guest_is_ended_and_leaves_nothing(client: Client) -> None:
    check = HealthCheck(command=("sleep", "1000"), interval_seconds=0.5, timeout_seconds=0.5, grace_seconds=0.0)
    launch(client, "container", "sleep", "infinity", health=check)
    checked(client, "unhealthy")
    time.sleep(1.5)
    seen = client.execute("web", "sh", "-c", "for p in /proc/[0-9]*; do tr '\\0' ' ' < $p/cmdline; echo; done").stdout
    # One may be asked at this moment; those before it are gone.
    assert seen.count(b"sleep 1000") <= 1, seen


def test_the_daemon_dies_and_the_next_one_restarts_what_ended_meanwhile(rig: CrashRig, client: Client) -> None:
    launch(client, "container", "sh", "-c", "sleep 2; exit 1", restart=RestartPolicy.ON_FAILURE)
    rig.stop(signal.SIGKILL)
    time.sleep(2.5)
    rig.start()
    with rig.client() as again:
        until(again, lambda view: view.restarts >= 1)


@pytest.mark.parametrize("step", ["ended", "tidy"])
def test_the_daemon_dies_while_it_notes_an_end_and_the_machine_is_started_again(
    rig: CrashRig, client: Client, step: str, tmp_path: Path
) -> None:
    from crash_rig import Point

    rig.restart(Point("settle", step, "after"))
    with rig.client() as first:
        launch(first, "container", "sh", "-c", "sleep 1; exit 1", restart=RestartPolicy.ON_FAILURE)
    assert rig.died(30)
    rig.restart()
    with rig.client() as again:
        until(again, lambda view: view.restarts >= 1)
