"""The contract of `store/base.py` as tests. Subclass `CheckStore` and supply the stores:

    class TestSqliteStore(CheckStore):
        @pytest.fixture
        def make_store(self, tmp_path): return lambda: SqliteStore(tmp_path / "triarch.db")

Every call of `make_store` gives a new object on the same storage. `durable` says whether that remembers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import ClassVar

import pytest
import pytest_asyncio

from triarch.errors import Invalid, Stale, Unavailable
from triarch.store.base import Change, Compare, Delete, Entry, Put, Store
from triarch.store.rules import MAX_KEY_CHARACTERS, MAX_VALUE_BYTES
from triarch.store.watches import MAX_PENDING_CHANGES

MakeStore = Callable[[], Store]

ILLEGAL_KEYS = ("", "two words", "line\nbreak", "tab\t", "nul\0", "über", "😀", "\x7f", "k" * (MAX_KEY_CHARACTERS + 1))


async def take(changes: AsyncIterator[Change], count: int) -> list[Change]:
    async with asyncio.timeout(30):
        return [await anext(changes) for _ in range(count)]


class CheckStoreBase:
    """The stores come from the subclass."""

    pytestmark = pytest.mark.asyncio
    durable: ClassVar[bool] = True

    @pytest.fixture
    def make_store(self) -> MakeStore:
        raise NotImplementedError("a subclass of CheckStore supplies the fixture 'make_store'")

    @pytest_asyncio.fixture
    async def store(self, make_store: MakeStore) -> AsyncIterator[Store]:
        store = make_store()
        await store.open()
        yield store
        await store.close()


class CheckValues(CheckStoreBase):
    async def test_nothing_is_there_at_first(self, store: Store) -> None:
        assert await store.get("machines/web") is None
        assert await store.list("") == ()

    async def test_put_then_get(self, store: Store) -> None:
        revision = await store.put("machines/web", b"one")
        assert await store.get("machines/web") == Entry(key="machines/web", value=b"one", revision=revision)

    async def test_revisions_grow(self, store: Store) -> None:
        first = await store.put("a", b"1")
        second = await store.put("b", b"2")
        third = await store.put("a", b"1")
        assert 0 < first < second < third
        entry = await store.get("b")
        assert entry is not None and entry.revision == second

    @pytest.mark.parametrize("value", [b"", b"\0", bytes(range(256)), b"x" * MAX_VALUE_BYTES], ids=len)
    async def test_any_bytes(self, store: Store, value: bytes) -> None:
        await store.put("k", value)
        entry = await store.get("k")
        assert entry is not None and entry.value == value

    async def test_a_value_too_long_is_refused(self, store: Store) -> None:
        with pytest.raises(Invalid, match="k"):
            await store.put("k", b"x" * (MAX_VALUE_BYTES + 1))
        assert await store.get("k") is None

    @pytest.mark.parametrize("key", ILLEGAL_KEYS, ids=repr)
    async def test_an_illegal_key_is_refused_everywhere(self, store: Store, key: str) -> None:
        for call in (store.get, store.delete):
            with pytest.raises(Invalid):
                await call(key)
        with pytest.raises(Invalid):
            await store.put(key, b"")
        with pytest.raises(Invalid):
            await store.txn([Compare(key="k", revision=9), Compare(key=key, revision=0)], [])

    async def test_list_is_sorted_and_by_prefix(self, store: Store) -> None:
        for key in ("m/b", "m/a", "m", "m0", "n/a", "m/~", "m/a/x", "M/a"):
            await store.put(key, key.encode())
        assert [entry.key for entry in await store.list("m/")] == ["m/a", "m/a/x", "m/b", "m/~"]
        assert [entry.key for entry in await store.list("m/a")] == ["m/a", "m/a/x"]
        assert len(await store.list("")) == 8
        assert all(entry.value == entry.key.encode() for entry in await store.list(""))

    async def test_a_prefix_is_taken_literally(self, store: Store) -> None:
        for key in ("a%", "ab", "a_", "a*", "[a]"):
            await store.put(key, b"")
        for prefix in ("a%", "a_", "a*", "[a]"):
            assert [entry.key for entry in await store.list(prefix)] == [prefix]

    async def test_delete(self, store: Store) -> None:
        first = await store.put("k", b"1")
        assert await store.delete("k") is True
        assert await store.get("k") is None
        assert await store.delete("k") is False
        assert await store.put("k", b"2") > first + 1


class CheckTransactions(CheckStoreBase):
    async def test_all_writes_share_a_revision(self, store: Store) -> None:
        await store.put("old", b"")
        revision = await store.txn([], [Put(key="a", value=b"1"), Put(key="b", value=b"2"), Delete(key="old")])
        assert [(entry.key, entry.revision) for entry in await store.list("")] == [("a", revision), ("b", revision)]

    async def test_comparisons_that_hold(self, store: Store) -> None:
        revision = await store.put("a", b"1")
        compares = [Compare(key="a", revision=revision), Compare(key="b", revision=0)]
        await store.txn(compares, [Put(key="b", value=b"2")])
        assert await store.get("b") is not None

    async def test_one_that_does_not_hold_writes_nothing(self, store: Store) -> None:
        revision = await store.put("a", b"1")
        later = await store.put("b", b"1")
        compares = [Compare(key="a", revision=revision), Compare(key="b", revision=later + 1)]
        with pytest.raises(Stale, match="'b'") as caught:
            await store.txn(compares, [Put(key="a", value=b"2"), Delete(key="b"), Put(key="c", value=b"")])
        assert caught.value.fields == {"key": "b", "revision": later, "expected": later + 1}
        assert [(entry.key, entry.value) for entry in await store.list("")] == [("a", b"1"), ("b", b"1")]
        assert await store.put("d", b"") == later + 1

    async def test_the_first_that_differs_is_named(self, store: Store) -> None:
        with pytest.raises(Stale) as caught:
            await store.txn([Compare(key="y", revision=9), Compare(key="x", revision=9)], [])
        assert caught.value.fields["key"] == "y"

    async def test_absent_means_revision_zero(self, store: Store) -> None:
        created = [Compare(key="k", revision=0)]
        await store.txn(created, [Put(key="k", value=b"")])
        with pytest.raises(Stale):
            await store.txn(created, [Put(key="k", value=b"")])
        await store.delete("k")
        await store.txn(created, [Put(key="k", value=b"")])

    async def test_an_old_revision_never_comes_back(self, store: Store) -> None:
        revision = await store.put("k", b"same")
        await store.delete("k")
        await store.put("k", b"same")
        with pytest.raises(Stale):
            await store.txn([Compare(key="k", revision=revision)], [Delete(key="k")])

    async def test_what_changes_nothing_makes_no_revision(self, store: Store) -> None:
        revision = await store.put("a", b"")
        assert await store.txn([], []) == revision
        assert await store.txn([Compare(key="a", revision=revision)], [Delete(key="none")]) == revision
        assert await store.put("b", b"") == revision + 1

    async def test_a_key_written_twice_is_refused(self, store: Store) -> None:
        with pytest.raises(Invalid, match="twice"):
            await store.txn([], [Put(key="k", value=b"1"), Delete(key="k")])
        assert await store.get("k") is None

    async def test_compare_and_swap_loses_no_update(self, store: Store) -> None:
        await store.put("counter", b"0")

        async def increment() -> None:
            while True:
                entry = await store.get("counter")
                assert entry is not None
                swap = Put(key="counter", value=b"%d" % (int(entry.value) + 1))
                try:
                    await store.txn([Compare(key="counter", revision=entry.revision)], [swap])
                    return
                except Stale:
                    await asyncio.sleep(0)

        await asyncio.gather(*(increment() for _ in range(20)))
        entry = await store.get("counter")
        assert entry is not None and entry.value == b"20"

    async def test_concurrent_writes_get_revisions_of_their_own(self, store: Store) -> None:
        revisions = await asyncio.gather(*(store.put(f"k/{number}", b"") for number in range(100)))
        assert len(set(revisions)) == 100
        assert {entry.revision for entry in await store.list("k/")} == set(revisions)


class CheckWatches(CheckStoreBase):
    async def test_changes_come_in_order(self, store: Store) -> None:
        watch = store.watch("m/")
        first = await store.put("m/a", b"1")
        await store.put("other", b"")
        second = await store.put("m/a", b"2")
        await store.delete("m/a")
        await store.delete("m/a")
        third = await store.put("m/b", b"")
        assert await take(watch, 4) == [
            Change(key="m/a", value=b"1", revision=first),
            Change(key="m/a", value=b"2", revision=second),
            Change(key="m/a", value=None, revision=second + 1),
            Change(key="m/b", value=b"", revision=third),
        ]

    async def test_a_watch_begins_with_the_call(self, store: Store) -> None:
        await store.put("before", b"")
        watch = store.watch("")
        await store.put("after", b"")
        assert [change.key for change in await take(watch, 1)] == ["after"]

    async def test_a_waiting_reader_is_woken(self, store: Store) -> None:
        waiting = asyncio.create_task(take(store.watch("k"), 1))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        await store.put("k", b"now")
        assert [change.value for change in await waiting] == [b"now"]

    async def test_a_transaction_comes_whole_and_a_refused_one_not_at_all(self, store: Store) -> None:
        watch = store.watch("")
        revision = await store.txn([], [Put(key="b", value=b""), Put(key="a", value=b"")])
        with pytest.raises(Stale):
            await store.txn([Compare(key="a", revision=0)], [Delete(key="a")])
        await store.put("end", b"")
        changes = await take(watch, 3)
        assert [(change.key, change.revision) for change in changes[:2]] == [("b", revision), ("a", revision)]
        assert changes[2].key == "end"

    async def test_every_watcher_sees_everything(self, store: Store) -> None:
        watches = [store.watch("k/") for _ in range(5)]
        await asyncio.gather(*(store.put(f"k/{number}", b"") for number in range(200)))
        seen = [await take(watch, 200) for watch in watches]
        assert all(changes == seen[0] for changes in seen)
        revisions = [change.revision for change in seen[0]]
        assert revisions == sorted(set(revisions))

    async def test_a_cancelled_write_is_seen_if_and_only_if_it_happened(self, store: Store) -> None:
        watch = store.watch("k/")
        for number in range(50):
            task = asyncio.create_task(store.put(f"k/{number}", b""))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await store.put("k/end", b"")
        written = await store.list("k/")
        seen = await take(watch, len(written))
        assert {(change.key, change.revision) for change in seen} == {(entry.key, entry.revision) for entry in written}

    async def test_closing_ends_a_watch(self, store: Store) -> None:
        watch = store.watch("")
        await store.put("k", b"")
        await watch.aclose()  # type: ignore[attr-defined]
        with pytest.raises(StopAsyncIteration):
            await anext(watch)

    async def test_closing_the_store_ends_all_watches(self, store: Store) -> None:
        waiting = asyncio.create_task(self._read_all(store.watch("")))
        await store.put("k", b"")
        await store.close()
        async with asyncio.timeout(10):
            assert [change.key for change in await waiting] == ["k"]

    async def test_a_reader_too_far_behind_is_told(self, store: Store) -> None:
        watch = store.watch("k/")
        batch = 500
        for start in range(0, MAX_PENDING_CHANGES + 1, batch):
            await store.txn([], [Put(key=f"k/{start + number}", value=b"") for number in range(batch)])
        with pytest.raises(Stale, match="k/"):
            await anext(watch)
        with pytest.raises(StopAsyncIteration):
            await anext(watch)

    async def _read_all(self, watch: AsyncIterator[Change]) -> list[Change]:
        return [change async for change in watch]


class CheckOpening(CheckStoreBase):
    async def test_a_closed_store_refuses(self, make_store: MakeStore) -> None:
        store = make_store()
        with pytest.raises(Unavailable):
            await store.get("k")
        await store.open()
        await store.put("k", b"")
        await store.close()
        with pytest.raises(Unavailable):
            await store.put("k", b"")
        with pytest.raises(Unavailable):
            store.watch("")

    async def test_open_and_close_twice(self, make_store: MakeStore) -> None:
        store = make_store()
        for _ in range(2):
            await store.open()
            await store.open()
            await store.put("k", b"")
            await store.close()
            await store.close()

    async def test_closing_while_calls_are_under_way(self, make_store: MakeStore) -> None:
        """Each of them is done, and watched, or refused."""
        store = make_store()
        await store.open()
        watch = store.watch("k/")
        big = b"x" * MAX_VALUE_BYTES
        calls = [asyncio.create_task(store.put(f"k/{number}", big)) for number in range(10)]
        await asyncio.sleep(0)
        closing = asyncio.create_task(store.close())
        await asyncio.sleep(0)
        calls += [asyncio.create_task(store.put(f"k/{number}", b"")) for number in range(10, 20)]
        async with asyncio.timeout(30):
            outcomes = await asyncio.gather(*calls, return_exceptions=True)
            await closing
            seen = [change.revision async for change in watch]
        assert all(isinstance(outcome, int | Unavailable) for outcome in outcomes), outcomes
        assert seen == sorted(outcome for outcome in outcomes if isinstance(outcome, int))

    async def test_what_was_written_is_there_again(self, make_store: MakeStore) -> None:
        if not self.durable:
            pytest.skip("this store forgets, and says so")
        store = make_store()
        await store.open()
        await store.put("a", b"1")
        await store.put("b", b"2")
        last = await store.txn([], [Put(key="c", value=b"3"), Delete(key="a")])
        before = await store.list("")
        await store.close()
        store = make_store()
        await store.open()
        assert await store.list("") == before
        assert await store.put("d", b"") == last + 1
        await store.close()


class CheckStore(CheckValues, CheckTransactions, CheckWatches, CheckOpening):
    """The whole suite."""
