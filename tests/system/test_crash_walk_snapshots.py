"""The crash walk of snapshots, copies and backups: SIGKILL at every step leaves nothing half-done."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest
from crash_rig import CrashRig, Point, Walk, _any_machine, check_consistent, request, settled

from triarch.client import Client
from triarch.drivers.fake.host import FakeHost
from triarch.engine.backup_procedures import Export, ExportArguments, ImportArguments, ImportBackup
from triarch.engine.copies import Copy, CopyArguments
from triarch.engine.services import Services
from triarch.engine.snapshot_procedures import SNAPSHOT_PROCEDURES, SnapshotArguments
from triarch.errors import Error
from triarch.model.snapshot import CopyMachine, CreateSnapshot, ImportMachine, RestoreSnapshot, Snapshot
from triarch.model.state import State

WALK = Walk(
    template="app",
    first="fake",
    second=None,
    network="none",
    sleep=("sleep", "infinity"),
    brief=(),
    patience_seconds=20,
)


def _points() -> list[Point]:
    machine = _any_machine()
    snapshot = Snapshot(id="", name="a", machine=machine, created_at=datetime.now(UTC))
    services = cast(Services, None)
    ids: Any = {"staged": "", "aside": ""}
    procedures: list[Any] = [
        kind(services, SnapshotArguments(machine=machine, snapshot=snapshot)) for kind in SNAPSHOT_PROCEDURES
    ]
    procedures.append(Copy(services, CopyArguments(machine=machine, source=machine, start=True, **ids)))
    procedures.append(Export(services, ExportArguments(machine=machine, backup="", staged="")))
    arguments = ImportArguments(machine=machine, backup="", old_name="", renew=True, start=True, workspace="", **ids)
    procedures.append(ImportBackup(services, arguments))
    return [
        Point(procedure.verb, step.name, when)
        for procedure in procedures
        for step in procedure.steps()
        for when in ("before", "after")
    ]


POINTS = _points()


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CrashRig]:
    with CrashRig(tmp_path_factory.mktemp("crash"), fake=True) as rig:
        yield rig


def act(client: Client, verb: str, backup: Path) -> None:
    """Ask for the verb. The daemon may die before it answers."""
    try:
        client.wait(_ask(client, verb, backup))
    except (Error, OSError):
        return


def _ask(client: Client, verb: str, backup: Path) -> Any:
    match verb:
        case "snapshot":
            return client.snapshots.create("web")
        case "delete-snapshot":
            return client.snapshots.delete("web", "a")
        case "rename-snapshot":
            return client.snapshots.rename("web", "a", "b")
        case "restore":
            return client.snapshots.restore("web", RestoreSnapshot(snapshot="a"))
        case "copy":
            return client.backups.copy("web", CopyMachine(name="www", start=True))
        case "export":
            return client.backups.export("web")
        case _:
            return client.backups.import_(client.backups.upload(backup), ImportMachine(name="www", start=True))


@pytest.fixture(scope="module")
def backup(rig: CrashRig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a machine like 'web'."""
    path = tmp_path_factory.mktemp("backup") / "web.triarch"
    rig.restart()
    with rig.client() as client:
        client.finish(client.create(request(WALK, "other", WALK.sleep, start=False)))
        client.backups.download(client.finish(client.backups.export("other")).result or "", path)
    return path


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_a_kill_of_the_daemon_is_finished_or_undone(rig: CrashRig, backup: Path, point: Point) -> None:
    rig.restart(point)
    with rig.client() as client:
        client.finish(client.create(request(WALK, "web", WALK.sleep, start=True)))
        if point.verb not in ("snapshot", "copy", "export", "import-machine"):
            # Taken by a daemon that does not die of it: the failpoint names another verb.
            client.finish(client.snapshots.create("web", CreateSnapshot(name="a")))
        act(client, point.verb, backup)
    assert rig.died(WALK.patience_seconds)

    rig.restart()
    with rig.client() as client:
        settled(client, WALK.patience_seconds)
        web = client.machine("web")
        assert web.state is State.RUNNING
        frozen = FakeHost(rig.instance).find_uuid(web.uuid)
        assert frozen is not None and not frozen.is_frozen
        recorded = {each.id for view in client.machines() for each in client.snapshots.list(view.name)}
        sets = Path(rig.instance.state_dir) / "pool/sets"
        assert {path.name for path in sets.iterdir()} == recorded
        check_consistent(client, rig, WALK)
        assert not any(sets.iterdir())
