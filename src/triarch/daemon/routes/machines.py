"""Machines: look, create, change."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated

from litestar import Response, delete, get, post
from litestar.datastructures import ResponseHeader
from litestar.openapi import ResponseSpec
from litestar.params import Parameter
from litestar.response import Stream

from triarch.daemon.problems import check_etag, problems
from triarch.daemon.routes.operations import accepted, change
from triarch.engine.engine import Engine
from triarch.engine.logs import Beginning
from triarch.model.driver import Usage
from triarch.model.machine import CreateMachine, MachineView, RenameMachine, StopMachine, SwitchMachine
from triarch.model.moment import parse_moment
from triarch.model.names import MACHINE_NAME_PATTERN, check_machine_name
from triarch.model.operation import Operation

Name = Annotated[str, Parameter(description="The machine's name", schema_extra={"pattern": MACHINE_NAME_PATTERN})]
IfMatch = Annotated[
    str | None,
    Parameter(header="If-Match", required=False, description="Refuse unless this is still the machine's ETag"),
]
Since = Annotated[
    str | None,
    Parameter(description="Only what was written since: `10m` ago, or a date and time (to a second)", required=False),
]
Tail = Annotated[
    int | None, Parameter(description="No more than this many of the lines that were kept", ge=0, required=False)
]
TAGS = ["machines"]
CHANGE_PROBLEMS = (404, 409, 412, 413, 422, 503)
CHECKED = {204: ResponseSpec(data_container=None, description="The switch would be possible")}


def _change(verb: str, responses: Mapping[int, ResponseSpec] | None = None) -> post:
    """The route of a verb on one machine, which answers 202 and an operation; `responses` are what else it answers."""
    return change(post, f"/machines/{{name:str}}/{verb}", f"{verb}_machine", TAGS, *CHANGE_PROBLEMS, also=responses)


def check_fresh(engine: Engine, name: str, if_match: str | None) -> None:
    """Raise 412 when the machine is not what the caller saw."""
    view = engine.machine(check_machine_name(name))
    check_etag("machine", name, view.etag, if_match, f"triarch info {name}")


@get("/machines", operation_id="list_machines", tags=TAGS, responses=problems(), sync_to_thread=False)
def list_machines(engine: Engine) -> tuple[MachineView, ...]:
    """All machines, sorted by name; served from memory."""
    return engine.machines()


@change(post, "/machines", "create_machine", TAGS, 404, 409, 413, 422, 503, 507)
async def create_machine(engine: Engine, data: CreateMachine) -> Response[Operation]:
    """Create a machine, and start it with `start`."""
    return accepted(await engine.create(data))


@get(
    "/machines/{name:str}",
    operation_id="get_machine",
    tags=TAGS,
    responses=problems(404),
    response_headers=[ResponseHeader(name="ETag", description="For If-Match", documentation_only=True)],
    sync_to_thread=False,
)
def get_machine(engine: Engine, name: Name) -> Response[MachineView]:
    """One machine and its ETag."""
    view = engine.machine(check_machine_name(name))
    return Response(view, headers={"ETag": f'"{view.etag}"'})


@change(delete, "/machines/{name:str}", "delete_machine", TAGS, 403, *CHANGE_PROBLEMS)
async def delete_machine(
    engine: Engine, name: Name, if_match: IfMatch = None, force: bool = False
) -> Response[Operation]:
    """Delete a stopped machine and its delta; with `force` one that runs too, or that others depend on."""
    check_fresh(engine, name, if_match)
    return accepted(await engine.delete(name, force=force))


@_change("start")
async def start_machine(engine: Engine, name: Name, if_match: IfMatch = None) -> Response[Operation]:
    """Start a stopped or failed machine."""
    check_fresh(engine, name, if_match)
    return accepted(await engine.start(name))


@_change("stop")
async def stop_machine(engine: Engine, name: Name, data: StopMachine, if_match: IfMatch = None) -> Response[Operation]:
    """Ask the machine to end, and with `force` kill it when it takes longer than the timeout."""
    check_fresh(engine, name, if_match)
    return accepted(await engine.stop(name, data))


@_change("restart")
async def restart_machine(
    engine: Engine, name: Name, data: StopMachine, if_match: IfMatch = None
) -> Response[Operation]:
    """Stop, then start."""
    check_fresh(engine, name, if_match)
    return accepted(await engine.restart(name, data))


@_change("kill")
async def kill_machine(engine: Engine, name: Name, if_match: IfMatch = None) -> Response[Operation]:
    """End the machine now, without its consent."""
    check_fresh(engine, name, if_match)
    return accepted(await engine.kill(name))


@_change("pause")
async def pause_machine(engine: Engine, name: Name, if_match: IfMatch = None) -> Response[Operation]:
    """Freeze the machine: it keeps its memory and does nothing."""
    check_fresh(engine, name, if_match)
    return accepted(await engine.pause(name))


@_change("resume")
async def resume_machine(engine: Engine, name: Name, if_match: IfMatch = None) -> Response[Operation]:
    """Let a paused machine go on."""
    check_fresh(engine, name, if_match)
    return accepted(await engine.resume(name))


@_change("rename")
async def rename_machine(
    engine: Engine, name: Name, data: RenameMachine, if_match: IfMatch = None
) -> Response[Operation]:
    """Give a stopped machine another name."""
    check_fresh(engine, name, if_match)
    return accepted(await engine.rename(name, data))


@_change("switch", CHECKED)
async def switch_machine(
    engine: Engine, name: Name, data: SwitchMachine, if_match: IfMatch = None
) -> Response[Operation] | Response[None]:
    """Run the machine under another architecture. With `check` nothing is done: 204 says that it would be possible."""
    check_fresh(engine, name, if_match)
    operation = await engine.switch(name, data)
    return Response(None, status_code=204) if operation is None else accepted(operation)


@get("/machines/{name:str}/usage", operation_id="machine_usage", tags=TAGS, responses=problems(404, 409, 422))
async def machine_usage(engine: Engine, name: Name) -> Usage:
    """What a running machine uses now."""
    return await engine.usage(name)


@get(
    "/machines/{name:str}/logs",
    operation_id="machine_logs",
    tags=TAGS,
    media_type="text/plain",
    responses=problems(400, 404),
)
async def machine_logs(
    engine: Engine, name: Name, follow: bool = False, since: Since = None, tail: Tail = None
) -> Stream:
    """The console output that was kept; with `follow` also what comes, until the machine stops."""
    since_seconds = None if since is None else parse_moment(since, datetime.now(UTC)).timestamp()
    beginning = Beginning(since_seconds=since_seconds, tail_lines=tail)
    return Stream(engine.terminals.logs(check_machine_name(name), beginning, follow=follow), media_type="text/plain")


HANDLERS = (
    list_machines,
    create_machine,
    get_machine,
    delete_machine,
    start_machine,
    stop_machine,
    restart_machine,
    kill_machine,
    pause_machine,
    resume_machine,
    rename_machine,
    switch_machine,
    machine_usage,
    machine_logs,
)
