"""Whatever is done to them, the store in memory and the one on sqlite say the same."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from triarch.errors import Error
from triarch.store.base import Compare, Delete, Put, Store, Write
from triarch.store.memory import MemoryStore
from triarch.store.sqlite import SqliteStore

T = TypeVar("T")

keys = st.sampled_from(["a", "a/b", "a/c", "a0", "b", "~", "%", "_", "bad key", ""])
values = st.binary(max_size=20)
revisions = st.integers(0, 30)
writes = st.one_of(st.builds(Put, key=keys, value=values), st.builds(Delete, key=keys))


class BothStores(RuleBasedStateMachine):
    """Every rule does one thing to both and compares the answers."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.directory = tempfile.TemporaryDirectory()
        self.path = Path(self.directory.name) / "triarch.db"
        self.memory, self.sqlite = MemoryStore(), SqliteStore(self.path)
        self.loop.run_until_complete(self._open())

    async def _open(self) -> None:
        for store in (self.memory, self.sqlite):
            await store.open()
        self.watches = [store.watch("a") for store in (self.memory, self.sqlite)]

    def both(self, call: Callable[[Store], Awaitable[T]]) -> None:
        async def outcome(store: Store) -> T | tuple[str, str]:
            try:
                return await call(store)
            except Error as error:
                return error.code, error.message

        first = self.loop.run_until_complete(outcome(self.memory))
        second = self.loop.run_until_complete(outcome(self.sqlite))
        assert first == second

    @rule(key=keys)
    def get(self, key: str) -> None:
        self.both(lambda store: store.get(key))

    @rule(prefix=keys)
    def list(self, prefix: str) -> None:
        self.both(lambda store: store.list(prefix))

    @rule(key=keys, value=values)
    def put(self, key: str, value: bytes) -> None:
        self.both(lambda store: store.put(key, value))

    @rule(key=keys)
    def delete(self, key: str) -> None:
        self.both(lambda store: store.delete(key))

    @rule(
        compares=st.lists(st.builds(Compare, key=keys, revision=revisions), max_size=2),
        changes=st.lists(writes, max_size=4),
    )
    def txn(self, compares: list[Compare], changes: list[Write]) -> None:
        self.both(lambda store: store.txn(compares, changes))

    @rule(key=keys, changes=st.lists(writes, max_size=3))
    def txn_that_may_hold(self, key: str, changes: list[Write]) -> None:
        async def swap(store: Store) -> int:
            entry = await store.get(key)
            return await store.txn([Compare(key=key, revision=entry.revision if entry else 0)], changes)

        self.both(swap)

    @rule()
    def reopen(self) -> None:
        """A restart of the daemon; watches end with it."""
        self.compare_watches()
        self.sqlite = SqliteStore(self.path)
        self.loop.run_until_complete(self._open())

    def compare_watches(self) -> None:
        """Read both to their end, which closing the stores makes."""

        async def drain() -> None:
            await self.memory.close()
            await self.sqlite.close()
            first, second = [[change async for change in watch] for watch in self.watches]
            assert first == second
            assert [change.revision for change in first] == sorted(change.revision for change in first)

        self.loop.run_until_complete(drain())

    def teardown(self) -> None:
        self.compare_watches()
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()
        self.directory.cleanup()


BothStores.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestBothStores = BothStores.TestCase
