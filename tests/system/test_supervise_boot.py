"""The daemon dies while it starts what the host's boot is to start: the next one goes on, and nothing starts twice."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from crash_rig import CrashRig, Point

from triarch.client import Client
from triarch.engine.supervise import BOOT_KEY
from triarch.model.machine import CreateMachine
from triarch.model.settings import Settings
from triarch.model.state import State
from triarch.store.sqlite import SqliteStore
from triarch.testing.leaks import leaks

NAMES = ("db", "cache", "web")


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[CrashRig]:
    rig = CrashRig(tmp_path / "root", fake=True)
    rig.seed()
    rig.start()
    try:
        yield rig
    finally:
        rig.restart()
        rig.down()
    assert leaks(rig.instance) == ()


def forget_boot(rig: CrashRig) -> None:
    """What the store says after another boot of the host."""

    async def forget() -> None:
        store = SqliteStore(Path(rig.instance.state_dir) / "triarch.db")
        await store.open()
        await store.put(BOOT_KEY, b"an earlier boot")
        await store.close()

    asyncio.run(forget())


def create(client: Client) -> None:
    needs: tuple[str, ...] = ()
    for name in NAMES:
        settings = Settings(network="none", autostart=True, depends_on=needs)
        client.finish(client.create(CreateMachine(name=name, template="tiny", architecture="fake", settings=settings)))
        needs = (name,)


def until_running(client: Client) -> None:
    end = time.monotonic() + 30
    while any(view.state is not State.RUNNING or view.operation for view in client.machines()):
        assert time.monotonic() < end, client.machines()
        time.sleep(0.05)


@pytest.mark.parametrize("step", ["dependencies", "prepare", "boot", "running"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_boot_that_is_broken_off_is_finished(rig: CrashRig, step: str, when: str) -> None:
    with rig.client() as client:
        create(client)
    rig.stop()
    forget_boot(rig)
    rig.failpoint = str(Point("start", step, when)).replace("-", ":")
    rig.start()
    assert rig.died(30)
    rig.restart()
    with rig.client() as client:
        until_running(client)
        assert [view.restarts for view in client.machines()] == [0, 0, 0]
        started = {view.name: view.started_at for view in client.machines()}
        assert started["db"] < started["cache"] < started["web"]  # type: ignore[operator]
    rig.restart()
    with rig.client() as client:
        assert {view.name: view.started_at for view in client.machines()} == started


def test_without_a_boot_nothing_starts(rig: CrashRig) -> None:
    with rig.client() as client:
        create(client)
    rig.restart()
    with rig.client() as client:
        time.sleep(0.5)
        assert {view.state for view in client.machines()} == {State.STOPPED}
