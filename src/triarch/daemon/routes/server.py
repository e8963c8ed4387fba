"""The daemon itself, its host, and its end."""

from __future__ import annotations

import os

from litestar import Response, get, post

import triarch
from triarch.daemon.problems import problems
from triarch.daemon.routes.operations import accepted, change
from triarch.engine.engine import Engine
from triarch.model.driver import Architecture
from triarch.model.operation import Operation
from triarch.model.request import Check
from triarch.model.server import ServerInfo


@get("/", operation_id="server_info", tags=["server"], responses=problems(), sync_to_thread=False)
def server_info(engine: Engine) -> ServerInfo:
    """Which daemon is this?"""
    instance = engine.instance
    return ServerInfo(version=triarch.__version__, tag=instance.tag, state_dir=instance.state_dir, pid=os.getpid())


@get("/architectures", operation_id="architectures", tags=["server"], responses=problems())
async def architectures(engine: Engine, refresh: bool = False) -> tuple[Architecture, ...]:
    """What machines can run as here; probed once, and again with `refresh`."""
    return await engine.architectures(refresh=refresh)


@get("/doctor", operation_id="doctor", tags=["server"], responses=problems())
async def doctor(engine: Engine) -> tuple[Check, ...]:
    """Check every prerequisite of every architecture."""
    return await engine.doctor()


@change(post, "/down", "down", ["server"], 409)
async def down(engine: Engine, until_boot: bool = False) -> Response[Operation]:
    """Stop every machine, clear the host, end the daemon; with `until_boot` they start again at the host's boot."""
    return accepted(await engine.down(until_boot=until_boot))


HANDLERS = (server_info, architectures, doctor, down)
