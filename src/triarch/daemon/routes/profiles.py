"""Profiles, and what is said of a single machine: look, set, delete."""

from __future__ import annotations

from typing import Annotated

from litestar import Response, delete, get, post, put
from litestar.datastructures import ResponseHeader
from litestar.openapi import ResponseSpec
from litestar.params import Parameter

from triarch.daemon.problems import check_etag, problems
from triarch.daemon.routes.machines import IfMatch, Name, check_fresh
from triarch.daemon.routes.operations import accepted, change
from triarch.engine.engine import Engine
from triarch.model.machine import SetMachine, SettingChange
from triarch.model.names import MACHINE_NAME_PATTERN
from triarch.model.operation import Operation
from triarch.model.settings import Profile, ProfileView, SetProfile

TAGS = ["profiles"]
CHANGE_PROBLEMS = (404, 409, 412, 413, 422, 503, 507)
CHECKED = {
    200: ResponseSpec(
        data_container=tuple[SettingChange, ...], description="What it would change", generate_examples=False
    )
}
ETAG = [ResponseHeader(name="ETag", description="For If-Match", documentation_only=True)]
ProfileName = Annotated[
    str, Parameter(description="The profile's name", schema_extra={"pattern": MACHINE_NAME_PATTERN})
]


@change(post, "/machines/{name:str}/set", "set_machine", ["machines"], *CHANGE_PROBLEMS, also=CHECKED)
async def set_machine(
    engine: Engine, name: Name, data: SetMachine, if_match: IfMatch = None
) -> Response[Operation] | Response[tuple[SettingChange, ...]]:
    """Change settings and profiles of a machine; the result says what takes a restart. With `check` nothing is done."""
    check_fresh(engine, name, if_match)
    answer = await engine.set(name, data)
    return accepted(answer) if isinstance(answer, Operation) else Response(answer, status_code=200)


@get("/profiles", operation_id="list_profiles", tags=TAGS, responses=problems(), sync_to_thread=False)
def list_profiles(engine: Engine) -> tuple[ProfileView, ...]:
    """All profiles, sorted by name."""
    return engine.profiles.all()


@change(post, "/profiles", "create_profile", TAGS, 409, 413)
async def create_profile(engine: Engine, data: Profile) -> Response[Operation]:
    """Make a profile."""
    return accepted(await engine.profiles.create(data))


@get(
    "/profiles/{name:str}",
    operation_id="get_profile",
    tags=TAGS,
    responses=problems(404),
    response_headers=ETAG,
    sync_to_thread=False,
)
def get_profile(engine: Engine, name: ProfileName) -> Response[ProfileView]:
    """One profile, the machines that have it, and its ETag."""
    view = engine.profiles.get(name)
    return Response(view, headers={"ETag": f'"{view.etag}"'})


@change(put, "/profiles/{name:str}", "replace_profile", TAGS, *CHANGE_PROBLEMS)
async def replace_profile(
    engine: Engine, name: ProfileName, data: Profile, if_match: IfMatch = None
) -> Response[Operation]:
    """Replace a profile as a whole, and apply it to its machines; the result has a line for each that changed."""
    _check_fresh_profile(engine, name, if_match)
    return accepted(await engine.profiles.replace(name, data))


@change(post, "/profiles/{name:str}/set", "set_profile", TAGS, *CHANGE_PROBLEMS)
async def set_profile(
    engine: Engine, name: ProfileName, data: SetProfile, if_match: IfMatch = None
) -> Response[Operation]:
    """Change some settings of a profile, and apply it to its machines."""
    _check_fresh_profile(engine, name, if_match)
    return accepted(await engine.profiles.set(name, data))


@change(delete, "/profiles/{name:str}", "delete_profile", TAGS, 404, 409, 412)
async def delete_profile(engine: Engine, name: ProfileName, if_match: IfMatch = None) -> Response[Operation]:
    """Delete a profile that no machine has."""
    _check_fresh_profile(engine, name, if_match)
    return accepted(await engine.profiles.delete(name))


def _check_fresh_profile(engine: Engine, name: str, if_match: str | None) -> None:
    check_etag("profile", name, engine.profiles.get(name).etag, if_match, f"triarch profile show {name}")


HANDLERS = (
    set_machine,
    list_profiles,
    create_profile,
    get_profile,
    replace_profile,
    set_profile,
    delete_profile,
)
