"""Snapshots: look, take, rename, delete, restore, compare."""

from __future__ import annotations

from typing import Annotated

from litestar import Response, delete, get, post
from litestar.openapi import ResponseSpec
from litestar.params import Parameter

from triarch.daemon.problems import problems
from triarch.daemon.routes.machines import Name
from triarch.daemon.routes.operations import accepted, change
from triarch.engine.engine import Engine
from triarch.model.difference import Difference
from triarch.model.operation import Operation
from triarch.model.snapshot import SNAPSHOT_PATTERN, CreateSnapshot, RenameSnapshot, RestoreSnapshot, Snapshot

TAGS = ["snapshots"]
PATH = "/machines/{name:str}/snapshots"
CHANGE_PROBLEMS = (404, 409, 413, 422, 503, 507)
CHECKED = {204: ResponseSpec(data_container=None, description="The restore would be possible")}
SnapshotName = Annotated[str, Parameter(description="The snapshot's name", schema_extra={"pattern": SNAPSHOT_PATTERN})]

To = Annotated[
    str | None,
    Parameter(query="to", required=False, description="Another snapshot", schema_extra={"pattern": SNAPSHOT_PATTERN}),
]


@get(PATH, operation_id="list_snapshots", tags=TAGS, responses=problems(404), sync_to_thread=False)
def list_snapshots(engine: Engine, name: Name) -> tuple[Snapshot, ...]:
    """All snapshots of a machine, oldest first."""
    return engine.snapshots.list(name)


@get(f"{PATH}/{{snapshot:str}}", operation_id="get_snapshot", tags=TAGS, responses=problems(404), sync_to_thread=False)
def get_snapshot(engine: Engine, name: Name, snapshot: SnapshotName) -> Snapshot:
    """One snapshot."""
    return engine.snapshots.get(name, snapshot)


@change(post, PATH, "create_snapshot", TAGS, *CHANGE_PROBLEMS)
async def create_snapshot(engine: Engine, name: Name, data: CreateSnapshot) -> Response[Operation]:
    """Take a snapshot; the operation's result is its name. A running machine stands still for a moment."""
    return accepted(await engine.snapshots.create(name, data))


@change(delete, f"{PATH}/{{snapshot:str}}", "delete_snapshot", TAGS, 404, 409)
async def delete_snapshot(engine: Engine, name: Name, snapshot: SnapshotName) -> Response[Operation]:
    """Delete a snapshot."""
    return accepted(await engine.snapshots.delete(name, snapshot))


@change(post, f"{PATH}/{{snapshot:str}}/rename", "rename_snapshot", TAGS, 404, 409, 413)
async def rename_snapshot(
    engine: Engine, name: Name, snapshot: SnapshotName, data: RenameSnapshot
) -> Response[Operation]:
    """Give a snapshot another name."""
    return accepted(await engine.snapshots.rename(name, snapshot, data.name))


@change(post, "/machines/{name:str}/restore", "restore_machine", TAGS, 403, *CHANGE_PROBLEMS, also=CHECKED)
async def restore_machine(engine: Engine, name: Name, data: RestoreSnapshot) -> Response[Operation] | Response[None]:
    """Bring a machine back to a snapshot. With `check` nothing is done: 204 says that it would be possible."""
    operation = await engine.snapshots.restore(name, data)
    return Response(None, status_code=204) if operation is None else accepted(operation)


@get(f"{PATH}/{{snapshot:str}}/diff", operation_id="diff_snapshot", tags=TAGS, responses=problems(404, 409, 422, 507))
async def diff_snapshot(engine: Engine, name: Name, snapshot: SnapshotName, to: To = None) -> Difference:
    """What changed from this snapshot to another one, or to what the machine is now."""
    return await engine.snapshots.diff(name, snapshot, to)


HANDLERS = (
    list_snapshots,
    get_snapshot,
    create_snapshot,
    delete_snapshot,
    rename_snapshot,
    restore_machine,
    diff_snapshot,
)
