"""A store that forgets: for tests, and for whatever need not survive."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from triarch.errors import Unavailable
from triarch.store.base import Change, Compare, Delete, Entry, Put, Write
from triarch.store.rules import check_key, check_prefix, check_revision, check_transaction
from triarch.store.watches import Watches


class MemoryStore:
    """`Store` in a dictionary. Closing keeps the entries for as long as the object lives."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}
        self._revision = 0
        self._watches = Watches()
        self._is_open = False

    async def open(self) -> None:
        self._is_open = True

    async def close(self) -> None:
        self._is_open = False
        self._watches.close()

    async def get(self, key: str) -> Entry | None:
        self._need_open()
        return self._entries.get(check_key(key))

    async def list(self, prefix: str) -> tuple[Entry, ...]:
        self._need_open()
        check_prefix(prefix)
        return tuple(self._entries[key] for key in sorted(self._entries) if key.startswith(prefix))

    async def put(self, key: str, value: bytes) -> int:
        return await self.txn((), (Put(key=key, value=value),))

    async def delete(self, key: str) -> bool:
        existed = await self.get(key) is not None
        await self.txn((), (Delete(key=key),))
        return existed

    async def txn(self, compares: Sequence[Compare], writes: Sequence[Write]) -> int:
        self._need_open()
        check_transaction(compares, writes)
        for compare in compares:
            entry = self._entries.get(compare.key)
            check_revision(compare, entry.revision if entry else 0)
        effective = [write for write in writes if isinstance(write, Put) or write.key in self._entries]
        self._revision += bool(effective)
        self._watches.publish([self._apply(write) for write in effective])
        return self._revision

    def watch(self, prefix: str) -> AsyncIterator[Change]:
        self._need_open()
        return self._watches.add(check_prefix(prefix))

    def _apply(self, write: Write) -> Change:
        if isinstance(write, Put):
            self._entries[write.key] = Entry(key=write.key, value=write.value, revision=self._revision)
            return Change(key=write.key, value=write.value, revision=self._revision)
        del self._entries[write.key]
        return Change(key=write.key, value=None, revision=self._revision)

    def _need_open(self) -> None:
        if not self._is_open:
            raise Unavailable("the store in memory is not open")
