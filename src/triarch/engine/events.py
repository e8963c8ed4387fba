"""The event stream: every subscriber sees every event in order, or learns that it was too slow."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from datetime import UTC, datetime

from triarch.errors import Exhausted
from triarch.model.event import Event
from triarch.model.operation import Operation

MAX_PENDING_EVENTS = 10_000


class EventBus:
    """Events of this life of the daemon, numbered from 1. Publishing never waits for a subscriber."""

    def __init__(self) -> None:
        self._sequence = 0
        self._queues: set[asyncio.Queue[Event | None]] = set()

    def publish(
        self,
        kind: str,
        target: str,
        fields: dict[str, str | int | None] | None = None,
        *,
        operation: Operation | None = None,
    ) -> None:
        self._sequence += 1
        event = Event(
            sequence=self._sequence,
            kind=kind,
            target=target,
            at=datetime.now(UTC),
            fields=fields or {},
            operation=operation,
        )
        for queue in tuple(self._queues):
            if queue.qsize() >= MAX_PENDING_EVENTS:
                self._queues.discard(queue)
                queue.put_nowait(None)
            else:
                queue.put_nowait(event)

    def subscribe(self) -> AsyncGenerator[Event, None]:
        """Events from this call on. Iterating raises `Exhausted` when the subscriber is 10,000 events behind."""
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        self._queues.add(queue)
        return self._follow(queue)

    async def _follow(self, queue: asyncio.Queue[Event | None]) -> AsyncGenerator[Event, None]:
        try:
            while True:
                event = await queue.get()
                if event is None:
                    raise Exhausted("event stream closed: this subscriber reads too slowly", hint="triarch events")
                yield event
        finally:
            self._queues.discard(queue)
