"""What machines use: now, lately, and in sum."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from litestar import get
from litestar.params import Parameter

from triarch.daemon.problems import problems
from triarch.daemon.routes.machines import Name
from triarch.engine.engine import Engine
from triarch.model.usage import MachineUsage, UsageHistory, UsageRow

TAGS = ["usage"]
Begin = Annotated[
    datetime | None, Parameter(query="from", required=False, description="First hour; 30 days before the end if absent")
]
End = Annotated[datetime | None, Parameter(query="to", required=False, description="Last hour; now if absent")]
By = Annotated[str, Parameter(description="`machine`, or `label:KEY` for a row per value of a label")]
Selected = Annotated[str | None, Parameter(required=False, description="Only this machine, though it may be gone")]
Label = Annotated[str | None, Parameter(required=False, description="Only machines with this label: `KEY=VALUE`")]


@get("/usage", operation_id="list_usage", tags=TAGS, responses=problems())
async def list_usage(engine: Engine) -> tuple[MachineUsage, ...]:
    """All machines and what they use now, sorted by name: one request for a table of all."""
    return await engine.usages.all()


@get("/usage/account", operation_id="account_usage", tags=TAGS, responses=problems(400))
async def account_usage(
    engine: Engine,
    begin: Begin = None,
    end: End = None,
    by: By = "machine",
    machine: Selected = None,
    label: Label = None,
) -> tuple[UsageRow, ...]:
    """What was used over time, in whole hours; machines that are gone are there too."""
    return await engine.usages.account(begin, end, by, machine, label)


@get(
    "/machines/{name:str}/usage/history",
    operation_id="machine_usage_history",
    tags=TAGS,
    responses=problems(404),
    sync_to_thread=False,
)
def machine_usage_history(engine: Engine, name: Name) -> UsageHistory:
    """The last ten minutes of a machine, from memory."""
    return engine.usages.history(name)


HANDLERS = (list_usage, account_usage, machine_usage_history)
