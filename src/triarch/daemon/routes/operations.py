"""Operations: look, wait, cancel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, TypeVar

from litestar import Response, delete, get
from litestar.datastructures import ResponseHeader
from litestar.openapi import ResponseSpec
from litestar.params import Parameter

from triarch.daemon.problems import problems
from triarch.engine.engine import Engine
from triarch.model.operation import Operation

MAX_WAIT_SECONDS = 600

WaitSeconds = Annotated[
    float,
    Parameter(
        query="wait_seconds", ge=0, le=MAX_WAIT_SECONDS, description="Answer when it has ended, or after this long"
    ),
]


T = TypeVar("T")

LOCATION = (ResponseHeader(name="Location", description="The operation's address", documentation_only=True),)


def change(
    method: Callable[..., T],
    path: str,
    operation_id: str,
    tags: Sequence[str],
    *refusals: int,
    also: Mapping[int, ResponseSpec] | None = None,
) -> T:
    """The route of a change, which answers 202 and an operation: `method` is Litestar's `post`, `put` or `delete`.

    `refusals` are the statuses of its problems, `also` what else it answers.
    """
    return method(
        path,
        operation_id=operation_id,
        tags=list(tags),
        status_code=202,
        responses={**problems(*refusals), **(also or {})},
        response_headers=LOCATION,
    )


def accepted(operation: Operation) -> Response[Operation]:
    """202: the operation runs, and Location says where it is seen."""
    return Response(operation, status_code=202, headers={"Location": f"/1/operations/{operation.id}"})


@get("/operations", operation_id="list_operations", tags=["operations"], responses=problems(), sync_to_thread=False)
def list_operations(engine: Engine) -> tuple[Operation, ...]:
    """Those that run, and the last ones that ended."""
    return engine.operations()


@get("/operations/{operation_id:str}", operation_id="get_operation", tags=["operations"], responses=problems(404))
async def get_operation(engine: Engine, operation_id: str, wait_seconds: WaitSeconds = 0.0) -> Operation:
    """One operation, after waiting for its end if asked to."""
    if wait_seconds:
        return await engine.wait(operation_id, wait_seconds)
    return engine.operation(operation_id)


@change(delete, "/operations/{operation_id:str}", "cancel_operation", ["operations"], 404, 409)
async def cancel_operation(engine: Engine, operation_id: str) -> Response[Operation]:
    """Ask it to stop and undo; it has ended when its status says so."""
    return accepted(engine.cancel(operation_id))


HANDLERS = (list_operations, get_operation, cancel_operation)
