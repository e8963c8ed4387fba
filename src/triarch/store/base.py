"""The contract of a store: small values under string keys, with revisions, transactions and watches.

The shape is etcd's (compare-and-swap on a key's revision), so that a cluster can stand on etcd and one host on sqlite.
`triarch.testing.check_store` is this page as tests.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

import msgspec


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A stored value. `revision` is the store's counter when the key was last written."""

    key: str
    value: bytes
    revision: int


class Compare(msgspec.Struct, frozen=True, kw_only=True):
    """True when `key` was last written at `revision`; revision 0 means that it does not exist."""

    key: str
    revision: int


class Put(msgspec.Struct, frozen=True, kw_only=True):
    key: str
    value: bytes


class Delete(msgspec.Struct, frozen=True, kw_only=True):
    key: str


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """A watched change; `value` is None when the key was deleted."""

    key: str
    value: bytes | None
    revision: int


Write = Put | Delete


class Store(Protocol):
    """Keys are ASCII paths such as `machines/web`; values at most 1 MiB. A write that returned survives SIGKILL."""

    async def open(self) -> None: ...

    async def close(self) -> None: ...

    async def get(self, key: str) -> Entry | None: ...

    async def list(self, prefix: str) -> tuple[Entry, ...]:
        """All entries whose key starts with `prefix`, sorted by key."""
        ...

    async def put(self, key: str, value: bytes) -> int:
        """Write without a condition; the new revision."""
        ...

    async def delete(self, key: str) -> bool:
        """Whether it existed."""
        ...

    async def txn(self, compares: Sequence[Compare], writes: Sequence[Write]) -> int:
        """All writes if all comparisons hold, else none and `Stale` that names the first key that differs.

        They share one new revision, which is returned; deleting what is not there is no change and makes none.
        """
        ...

    def watch(self, prefix: str) -> AsyncIterator[Change]:
        """Changes below `prefix` after this call, in order, none lost; closing the iterator ends the watch.

        A reader that is 10,000 changes behind gets `Stale` and lists again. Closing the store ends all watches.
        """
        ...
