"""The crash walk on the real thing: containers, switches to a VM, bridge, loop devices, namespaces, control groups."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from container_rig import archive_of, busybox_tree, skip_without_busybox
from crash_rig import CrashRig, Point, Walk, act, arrange, check_consistent, points, real_daemon, request, settled

from triarch.client import Client
from triarch.model.instance import Instance
from triarch.model.state import State
from triarch.testing.leaks import leaks

PATIENT_SLEEP = ("sh", "-c", "trap 'exit 0' TERM; touch /tmp/ready; while :; do sleep 1000 & wait $!; done")
WALK = Walk(
    template="tiny",
    first="container",
    second="hosted",
    network="nat",
    sleep=PATIENT_SLEEP,
    brief=("sh", "-c", "sleep 0.3; exit 3"),
    ready=("test", "-e", "/tmp/ready"),
    patience_seconds=90,
)
POINTS = points(switch=True)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CrashRig]:
    skip_without_busybox()
    directory = tmp_path_factory.mktemp("crash")
    busybox_tree(directory / "tree")
    with real_daemon(directory / "root") as rig:
        with rig.client() as client:
            client.finish(client.import_template("tiny", archive_of(directory / "tree")))
            client.finish(client.create(request(WALK, "bystander", WALK.sleep, start=True)))
        yield rig


def namespace(client: Client) -> bytes:
    """Names the run of the bystander: a machine that was started again has another."""
    return client.execute("bystander", "readlink", "/proc/1/ns/pid").stdout


def host(instance: Instance) -> set[str]:
    """What the instance has on the host, without the numbers of processes that come with a new daemon."""
    lines = leaks(instance)
    return {line for line in lines if not line.startswith("process")} | {
        line.split(maxsplit=2)[2] for line in lines if line.startswith("process")
    }


def until_same(instance: Instance, expected: set[str]) -> None:
    """Namespaces, and the interfaces in them, are torn down by the kernel a little later."""
    end = time.monotonic() + 10
    while host(instance) != expected:
        assert time.monotonic() < end, host(instance) ^ expected
        time.sleep(0.1)


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_a_kill_of_the_daemon_is_finished_or_undone(rig: CrashRig, point: Point) -> None:
    rig.restart(point)
    before = host(rig.instance)
    with rig.client() as client:
        run = namespace(client)
        arrange(client, WALK, point.verb)
        act(client, WALK, point.verb)
    assert rig.died(WALK.patience_seconds), f"the daemon never came to {point}"

    rig.restart()
    with rig.client() as client:
        settled(client, WALK.patience_seconds)
        assert client.machine("bystander").state is State.RUNNING
        assert namespace(client) == run
        check_consistent(client, rig, WALK)
    until_same(rig.instance, before)


def test_the_walk_covers_every_step() -> None:
    print(f"the crash walk covers {len(POINTS)} points")
    assert {point.verb for point in POINTS} >= {"launch", "start", "stop", "kill", "switch", "delete", "run", "settle"}
