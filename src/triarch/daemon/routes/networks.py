"""Networks and their access lists: look, create, edit, delete."""

from __future__ import annotations

from typing import Annotated

from litestar import Response, delete, get, post
from litestar.params import Parameter

from triarch.daemon.problems import problems
from triarch.daemon.routes.operations import accepted, change
from triarch.engine.engine import Engine
from triarch.model.names import MACHINE_NAME_PATTERN, check_network_name
from triarch.model.network import AddAclRule, CreateNetwork, EditNetwork, NetworkView
from triarch.model.operation import Operation

TAGS = ["networks"]
CHANGE_PROBLEMS = (404, 409, 413, 422, 503)
Name = Annotated[str, Parameter(description="The network's name", schema_extra={"pattern": MACHINE_NAME_PATTERN})]
Position = Annotated[int, Parameter(ge=1, description="Which rule, from 1")]


@get("/networks", operation_id="list_networks", tags=TAGS, responses=problems(), sync_to_thread=False)
def list_networks(engine: Engine) -> tuple[NetworkView, ...]:
    """All networks, sorted by name; the built-in one once a machine needed it."""
    return engine.networks.list()


@change(post, "/networks", "create_network", TAGS, *CHANGE_PROBLEMS, 507)
async def create_network(engine: Engine, data: CreateNetwork) -> Response[Operation]:
    """Make a network. Ranges that are not given are chosen free of the host's own."""
    return accepted(await engine.networks.create(data))


@get("/networks/{name:str}", operation_id="get_network", tags=TAGS, responses=problems(404), sync_to_thread=False)
def get_network(engine: Engine, name: Name) -> NetworkView:
    """One network and the machines on it."""
    return engine.networks.get(check_network_name(name))


@change(post, "/networks/{name:str}/edit", "edit_network", TAGS, *CHANGE_PROBLEMS)
async def edit_network(engine: Engine, name: Name, data: EditNetwork) -> Response[Operation]:
    """Change what is given; machines that run are held to it at once."""
    return accepted(await engine.networks.edit(check_network_name(name), data))


@change(delete, "/networks/{name:str}", "delete_network", TAGS, 404, 409)
async def delete_network(engine: Engine, name: Name) -> Response[Operation]:
    """Delete a network that no machine is on."""
    return accepted(await engine.networks.delete(check_network_name(name)))


@change(post, "/networks/{name:str}/acl", "add_acl_rule", TAGS, *CHANGE_PROBLEMS)
async def add_acl_rule(engine: Engine, name: Name, data: AddAclRule) -> Response[Operation]:
    """Add a rule to a network's access list, at the end or at a position."""
    return accepted(await engine.networks.add_rule(check_network_name(name), data))


@change(delete, "/networks/{name:str}/acl/{position:int}", "remove_acl_rule", TAGS, 404, 409, 422, 503)
async def remove_acl_rule(engine: Engine, name: Name, position: Position) -> Response[Operation]:
    """Remove one rule of a network's access list."""
    return accepted(await engine.networks.remove_rule(check_network_name(name), position))


HANDLERS = (
    list_networks,
    create_network,
    get_network,
    edit_network,
    delete_network,
    add_acl_rule,
    remove_acl_rule,
)
