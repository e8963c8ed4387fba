"""The promise behind every verb: wherever a procedure is interrupted, it is afterwards either done or undone."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import ClassVar

import msgspec
import pytest

from triarch.engine.events import EventBus
from triarch.engine.journal import Journal, JournalRecord
from triarch.engine.operations import Operations
from triarch.engine.procedure import Step
from triarch.errors import Busy, Conflict, Failed
from triarch.model.operation import Operation, OperationStatus, Progress
from triarch.store.memory import MemoryStore

STEPS = ("one", "two", "three", "four")
COMMIT = "three"


class Arguments(msgspec.Struct, frozen=True):
    name: str = "web"


class Ledger:
    """A world with four things that a procedure makes, and hooks to make a step fail or hang."""

    def __init__(self) -> None:
        self.made: set[str] = set()
        self.fail_at: str | None = None
        self.fail_undo_of: str | None = None
        self.hang_at: str | None = None
        self.hanging = asyncio.Event()

    async def make(self, name: str) -> None:
        if self.fail_at == name:
            raise Failed(f"no room for {name}")
        if self.hang_at == name:
            self.hanging.set()
            await asyncio.Event().wait()
        self.made.add(name)

    async def unmake(self, name: str) -> None:
        if self.fail_undo_of == name:
            raise Failed(f"cannot undo {name}")
        self.made.discard(name)


class Make:
    verb: ClassVar[str] = "make"
    target = "machine/web"
    result = "web"

    def __init__(self, ledger: Ledger) -> None:
        self.arguments = Arguments()
        self._ledger = ledger

    def steps(self) -> tuple[Step, ...]:
        return tuple(self._step(name) for name in STEPS)

    def _step(self, name: str) -> Step:
        async def do() -> None:
            await self._ledger.make(name)

        async def undo() -> None:
            await self._ledger.unmake(name)

        return Step(name, do, undo, commits=name == COMMIT)


class Rig:
    def __init__(self) -> None:
        self.store = MemoryStore()
        self.journal = Journal(self.store)
        self.ledger = Ledger()
        self.released: list[str] = []
        self.events = EventBus()
        self.operations = Operations(self.journal, self.events, self._released)

    async def _released(self, target: str) -> None:
        self.released.append(target)

    async def finish(self, operation: Operation) -> Operation:
        return await self.operations.wait(operation.id, 5)


@pytest.fixture
async def rig() -> Rig:
    made = Rig()
    await made.store.open()
    return made


async def test_success_leaves_no_journal_and_frees_the_target(rig: Rig) -> None:
    ended = await rig.finish(rig.operations.begin(Make(rig.ledger)))
    assert (ended.status, ended.result, ended.error) == (OperationStatus.SUCCEEDED, "web", None)
    assert rig.ledger.made == set(STEPS)
    assert await rig.journal.unfinished() == ()
    assert rig.operations.holder("machine/web") is None
    assert rig.released == ["machine/web"]


@pytest.mark.parametrize("step", STEPS)
async def test_a_failing_step_undoes_all_before_it(rig: Rig, step: str) -> None:
    rig.ledger.fail_at = step
    ended = await rig.finish(rig.operations.begin(Make(rig.ledger)))
    assert ended.status is OperationStatus.FAILED
    assert ended.error is not None and ended.error.message == f"no room for {step}"
    assert rig.ledger.made == set()
    assert await rig.journal.unfinished() == ()


async def test_an_undo_that_fails_does_not_keep_the_others_from_being_undone(rig: Rig) -> None:
    rig.ledger.fail_at, rig.ledger.fail_undo_of = "four", "two"
    await rig.finish(rig.operations.begin(Make(rig.ledger)))
    assert rig.ledger.made == {"two"}


@pytest.mark.parametrize("began", range(len(STEPS) + 1))
@pytest.mark.parametrize("last_acted", [False, True])
async def test_a_crash_anywhere_is_finished_or_undone(rig: Rig, began: int, last_acted: bool) -> None:
    """The journal says that `began` steps were begun; whether the last one acted nobody knows."""
    begun = STEPS[:began]
    rig.ledger.made = set(begun if last_acted else begun[:-1])
    operation = Operation(id="0123", verb="make", target="machine/web", created_at=datetime.now(UTC))
    record = JournalRecord(operation=operation, arguments=msgspec.Raw(b"{}"), begun=begun)
    await rig.store.put("journal/0123", msgspec.json.encode(record))

    (found,) = await rig.journal.unfinished()
    rig.operations.recover(found, Make(rig.ledger))
    ended = await rig.operations.wait("0123", 5)

    if COMMIT in begun:
        assert (ended.status, rig.ledger.made) == (OperationStatus.SUCCEEDED, set(STEPS))
    else:
        assert (ended.status, rig.ledger.made) == (OperationStatus.FAILED, set())
        assert ended.error is not None and "undone" in ended.error.message
    assert await rig.journal.unfinished() == ()


async def test_each_step_is_journalled_before_it_acts(rig: Rig) -> None:
    rig.ledger.hang_at = "two"
    operation = rig.operations.begin(Make(rig.ledger))
    await rig.ledger.hanging.wait()
    (record,) = await rig.journal.unfinished()
    assert record.begun == ("one", "two")
    assert rig.ledger.made == {"one"}
    rig.operations.cancel(operation.id)
    assert (await rig.finish(operation)).status is OperationStatus.CANCELLED


async def test_a_held_target_refuses_and_names_the_operation(rig: Rig) -> None:
    rig.ledger.hang_at = "one"
    operation = rig.operations.begin(Make(rig.ledger))
    with pytest.raises(Busy, match=rf"machine 'web' is busy: operation {operation.id} \(make\) holds it"):
        rig.operations.begin(Make(rig.ledger))
    await rig.ledger.hanging.wait()
    rig.operations.cancel(operation.id)
    await rig.finish(operation)


async def test_cancel_undoes_before_the_commit_point_and_is_refused_after_it(rig: Rig) -> None:
    rig.ledger.hang_at = "two"
    operation = rig.operations.begin(Make(rig.ledger))
    await rig.ledger.hanging.wait()
    assert rig.operations.cancel(operation.id).status is OperationStatus.CANCELLING
    ended = await rig.finish(operation)
    assert (ended.status, rig.ledger.made) == (OperationStatus.CANCELLED, set())
    with pytest.raises(Conflict, match="has ended"):
        rig.operations.cancel(operation.id)

    rig.ledger.hang_at, rig.ledger.hanging = "four", asyncio.Event()
    operation = rig.operations.begin(Make(rig.ledger))
    await rig.ledger.hanging.wait()
    with pytest.raises(Conflict, match="past the point"):
        rig.operations.cancel(operation.id)
    await rig.operations.close()


async def test_closing_undoes_what_it_can_and_leaves_the_rest_in_the_journal(rig: Rig) -> None:
    rig.ledger.hang_at = "four"
    rig.operations.begin(Make(rig.ledger))
    await rig.ledger.hanging.wait()
    await rig.operations.close()
    (record,) = await rig.journal.unfinished()
    assert record.begun == STEPS
    assert rig.ledger.made == {"one", "two", "three"}


async def test_events_tell_the_whole_story_in_order(rig: Rig) -> None:
    stream = rig.events.subscribe()
    await rig.finish(rig.operations.begin(Make(rig.ledger)))
    seen = [await anext(stream)]
    while seen[-1].kind != "operation-ended":
        seen.append(await anext(stream))
    assert [event.sequence for event in seen] == list(range(1, len(seen) + 1))
    assert seen[0].kind == "operation-created"
    shown = [e.operation.progress.step for e in seen if e.kind == "operation-updated" and e.operation is not None]
    assert shown == list(STEPS)


async def test_progress_of_one_step_is_not_a_flood(rig: Rig) -> None:
    rig.ledger.hang_at = "one"
    operation = rig.operations.begin(Make(rig.ledger))
    await rig.ledger.hanging.wait()
    stream = rig.events.subscribe()
    for percent in range(1000):
        rig.operations.report("machine/web", Progress(step="one", fraction=percent / 1000))
    rig.operations.cancel(operation.id)
    await rig.finish(operation)
    count = 0
    while (await anext(stream)).kind != "operation-ended":
        count += 1
    assert count < 20
    assert rig.operations.get(operation.id).progress.fraction == 0.999


async def test_what_is_shown_as_ended_holds_nothing_any_more(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    end = rig.journal.end

    async def end_slowly(operation_id: str) -> None:
        await asyncio.sleep(0.05)
        await end(operation_id)

    monkeypatch.setattr(rig.journal, "end", end_slowly)
    first = rig.operations.begin(Make(rig.ledger))
    while not rig.operations.get(first.id).status.ended:
        await asyncio.sleep(0.005)
    await rig.finish(rig.operations.begin(Make(rig.ledger)))


async def test_what_was_let_go_before_a_crash_stays_its_targets(rig: Rig) -> None:
    """A copy lets go of its original early; then something else had it, and the daemon died."""

    class Copy(Make):
        target = "machine/copy"
        holds = ("machine/web",)

    rig.ledger.hang_at = "four"
    for number, procedure in enumerate((Make(rig.ledger), Copy(rig.ledger))):
        operation = Operation(id=f"{number:04}", verb="make", target=procedure.target, created_at=datetime.now(UTC))
        record = JournalRecord(operation=operation, arguments=msgspec.Raw(b"{}"), begun=STEPS)
        rig.operations.recover(record, procedure)
    assert rig.operations.holder("machine/web") == "0000"
    await asyncio.sleep(0)
    await rig.operations.close()
