"""Errors on the wire: every refusal is `application/problem+json`, and what went wrong inside stays in the log."""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

from litestar import Request, Response
from litestar.exceptions import HTTPException, ValidationException
from litestar.openapi import ResponseSpec

from triarch.engine.operations import problem_of
from triarch.errors import Error, Stale
from triarch.model.operation import Problem
from triarch.model.resources import format_size

log = logging.getLogger(__name__)

MAX_BODY_BYTES = 1 << 20
MEDIA_TYPE = "application/problem+json"
_CODES = {403: "denied", 404: "not-found", 504: "timed-out", 507: "exhausted"}
_MEANINGS = {
    400: "The request can never succeed as it stands",
    403: "Not allowed",
    404: "There is no such object",
    409: "The object is not in a state that allows this, or another operation holds it",
    412: "The object changed since the caller read it",
    413: "The body is too long",
    422: "This architecture or this host cannot do it",
    500: "It was tried and did not work",
    503: "Something that is needed is not there now",
    504: "It did not happen in time",
    507: "Disk, memory, addresses or ids ran out",
}


class PreconditionFailed(Stale):
    """`Stale` as If-Match has it: 412 and not 409."""

    status = 412


def check_etag(kind: str, name: str, etag: str, if_match: str | None, hint: str) -> None:
    """Raise 412 when an object is not what the caller saw (RFC 9110, 13.1.1)."""
    if if_match is None or if_match.strip() == "*":
        return
    if f'"{etag}"' not in (tag.strip() for tag in if_match.split(",")):
        raise PreconditionFailed(
            f"{kind} '{name}' changed since it was read: its ETag is \"{etag}\"", hint=hint, **{kind: name}
        )


def problems(*statuses: int) -> dict[int, ResponseSpec]:
    """The OpenAPI of a route's refusals: those it names, and those that any route can give."""
    return {
        status: ResponseSpec(
            data_container=Problem, generate_examples=False, description=_MEANINGS[status], media_type=MEDIA_TYPE
        )
        for status in sorted({*statuses, 400, 500})
    }


def _respond(problem: Problem, headers: dict[str, str] | None = None) -> Response[Problem]:
    return Response(problem, status_code=problem.status, media_type=MEDIA_TYPE, headers=headers)


def on_error(_: Request[Any, Any, Any], error: Error) -> Response[Problem]:
    return _respond(problem_of(error))


def on_invalid(_: Request[Any, Any, Any], error: ValidationException) -> Response[Problem]:
    """A body or parameter of the wrong shape: the message lists the fields."""
    faults = [_fault(item) for item in error.extra or () if isinstance(item, dict)]
    message = "invalid request: " + ("; ".join(faults) if faults else error.detail)
    return _respond(Problem(code="invalid", status=400, message=message))


def _fault(item: dict[str, Any]) -> str:
    key = str(item.get("key") or "").removeprefix("data.").removeprefix("data")
    text = _as_message(str(item.get("message", "is wrong")))
    return f"field '{key}': {text}" if key else text


def _as_message(sentence: str) -> str:
    """Frameworks start their sentences with a capital; messages of Triarch are one lower-case line. `JSON` stays."""
    return sentence if sentence[1:2].isupper() else sentence[:1].lower() + sentence[1:]


def on_http(request: Request[Any, Any, Any], error: HTTPException) -> Response[Problem]:
    """What the framework refuses by itself: unknown paths and methods, bodies that are no JSON or too long."""
    if error.status_code >= 500:
        return on_bug(request, error)
    # Not `request.url`: a target such as `*` is none.
    path = request.scope["path"]
    message = _as_message(error.detail or HTTPStatus(error.status_code).phrase)
    if error.status_code == 404:
        message = f"there is no path {path}"
    elif error.status_code == 405:
        message = f"{path} has no method {request.method}"
    elif error.status_code == 413:
        message = f"the body is too long: this daemon takes {format_size(MAX_BODY_BYTES)}"
    code = _CODES.get(error.status_code, "invalid")
    return _respond(Problem(code=code, status=error.status_code, message=message), dict(error.headers or {}))


def on_recursion(request: Request[Any, Any, Any], _: RecursionError) -> Response[Problem]:
    """Nothing here goes deep but decoding, and that as deep as the body wants."""
    log.warning("%s %s: the body is nested too deep", request.method, request.scope["path"])
    return _respond(Problem(code="invalid", status=400, message="invalid request: the body is nested too deep"))


def on_bug(request: Request[Any, Any, Any], error: Exception) -> Response[Problem]:
    log.error("%s %s failed", request.method, request.scope["path"], exc_info=error)
    return _respond(problem_of(error))
