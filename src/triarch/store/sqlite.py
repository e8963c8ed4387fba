"""The store of one host: an sqlite database that this daemon alone has open.

Durability. The database is in WAL mode with `synchronous=NORMAL`: a commit is a write(2) to the log and no fsync, so
what returned is in the kernel's hands and survives SIGKILL of the daemon at any instruction. When the machine itself
loses power, the last commits may be missing, but always a whole tail of them: the database is then as it was a moment
earlier, never torn (https://www.sqlite.org/pragma.html#pragma_synchronous).

`locking_mode=EXCLUSIVE` keeps every other process out and needs no shared memory file. All of sqlite is called in one
thread of its own, so that a checkpoint's fsync never holds up the event loop, and calls take effect in the order made.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from triarch.errors import Busy, Damaged, Denied, Error, Exhausted, Failed, Unavailable, Unsupported
from triarch.store.base import Change, Compare, Delete, Entry, Put, Write
from triarch.store.rules import check_key, check_prefix, check_revision, check_transaction
from triarch.store.watches import Watches

T = TypeVar("T")

APPLICATION_ID = 0x54726961  # "Tria", shown by file(1)
SCHEMA_VERSION = 1

_SCHEMA = f"""
BEGIN;
CREATE TABLE entries (key TEXT PRIMARY KEY, value BLOB NOT NULL, revision INTEGER NOT NULL) STRICT;
CREATE TABLE counter (revision INTEGER NOT NULL) STRICT;
INSERT INTO counter VALUES (0);
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {SCHEMA_VERSION};
COMMIT;
"""
# About twice what the log grows to before sqlite begins it anew.
LOG_BYTES = 8 << 20
# No key contains it, and it sorts after all that they do contain.
_AFTER_ALL = "\x7f"


class SqliteStore:
    """`Store` in the file `path`, which is made, readable by its owner only, when it is not there.

    `open` raises `Busy` while another daemon has it, `Damaged` when it is no sound database, `Unsupported` when a
    newer Triarch wrote it. Any call raises `Exhausted` when the disk is full, `Unavailable` before `open`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._watches = Watches()
        self._thread: ThreadPoolExecutor | None = None
        self._connection: sqlite3.Connection | None = None

    async def open(self) -> None:
        if self._thread is not None:
            return
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")
        try:
            self._connection = await self._call(self._connect)
        except BaseException:
            self._thread.shutdown(wait=False)
            self._thread = None
            raise

    async def close(self) -> None:
        """Whatever was asked for before is done first; from now on all calls are refused."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        try:
            await asyncio.get_running_loop().run_in_executor(thread, self._disconnect)
        finally:
            thread.shutdown(wait=False)
            self._watches.close()

    async def get(self, key: str) -> Entry | None:
        check_key(key)
        return await self._call(lambda: self._get(key))

    async def list(self, prefix: str) -> tuple[Entry, ...]:
        check_prefix(prefix)
        return await self._call(lambda: self._list(prefix))

    async def put(self, key: str, value: bytes) -> int:
        return await self.txn((), (Put(key=key, value=value),))

    async def delete(self, key: str) -> bool:
        check_key(key)
        return bool(await self._write((), (Delete(key=key),)))

    async def txn(self, compares: Sequence[Compare], writes: Sequence[Write]) -> int:
        check_transaction(compares, writes)
        changes = await self._write(tuple(compares), tuple(writes))
        return changes[0].revision if changes else await self._call(self._revision)

    def watch(self, prefix: str) -> AsyncIterator[Change]:
        self._need_open()
        return self._watches.add(check_prefix(prefix))

    # ---- on the event loop

    def _need_open(self) -> ThreadPoolExecutor:
        if self._thread is None:
            raise Unavailable(f"the store {self.path} is not open")
        return self._thread

    async def _call(self, work: Callable[[], T]) -> T:
        thread = self._need_open()

        def translated() -> T:
            with self._translated():
                return work()

        return await asyncio.get_running_loop().run_in_executor(thread, translated)

    async def _write(self, compares: Sequence[Compare], writes: Sequence[Write]) -> tuple[Change, ...]:
        """Watchers are told from the thread: in order, before the caller is, and also when that was cancelled."""
        loop = asyncio.get_running_loop()

        def work() -> tuple[Change, ...]:
            changes = self._transact(compares, writes)
            loop.call_soon_threadsafe(self._watches.publish, changes)
            return changes

        return await self._call(work)

    # ---- in the store's thread

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise _translate(error, self.path) from error
        except UnicodeDecodeError as error:
            # Damaged SQL text, in a key or in a message of sqlite's own that quotes the damaged schema.
            raise Damaged(f"the store {self.path} is damaged: it holds text that is none") from error

    def _connect(self) -> sqlite3.Connection:
        try:
            # Never opened here once it is there: closing it would drop the POSIX locks that sqlite holds on it.
            if not self.path.exists():
                self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self.path.touch(mode=0o600)
        except OSError as error:
            raise Unavailable(f"cannot make the store {self.path}: {error.strerror}") from error
        connection = sqlite3.connect(self.path, timeout=0, isolation_level=None, check_same_thread=False)
        try:
            # Exclusive must come first: a WAL database that is opened in another mode gets a shared memory file.
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            self._check_or_make_schema(connection)
            connection.execute("BEGIN EXCLUSIVE").execute("COMMIT")
            self._reserve_log()
        except BaseException:
            connection.close()
            raise
        return connection

    def _reserve_log(self) -> None:
        """Take the log's room now: when machines have filled the disk, even deleting one has to be written down.

        To sqlite zeros after the last frame are no frames (https://www.sqlite.org/walformat.html). Nobody locks the
        log, so that it may be opened and closed here. Without the room the store works until it needs it.
        """
        with suppress(OSError), Path(f"{self.path}-wal").open("r+b") as log:
            os.posix_fallocate(log.fileno(), 0, LOG_BYTES)

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with self._translated():
                connection.close()

    def _check_or_make_schema(self, connection: sqlite3.Connection) -> None:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (objects,) = connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if (version, application, objects) == (0, 0, 0):
            connection.executescript(_SCHEMA)
            return
        if application != APPLICATION_ID:
            raise Damaged(f"the file {self.path} is a database, but not one of Triarch's")
        if version > SCHEMA_VERSION:
            raise Unsupported(
                f"the store {self.path} has schema {version}, this Triarch knows up to {SCHEMA_VERSION}",
                hint="use the newer Triarch that wrote it",
            )
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise Damaged(f"the store {self.path} is damaged: {' '.join(verdict.split())}")

    @property
    def _database(self) -> sqlite3.Connection:
        if self._connection is None:
            raise Unavailable(f"the store {self.path} is not open")
        return self._connection

    def _get(self, key: str) -> Entry | None:
        row = self._database.execute("SELECT value, revision FROM entries WHERE key = ?", (key,)).fetchone()
        return Entry(key=key, value=row[0], revision=row[1]) if row else None

    def _list(self, prefix: str) -> tuple[Entry, ...]:
        rows = self._database.execute(
            "SELECT key, value, revision FROM entries WHERE key >= ? AND key < ? ORDER BY key",
            (prefix, prefix + _AFTER_ALL),
        )
        return tuple(Entry(key=key, value=value, revision=revision) for key, value, revision in rows)

    def _revision(self) -> int:
        (revision,) = self._database.execute("SELECT revision FROM counter").fetchone()
        return int(revision)

    def _transact(self, compares: Sequence[Compare], writes: Sequence[Write]) -> tuple[Change, ...]:
        database = self._database
        database.execute("BEGIN IMMEDIATE")
        try:
            for compare in compares:
                check_revision(compare, self._revision_of(compare.key))
            changes = self._apply(writes)
            database.execute("COMMIT")
        except BaseException:
            # A full disk makes sqlite roll back by itself.
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise
        return changes

    def _revision_of(self, key: str) -> int:
        row = self._database.execute("SELECT revision FROM entries WHERE key = ?", (key,)).fetchone()
        return int(row[0]) if row else 0

    def _apply(self, writes: Sequence[Write]) -> tuple[Change, ...]:
        """All of a transaction's changes have one revision; deleting what is not there is no change."""
        database, revision = self._database, self._revision() + 1
        changes: list[Change] = []
        for write in writes:
            if isinstance(write, Put):
                database.execute(
                    "INSERT INTO entries VALUES (?, ?, ?)"
                    " ON CONFLICT (key) DO UPDATE SET value = excluded.value, revision = excluded.revision",
                    (write.key, write.value, revision),
                )
                changes.append(Change(key=write.key, value=write.value, revision=revision))
            elif database.execute("DELETE FROM entries WHERE key = ?", (write.key,)).rowcount:
                changes.append(Change(key=write.key, value=None, revision=revision))
        if changes:
            database.execute("UPDATE counter SET revision = ?", (revision,))
        return tuple(changes)


def _translate(error: sqlite3.Error, path: Path) -> Error:
    """By the primary result code (https://www.sqlite.org/rescode.html)."""
    match getattr(error, "sqlite_errorcode", 0) & 0xFF:
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return Busy(
                f"the store {path} is in use by another daemon", hint="stop the other daemon, or use --root DIR"
            )
        # All SQL here is constant: if it is wrong (SQLITE_ERROR, or no code at all), it is so for this file.
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB | sqlite3.SQLITE_ERROR | 0:
            return Damaged(f"the store {path} is damaged: {error}")
        case sqlite3.SQLITE_FULL:
            return Exhausted(f"the disk that holds the store {path} is full", hint=f"df -h {path.parent}")
        case sqlite3.SQLITE_READONLY | sqlite3.SQLITE_PERM:
            return Denied(f"the store {path} may not be written: {error}")
        case sqlite3.SQLITE_CANTOPEN if not os.access(path, os.R_OK | os.W_OK):
            return Denied(
                f"the store {path} may not be opened by user {os.geteuid()}: this instance is another user's",
                hint="triarch --root DIR, with a directory of your own",
            )
        case sqlite3.SQLITE_CANTOPEN:
            return Unavailable(f"the store {path} cannot be opened: {error}")
    return Failed(f"the store {path} failed: {error}")
