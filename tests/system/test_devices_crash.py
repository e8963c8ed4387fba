"""SIGKILL of the daemon before and after each step of plugging in or out: finished or undone, nothing leaked."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from crash_rig import CrashRig, Point, Walk, request, settled

from triarch.client import Client
from triarch.engine.device_procedures import DEVICE_PROCEDURES, DeviceArguments
from triarch.engine.network_records import Claims
from triarch.engine.records import MachineRecords
from triarch.engine.services import Services
from triarch.errors import Error
from triarch.model.device import AddDevice, VolumeDevice
from triarch.model.machine import IdRange, Machine
from triarch.model.state import State
from triarch.model.template import Init, TemplateRef
from triarch.store.memory import MemoryStore

WALK = Walk(
    template="app",
    first="fake",
    second=None,
    network="none",
    sleep=("sleep", "infinity"),
    brief=("true",),
    patience_seconds=20,
)
VOLUME = VolumeDevice(path="/data", size_bytes=64 << 20)
ADD = AddDevice(name="data", device=VOLUME)


def points() -> list[Point]:
    machine = Machine(
        name="web",
        uuid="",
        index=1,
        template=TemplateRef(name="t", level=1, digest=""),
        architecture="fake",
        init=Init.APP,
        ids=IdRange(base=0),
        created_at=datetime.now(UTC),
    )
    arguments = DeviceArguments(machine=machine, after=machine, name="data", device=VOLUME, live=True, purge=True)
    services = cast(Services, SimpleNamespace(claims=Claims(MachineRecords(MemoryStore()))))
    return [
        Point(procedure.verb, step.name, when)
        for procedure in DEVICE_PROCEDURES
        for step in procedure(services, arguments).steps()
        for when in ("before", "after")
    ]


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CrashRig]:
    with CrashRig(tmp_path_factory.mktemp("crash"), fake=True) as rig:
        yield rig


def plugged(rig: CrashRig, uuid: str) -> bool:
    """What the fake host has in the machine, whatever anybody says."""
    return '"data"' in Path(rig.instance.machine_run_dir(uuid), "fake.json").read_text()


def act(client: Client, point: Point) -> None:
    try:
        if point.verb == "attach":
            client.wait(client.devices.add("web", ADD))
        else:
            client.wait(client.devices.remove("web", "data", purge=True))
    except (Error, OSError):
        return


@pytest.mark.parametrize("point", points(), ids=str)
def test_a_kill_of_the_daemon_is_finished_or_undone(rig: CrashRig, point: Point) -> None:
    rig.restart(point)
    with rig.client() as client:
        client.finish(client.create(request(WALK, "web", WALK.sleep, start=True)))
        uuid = client.machine("web").uuid
        if point.verb == "detach":
            client.finish(client.devices.add("web", ADD))
        act(client, point)
    assert rig.died(WALK.patience_seconds)

    rig.restart()
    with rig.client() as client:
        settled(client, WALK.patience_seconds)
        volume = Path(rig.instance.state_dir) / f"pool/volumes/{uuid}/data.raw"
        there = bool(client.machine("web").devices)
        assert (volume.exists(), plugged(rig, uuid)) == (there, there)
        assert client.machine("web").state is State.RUNNING
        # Whatever came of it, it can be asked for again.
        if there:
            client.finish(client.devices.remove("web", "data", purge=True))
        client.finish(client.devices.add("web", ADD))
        assert plugged(rig, uuid)
        client.finish(client.delete("web", force=True))
        assert not volume.parent.exists()
