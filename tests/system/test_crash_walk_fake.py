"""The crash walk of the engine itself: every journalled step, with the fake driver, a real daemon, store and pool."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from crash_rig import CrashRig, Point, Walk, act, arrange, check_consistent, points, request, settled

from triarch.model.state import State

WALK = Walk(
    template="app",
    first="fake",
    second=None,
    network="none",
    sleep=("sleep", "infinity"),
    brief=("sh", "-c", "sleep 0.3; exit 3"),
    patience_seconds=20,
)
POINTS = points(switch=False)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CrashRig]:
    with CrashRig(tmp_path_factory.mktemp("crash"), fake=True) as rig:
        with rig.client() as client:
            client.finish(client.create(request(WALK, "bystander", WALK.sleep, start=True)))
        yield rig


def test_the_walk_covers_every_step() -> None:
    print(f"the crash walk covers {len(POINTS)} points")
    assert {point.verb for point in POINTS} >= {"create", "launch", "start", "stop", "kill", "delete", "run", "settle"}


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_a_kill_of_the_daemon_is_finished_or_undone(rig: CrashRig, point: Point) -> None:
    rig.restart(point)
    with rig.client() as client:
        since = client.machine("bystander").started_at
        arrange(client, WALK, point.verb)
        act(client, WALK, point.verb)
    assert rig.died(WALK.patience_seconds)

    rig.restart()
    with rig.client() as client:
        settled(client, WALK.patience_seconds)
        bystander = client.machine("bystander")
        assert (bystander.state, bystander.started_at) == (State.RUNNING, since)
        assert client.execute("bystander", "echo", "alive").stdout == b"alive\n"
        check_consistent(client, rig, WALK)
