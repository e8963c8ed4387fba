"""Waiting for a machine's state or health."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from litestar import get
from litestar.params import Parameter

from triarch.daemon.problems import problems
from triarch.daemon.routes.machines import TAGS, Name
from triarch.daemon.routes.operations import WaitSeconds
from triarch.engine.engine import Engine
from triarch.model.machine import MachineView
from triarch.model.policy import Health
from triarch.model.state import State

Word = StrEnum("Word", [(word.name, word.value) for word in (*State, *Health)])  # type: ignore[misc]
Until = Annotated[
    list[Word], Parameter(query="until", min_items=1, description="States and healths, any of which ends the wait")
]


@get("/machines/{name:str}/wait", operation_id="wait_machine", tags=TAGS, responses=problems(404))
async def wait_machine(engine: Engine, name: Name, until: Until, wait_seconds: WaitSeconds = 0.0) -> MachineView:
    """The machine once its state or its health is one of `until`, or as it is after `wait_seconds`."""
    return await engine.wait_machine(name, frozenset(word.value for word in until), wait_seconds)


HANDLERS = (wait_machine,)
