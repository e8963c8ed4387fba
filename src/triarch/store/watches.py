"""Watches within one process: who is told of which change, in order, without loss."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Iterable
from weakref import WeakSet

from triarch.errors import Stale
from triarch.store.base import Change

MAX_PENDING_CHANGES = 10_000


class Watch(AsyncIterator[Change]):
    """Changes under one prefix. It begins when it is made, not when it is first read, and `aclose` ends it.

    A reader more than `MAX_PENDING_CHANGES` behind is told so by `Stale`, once: it must list again and watch anew.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self._pending: deque[Change] = deque()
        self._arrived = asyncio.Event()
        self._closed = False
        self._overrun = False

    def offer(self, change: Change) -> None:
        if self._closed or not change.key.startswith(self.prefix):
            return
        if len(self._pending) >= MAX_PENDING_CHANGES:
            self._pending.clear()
            self._overrun = True
            self.close()
            return
        self._pending.append(change)
        self._arrived.set()

    def close(self) -> None:
        """What was pending can still be read."""
        self._closed = True
        self._arrived.set()

    async def aclose(self) -> None:
        self._pending.clear()
        self.close()

    async def __anext__(self) -> Change:
        while not self._pending:
            if self._overrun:
                self._overrun = False
                raise Stale(
                    f"the watch of '{self.prefix}' fell more than {MAX_PENDING_CHANGES} changes behind; list again"
                )
            if self._closed:
                raise StopAsyncIteration
            self._arrived.clear()
            await self._arrived.wait()
        return self._pending.popleft()


class Watches:
    """The watches of one store. A watch that nobody holds any more is forgotten."""

    def __init__(self) -> None:
        self._watches: WeakSet[Watch] = WeakSet()

    def add(self, prefix: str) -> Watch:
        watch = Watch(prefix)
        self._watches.add(watch)
        return watch

    def publish(self, changes: Iterable[Change]) -> None:
        for change in changes:
            for watch in tuple(self._watches):
                watch.offer(change)

    def close(self) -> None:
        for watch in tuple(self._watches):
            watch.close()
        self._watches.clear()
