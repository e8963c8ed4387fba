"""Operations: who is changing what, one at a time per object, visible, cancellable, and recovered after a crash."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

import msgspec

from triarch.engine.events import EventBus
from triarch.engine.journal import Journal, JournalRecord
from triarch.engine.procedure import Procedure, committed, execute, undo
from triarch.errors import Busy, Cancelled, Conflict, Error, Failed, NotFound
from triarch.model.operation import Operation, OperationStatus, Problem, Progress

log = logging.getLogger(__name__)

MAX_ENDED_OPERATIONS = 1000
PROGRESS_INTERVAL_SECONDS = 0.1


def problem_of(error: BaseException) -> Problem:
    """An exception as the API shows it. Whatever is not ours is 'internal': its text is for the log only."""
    if isinstance(error, asyncio.CancelledError):
        error = Cancelled("the operation was cancelled and undone")
    if not isinstance(error, Error):
        return Problem(code="internal", status=500, message="internal error; the daemon's log has the details")
    return Problem.of(error)


@dataclass(slots=True)
class _Running:
    operation: Operation
    procedure: Procedure
    begun: tuple[str, ...] = ()
    task: asyncio.Task[None] | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    error: BaseException | None = None
    reported_at: float = 0.0
    abandoned: bool = False


class Operations:
    """All operations of this daemon: those that run and the last thousand that ended."""

    def __init__(self, journal: Journal, events: EventBus, released: Callable[[str], Awaitable[None]]) -> None:
        """`released` is awaited with the target after each operation let go of it."""
        self._journal = journal
        self._events = events
        self._released = released
        self._running: dict[str, _Running] = {}
        self._ended: dict[str, Operation] = {}
        self._holder: dict[str, str] = {}

    # -- looking

    def all(self) -> tuple[Operation, ...]:
        return (*self._ended.values(), *(running.operation for running in self._running.values()))

    def get(self, operation_id: str) -> Operation:
        if operation_id in self._running:
            return self._running[operation_id].operation
        if operation_id in self._ended:
            return self._ended[operation_id]
        raise NotFound(f"there is no operation '{operation_id}'", hint="triarch list")

    def holder(self, target: str) -> str | None:
        """The id of the operation that holds `target`."""
        return self._holder.get(target)

    def check_free(self, target: str) -> None:
        """Raise `Busy` that names the operation which holds `target`."""
        holder = self._holder.get(target)
        if holder is not None:
            kind, _, name = target.partition("/")
            verb = self._running[holder].operation.verb
            raise Busy(
                f"{kind} '{name}' is busy: operation {holder} ({verb}) holds it",
                hint=f"triarch wait {holder}",
                operation=holder,
            )

    # -- running

    def begin(self, procedure: Procedure) -> Operation:
        """Lock the procedure's target and run it in the background. Raises `Busy`."""
        for target in held_by(procedure):
            self.check_free(target)
        operation = Operation(
            id=secrets.token_hex(6), verb=procedure.verb, target=procedure.target, created_at=datetime.now(UTC)
        )
        self._launch(JournalRecord(operation=operation, arguments=_encode(procedure)), procedure, self._run)
        return operation

    def recover(self, record: JournalRecord, procedure: Procedure) -> None:
        """Finish or undo, in the background, what the last daemon left; its target is locked meanwhile."""
        self._launch(record, procedure, self._recover)

    def _launch(
        self,
        record: JournalRecord,
        procedure: Procedure,
        body: Callable[[_Running, JournalRecord], Awaitable[None]],
    ) -> None:
        running = _Running(operation=record.operation, procedure=procedure, begun=record.begun)
        self._running[record.operation.id] = running
        for target in held_by(procedure):
            # Only after a crash can two want the same: what one had let go of is its target's.
            if target == procedure.target or target not in self._holder:
                self._holder[target] = record.operation.id
        self._events.publish("operation-created", procedure.target, operation=running.operation)
        running.task = asyncio.create_task(self._supervise(running, body(running, record)), name=record.operation.id)

    async def _run(self, running: _Running, record: JournalRecord) -> None:
        def entered(step: str) -> None:
            running.begun = (*running.begun, step)
            self.report(running.procedure.target, Progress(step=step))

        await execute(running.procedure, record, self._journal, entered, lambda: running.abandoned)

    async def _recover(self, running: _Running, record: JournalRecord) -> None:
        steps = running.procedure.steps()
        if committed(steps, record.begun):
            await self._run(running, record)
            return
        await undo(steps, record.begun)
        raise Failed(f"the daemon ended during {record.operation.verb}; it was undone")

    async def _supervise(self, running: _Running, body: Awaitable[None]) -> None:
        status = OperationStatus.SUCCEEDED
        try:
            await body
        except asyncio.CancelledError as error:
            running.error, status = error, OperationStatus.CANCELLED
        except Exception as error:
            running.error, status = error, OperationStatus.FAILED
            if not isinstance(error, Error):
                log.exception("operation %s (%s) failed", running.operation.id, running.operation.verb)
        if not running.abandoned:
            await asyncio.shield(asyncio.ensure_future(self._finish(running, status)))

    async def _finish(self, running: _Running, status: OperationStatus) -> None:
        operation = msgspec.structs.replace(
            running.operation,
            status=status,
            ended_at=datetime.now(UTC),
            result=running.procedure.result if running.error is None else None,
            error=None if running.error is None else problem_of(running.error),
        )
        try:
            await self._journal.end(operation.id)
        except Error:
            log.exception("could not clear the journal of operation %s", operation.id)
        # Nothing waits from here until its objects are free: whoever sees that it has ended can begin the next one.
        running.operation = operation
        del self._running[operation.id]
        self._ended[operation.id] = operation
        while len(self._ended) > MAX_ENDED_OPERATIONS:
            del self._ended[next(iter(self._ended))]
        held = [target for target, holder in self._holder.items() if holder == operation.id]
        for target in held:
            del self._holder[target]
        running.ended.set()
        self._events.publish("operation-ended", operation.target, operation=operation)
        for target in held:
            await self._released(target)

    async def let_go(self, target: str, procedure: Procedure) -> None:
        """The procedure needs this one of its objects no longer."""
        holder = self._holder.get(target)
        running = self._running.get(holder or "")
        if running is not None and running.procedure is procedure:
            del self._holder[target]
            await self._released(target)

    # -- waiting, reporting, cancelling

    async def wait(self, operation_id: str, timeout_seconds: float | None = None) -> Operation:
        """The operation when it has ended, or as it is after the timeout."""
        running = self._running.get(operation_id)
        if running is not None:
            try:
                await asyncio.wait_for(running.ended.wait(), timeout_seconds)
            except TimeoutError:
                return running.operation
            return running.operation
        return self.get(operation_id)

    async def outcome(self, operation_id: str) -> None:
        """Wait for the end and raise the very error that it ended with."""
        running = self._running.get(operation_id)
        if running is None:
            return
        await running.ended.wait()
        if isinstance(running.error, asyncio.CancelledError):
            raise Cancelled("the operation was cancelled and undone") from running.error
        if running.error is not None:
            raise running.error

    def report(self, target: str, progress: Progress) -> None:
        """Show where the operation on `target` is; the event stream gets at most ten a second of one step."""
        running = self._running.get(self._holder.get(target, ""))
        if running is None:
            return
        now = asyncio.get_running_loop().time()
        new_step = progress.step != running.operation.progress.step
        running.operation = msgspec.structs.replace(running.operation, progress=progress)
        if new_step or now - running.reported_at >= PROGRESS_INTERVAL_SECONDS:
            running.reported_at = now
            self._events.publish("operation-updated", target, operation=running.operation)

    def cancel(self, operation_id: str) -> Operation:
        """Ask it to stop and undo. Raises `Conflict` when it is past its commit point or has ended."""
        running = self._running.get(operation_id)
        if running is None:
            ended = self.get(operation_id)
            raise Conflict(f"operation {operation_id} ({ended.verb}) has ended: it {ended.status.value}")
        if committed(running.procedure.steps(), running.begun):
            raise Conflict(
                f"operation {operation_id} ({running.operation.verb}) is past the point where it can be undone"
            )
        if running.operation.status is OperationStatus.RUNNING and running.task is not None:
            running.operation = msgspec.structs.replace(running.operation, status=OperationStatus.CANCELLING)
            # A task that is cancelled before it began never runs, and so never ends the operation: let it begin.
            asyncio.get_running_loop().call_soon(running.task.cancel)
        return running.operation

    async def close(self) -> None:
        """Undo what can be undone, leave the rest in the journal for the next daemon, and return when all is still."""
        tasks = []
        for running in tuple(self._running.values()):
            running.abandoned = committed(running.procedure.steps(), running.begun)
            if running.task is not None:
                running.task.cancel()
                tasks.append(running.task)
        await asyncio.gather(*tasks, return_exceptions=True)


def held_by(procedure: Procedure) -> tuple[str, ...]:
    """What is locked while it runs: its target, and what it names in `holds` besides."""
    return (procedure.target, *getattr(procedure, "holds", ()))


def _encode(procedure: Procedure) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(procedure.arguments))
