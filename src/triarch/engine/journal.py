"""The journal: what is under way, written before it happens, so that the next daemon can finish or undo it."""

from __future__ import annotations

import msgspec

from triarch.engine.records import decode_entry
from triarch.model.operation import Operation
from triarch.store.base import Store

PREFIX = "journal/"


class JournalRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An operation that has not ended: its verb, its arguments as JSON, and the steps begun so far."""

    operation: Operation
    arguments: msgspec.Raw
    begun: tuple[str, ...] = ()


class Journal:
    """Journal records in the store, one key per operation; the key goes when the operation ended."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def begin(self, record: JournalRecord, step: str) -> JournalRecord:
        """Write that `step` begins; returns when that survives SIGKILL."""
        if step in record.begun:
            return record
        record = msgspec.structs.replace(record, begun=(*record.begun, step))
        await self._store.put(PREFIX + record.operation.id, msgspec.json.encode(record))
        return record

    async def end(self, operation_id: str) -> None:
        await self._store.delete(PREFIX + operation_id)

    async def unfinished(self) -> tuple[JournalRecord, ...]:
        """What an earlier daemon left, oldest first."""
        entries = await self._store.list(PREFIX)
        records = [decode_entry(entry, JournalRecord) for entry in entries]
        return tuple(sorted(records, key=lambda record: record.operation.created_at))
