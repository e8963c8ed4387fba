"""Errors of the daemon, raised here as the classes they were there."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from triarch.errors import Error, Failed
from triarch.model.operation import Problem


def _tree(cls: type[Error]) -> Iterator[type[Error]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _tree(child)


def error_of(problem: Problem) -> Error:
    """The error that the daemon raised; a code that this client does not know becomes the nearest class it does."""
    known = {cls.code: cls for cls in _tree(Error)}
    cls = known.get(problem.code, Failed if problem.status >= 500 else Error)
    # Not through the constructor: some classes make their message from facts that did not travel.
    error = cls.__new__(cls)
    Error.__init__(error, problem.message, hint=problem.hint, **problem.fields)
    error.status = problem.status
    return error


def error_of_response(status: int, body: bytes) -> Error:
    """The error in the body of a response that is none of ours only when something else listens on the socket."""
    try:
        return error_of(msgspec.json.decode(body, type=Problem))
    except msgspec.MsgspecError:
        return Failed(f"the daemon answered with status {status} and no explanation", hint="triarch version")
