"""What can befall a database file: SIGKILL, a second daemon, damage, a full disk, a newer Triarch."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from triarch.errors import Busy, Damaged, Error, Exhausted, Unavailable, Unsupported
from triarch.store.base import Delete, Put
from triarch.store.sqlite import SCHEMA_VERSION, SqliteStore

WRITER = """
import asyncio, sys
from pathlib import Path
from triarch.store.sqlite import SqliteStore

async def main():
    store = SqliteStore(Path(sys.argv[1]))
    await store.open()
    number = 0
    while True:
        await store.put(f"k/{number}", b"x" * 2000)
        sys.stdout.write(f"{number}\\n")
        sys.stdout.flush()
        number += 1

asyncio.run(main())
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "triarch.db"


async def filled(path: Path, count: int = 200) -> SqliteStore:
    store = SqliteStore(path)
    await store.open()
    for number in range(count):
        await store.put(f"machines/{number}", bytes([number % 256]) * 1000)
    return store


def writer(path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("writes", [1, 37, 1500], ids=lambda n: f"after-{n}")
async def test_a_write_that_returned_survives_sigkill(path: Path, writes: int) -> None:
    process = writer(path)
    assert process.stdout is not None
    for _ in range(writes):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    told = [line for line in process.stdout.read().splitlines() if line]
    process.wait()
    store = SqliteStore(path)
    await store.open()
    kept = await store.list("k/")
    await store.close()
    # The last number may have been cut short on its way through the pipe; all before it were told in full.
    assert len(kept) >= writes + len(told) - 1
    assert {entry.key for entry in kept} == {f"k/{number}" for number in range(len(kept))}
    assert all(entry.value == b"x" * 2000 for entry in kept)


async def test_another_daemon_is_named(path: Path) -> None:
    process = writer(path)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(Busy, match="another daemon"):
            await SqliteStore(path).open()
    finally:
        process.kill()
        process.communicate()
    store = SqliteStore(path)
    await store.open()
    await store.close()


async def test_two_stores_in_one_process_exclude_each_other(path: Path) -> None:
    first = await filled(path, 1)
    second = SqliteStore(path)
    with pytest.raises(Busy):
        await second.open()
    await first.put("still", b"mine")
    with pytest.raises(Busy):
        await second.open()
    await first.close()
    await second.open()
    assert await second.get("still") is not None
    await second.close()


async def test_the_owner_alone_can_read_it(path: Path) -> None:
    store = await filled(path, 1)
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    await store.close()


async def test_no_database_at_all(path: Path) -> None:
    path.write_bytes(b"this is no database, whatever its name says" * 200)
    with pytest.raises(Damaged, match=r"triarch\.db"):
        await SqliteStore(path).open()


async def test_a_database_of_somebody_else(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE theirs (x)")
    connection.close()
    with pytest.raises(Damaged, match="not one of Triarch's"):
        await SqliteStore(path).open()
    tables = sqlite3.connect(path).execute("SELECT name FROM sqlite_schema").fetchall()
    assert tables == [("theirs",)], "a foreign database must not be changed"


async def test_a_database_of_a_newer_triarch(path: Path) -> None:
    await (await filled(path, 1)).close()
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    connection.close()
    with pytest.raises(Unsupported, match=f"schema {SCHEMA_VERSION + 1}"):
        await SqliteStore(path).open()


async def test_an_empty_file_is_a_new_database(path: Path) -> None:
    """A daemon that died between making the file and its tables leaves one."""
    path.touch()
    store = await filled(path, 1)
    await store.close()


async def test_a_directory_in_its_place(path: Path) -> None:
    path.mkdir()
    with pytest.raises(Unavailable):
        await SqliteStore(path).open()


async def test_a_file_where_its_directory_should_be(tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    with pytest.raises(Unavailable, match="state"):
        await SqliteStore(tmp_path / "state" / "triarch.db").open()


@pytest.mark.parametrize("seed", range(20))
async def test_damage_is_told_or_did_no_harm(path: Path, seed: int) -> None:
    """Bytes overwritten anywhere: no crash, no foreign exception; `Damaged`, or entries in keys that can be read."""
    await (await filled(path)).close()
    chance = random.Random(seed)
    damaged = bytearray(path.read_bytes())
    for _ in range(50):
        damaged[chance.randrange(len(damaged))] = chance.randrange(256)
    path.write_bytes(damaged)
    store = SqliteStore(path)
    try:
        await store.open()
        await store.list("machines/")
        await store.put("machines/0", b"new")
    except Error as error:
        assert isinstance(error, Damaged | Unsupported), error
    finally:
        await store.close()


async def test_a_cut_off_file_is_damaged(path: Path) -> None:
    await (await filled(path)).close()
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(Damaged):
        await SqliteStore(path).open()


@contextmanager
def disk_of(size: str, directory: Path) -> Iterator[Path]:
    disk = directory / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with disk_of("512k", tmp_path) as disk:
        yield disk


async def test_what_frees_a_full_disk_can_still_be_written_down(tmp_path: Path) -> None:
    with disk_of("20M", tmp_path) as disk:
        store = await filled(disk / "triarch.db", 50)
        with pytest.raises(OSError, match="No space left"):
            (disk / "machine").write_bytes(bytes(20 << 20))
        for number in range(50):
            for step in range(5):
                await store.put("journal", b"x" * (500 + step))
            await store.txn([], [Delete(key=f"machines/{number}"), Delete(key="journal")])
        assert await store.list("") == ()
        await store.close()


async def test_a_full_disk_is_exhausted_and_keeps_what_was(small_disk: Path) -> None:
    path = small_disk / "triarch.db"
    store = await filled(path, 20)
    before = await store.list("")
    with pytest.raises(Exhausted, match="full"):
        await store.txn([], [Put(key=f"big/{number}", value=b"x" * 200_000) for number in range(4)])
    assert await store.list("") == before
    await store.put("small", b"still fits")
    await store.close()
    store = SqliteStore(path)
    await store.open()
    assert [entry for entry in await store.list("") if entry.key != "small"] == list(before)
    await store.close()


async def test_a_disk_that_is_full_from_the_start(small_disk: Path) -> None:
    with (small_disk / "ballast").open("wb", buffering=0) as ballast:
        try:
            while True:
                ballast.write(b"x" * 4096)
        except OSError:
            pass
    with pytest.raises(Exhausted):
        await SqliteStore(small_disk / "triarch.db").open()


def another_users_view(path: Path) -> str:
    """What a store at `path` says to user nobody when it is opened."""
    code = (
        "import asyncio, sys; from pathlib import Path; from triarch.store.sqlite import SqliteStore\n"
        "asyncio.run(SqliteStore(Path(sys.argv[1])).open())"
    )
    argv = [sys.executable, "-c", code, str(path)]
    return subprocess.run(argv, user=65534, capture_output=True, text=True, check=False).stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can look as another user does")
async def test_another_users_store_is_named_as_such(path: Path) -> None:
    store = await filled(path, 1)
    await store.close()
    for directory in list(path.parents)[:3]:
        directory.chmod(directory.stat().st_mode | 0o111)
    assert "may not be opened by user 65534: this instance is another user's" in another_users_view(path)
