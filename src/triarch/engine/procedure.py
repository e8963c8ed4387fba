"""Procedures: a change as named steps that a crash can interrupt anywhere.

Each step is journalled before it acts; every `do` and `undo` is idempotent, since after a crash nobody knows how far
the last one came. A procedure is rebuilt after a restart from its arguments alone, so those hold every choice (names,
uuids, the records before and after).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import msgspec

from triarch.engine.failpoint import failpoint
from triarch.engine.journal import Journal, JournalRecord
from triarch.errors import Error

Action = Callable[[], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Step:
    """`commits` marks the point of no return: a crash from here on is finished forward, before it undone."""

    name: str
    do: Action
    undo: Action | None = None
    commits: bool = False


class LetStand(Exception):
    """A step raises it to fail its operation with `error` and yet have nothing undone."""

    def __init__(self, error: Error) -> None:
        super().__init__(error.message)
        self.error = error


class Procedure(Protocol):
    """One verb on one object. `arguments` is a frozen struct; `steps` may be asked for again after a crash."""

    verb: ClassVar[str]

    @property
    def arguments(self) -> msgspec.Struct: ...

    @property
    def target(self) -> str: ...

    def steps(self) -> tuple[Step, ...]: ...

    @property
    def result(self) -> str | None: ...


def committed(steps: tuple[Step, ...], begun: tuple[str, ...]) -> bool:
    """Whether the commit point was journalled."""
    return any(step.commits and step.name in begun for step in steps)


async def execute(
    procedure: Procedure,
    record: JournalRecord,
    journal: Journal,
    entered: Callable[[str], None],
    abandoned: Callable[[], bool],
) -> None:
    """Do every step in order. A step that raises, or a cancellation, undoes those begun and raises again.

    Steps that were begun before a crash are done again. `entered` hears each step's name. When `abandoned` says so,
    nothing is undone: the next daemon finishes it.
    """
    steps = procedure.steps()
    try:
        for step in steps:
            record = await journal.begin(record, step.name)
            entered(step.name)
            failpoint(procedure.verb, step.name, "before")
            await step.do()
            failpoint(procedure.verb, step.name, "after")
    except LetStand as failure:
        raise failure.error from failure.__cause__
    except BaseException:
        if abandoned():
            raise
        # Undoing must run to its end even if the daemon is told to stop meanwhile.
        await asyncio.shield(asyncio.ensure_future(undo(steps, record.begun)))
        raise


async def undo(steps: tuple[Step, ...], begun: tuple[str, ...]) -> None:
    """Undo the begun steps in reverse. One that fails keeps no other from being undone; the first error is raised."""
    first: Exception | None = None
    for step in reversed(steps):
        if step.name in begun and step.undo is not None:
            try:
                await step.undo()
            except Exception as error:  # noqa: BLE001 - collected, raised below
                first = first or error
    if first is not None:
        raise first
