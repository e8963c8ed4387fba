"""`set` on containers that run: limits seen inside, all or nothing, and across kills of the daemon."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pytest
from container_rig import archive_of, busybox_tree, skip_without_busybox
from crash_rig import CrashRig, Point, real_daemon, settled

from triarch.client import Client
from triarch.errors import Error, Exhausted
from triarch.model.machine import CreateMachine, SetMachine
from triarch.model.settings import Profile, SetProfile, Settings


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CrashRig]:
    skip_without_busybox()
    directory = tmp_path_factory.mktemp("set")
    busybox_tree(directory / "tree")
    (directory / "tree/bin/df").symlink_to("busybox")
    with real_daemon(directory / "root") as rig:
        with rig.client() as client:
            client.finish(client.import_template("tiny", archive_of(directory / "tree")))
        yield rig


@pytest.fixture
def client(rig: CrashRig) -> Iterator[Client]:
    with rig.client() as client:
        launch(client, "web")
        yield client
        for view in client.machines():
            client.finish(client.delete(view.name, force=True))


def launch(client: Client, name: str, *profiles: str) -> None:
    request = CreateMachine(
        template="tiny",
        name=name,
        architecture="container",
        command=("sleep", "100000"),
        profiles=profiles,
        settings=Settings(network="none"),
        start=True,
    )
    client.finish(client.create(request))


def change(client: Client, name: str = "web", **values: str) -> str:
    return client.finish(client.set(name, SetMachine(values=values))).result or ""


def limit_bytes(client: Client, name: str = "web") -> int | None:
    return client.usage(name).memory_limit_bytes


def disk_blocks(client: Client) -> int:
    return int(client.execute("web", "df", "-k", "/").stdout.decode().splitlines()[-1].split()[1])


def test_limits_and_the_disk_change_while_it_runs(client: Client) -> None:
    assert change(client, memory="64M", pids="50") == "memory: 64M; pids: 50"
    assert limit_bytes(client) == 64 << 20
    assert client.machine("web").state == "running"
    before = disk_blocks(client)
    told = change(client, disk="12G")
    if "CAP_SYS_RESOURCE" in told:
        # This host lets no mounted filesystem grow.
        assert "disk: 12G, takes effect at the next start" in told
        client.finish(client.kill("web"))
        client.finish(client.start("web"))
    else:
        assert told == "disk: 12G"
    assert disk_blocks(client) > before * 1.1
    assert change(client, memory="none") == "memory: none"
    assert limit_bytes(client) is None or (limit_bytes(client) or 0) > 1 << 30


def test_what_the_host_has_not_changes_nothing(client: Client) -> None:
    change(client, memory="64M")
    with pytest.raises(Exhausted):
        change(client, memory="32M", cpus="4096")
    assert limit_bytes(client) == 64 << 20


def test_a_profile_changes_all_its_machines(client: Client) -> None:
    client.finish(client.profiles.create(Profile(name="small", settings=Settings(memory_bytes=64 << 20))))
    for name in ("a", "b"):
        launch(client, name, "small")
    done = client.finish(client.profiles.set("small", SetProfile(values={"memory": "96M"})))
    assert done.result == "a: memory: 96M\nb: memory: 96M"
    assert [limit_bytes(client, name) for name in ("a", "b")] == [96 << 20] * 2
    for name in ("a", "b"):
        client.finish(client.delete(name, force=True))
    client.finish(client.profiles.delete("small"))


POINTS = [
    Point(verb, step, when)
    for verb, step in (
        ("set", "limits"),
        ("set", "disk"),
        ("set", "record"),
        ("set-profile", "store"),
        ("set-profile", "machines"),
    )
    for when in ("before", "after")
]


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_a_kill_of_the_daemon_leaves_record_and_machine_in_step(rig: CrashRig, point: Point) -> None:
    """Whatever the record says afterwards is what the machine has."""
    with rig.client() as client:
        client.finish(client.profiles.create(Profile(name="small", settings=Settings(memory_bytes=64 << 20))))
        launch(client, "web", "small")
    rig.restart(point)
    with rig.client() as client, contextlib.suppress(Error, OSError):
        if point.verb == "set":
            change(client, memory="128M", disk="11G")
        else:
            client.finish(client.profiles.set("small", SetProfile(values={"memory": "128M"})))
    assert rig.died(60)
    rig.restart()
    with rig.client() as client:
        settled(client, 60)
        end = time.monotonic() + 10
        while point.verb == "set-profile" and time.monotonic() < end:
            said = client.profiles.get("small").settings.memory_bytes
            if client.machine("web").resources.memory_bytes == said and client.machine("web").operation is None:
                break
            time.sleep(0.05)
        view = client.machine("web")
        assert view.state == "running"
        assert limit_bytes(client) == view.resources.memory_bytes
        assert view.resources.memory_bytes in (64 << 20, 128 << 20)
        if point.verb == "set-profile":
            said = client.profiles.get("small").settings.memory_bytes
            assert said == view.resources.memory_bytes
        # The disk may have grown; the record can always catch up.
        assert "disk: 11G" in change(client, disk="11G") or view.resources.disk_bytes == 11 << 30
        client.finish(client.delete("web", force=True))
        client.finish(client.profiles.delete("small"))
