"""A console log that is replaced or cut while it is read."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from triarch.engine.logs import EVERYTHING, Beginning, LogReader, LogWatch, follow_log
from triarch.host.console_log import ConsoleLog, Mark


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "console.log"


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def test_a_log_that_is_not_there_yet(path: Path) -> None:
    reader = LogReader(path)
    assert reader.read() == b""
    append(path, b"one")
    assert (reader.read(), reader.read()) == (b"one", b"")
    reader.close()


def test_a_log_that_is_replaced_is_read_to_its_end(path: Path) -> None:
    append(path, b"one")
    reader = LogReader(path)
    assert reader.read() == b"one"
    append(path, b"two")
    path.replace(f"{path}.1")
    append(path, b"three")
    assert (reader.read(), reader.read(), reader.read()) == (b"two", b"three", b"")
    reader.close()


def test_a_log_that_is_cut_is_read_from_its_new_beginning(path: Path) -> None:
    append(path, b"a long beginning")
    reader = LogReader(path)
    assert reader.read() == b"a long beginning"
    path.write_bytes(b"")
    append(path, b"short")
    assert (reader.read(), reader.read()) == (b"short", b"")
    reader.close()


async def test_what_was_kept_comes_first(path: Path) -> None:
    append(path, b"new")
    path.with_name("console.log.1").write_bytes(b"x" * 100_000)
    assert await kept(path) == b"x" * 100_000 + b"new"


async def kept(path: Path, beginning: Beginning = EVERYTHING) -> bytes:
    return b"".join([piece async for piece in follow_log(path, LogWatch(), lambda: False, beginning)])


async def test_what_is_appended_is_told_at_once(path: Path) -> None:
    append(path, b"one\n")
    watch, running = LogWatch(), True
    pieces = follow_log(path, watch, lambda: running)
    try:
        assert await anext(pieces) == b"one\n"
        for number in range(5):
            waiting = asyncio.ensure_future(anext(pieces))
            await asyncio.sleep(0.02)
            append(path, b"%d\n" % number)
            began = time.monotonic()
            assert await waiting == b"%d\n" % number
            assert time.monotonic() - began < 0.2, "found by looking, not by being told"
        running = False
        with pytest.raises(StopAsyncIteration):
            await anext(pieces)
    finally:
        await pieces.aclose()  # type: ignore[attr-defined]
        watch.close()


@given(
    old=st.lists(st.binary(max_size=6), max_size=6),
    new=st.lists(st.binary(max_size=6), max_size=6),
    rest=st.sampled_from([b"", b"part"]),
    count=st.integers(0, 14),
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_last_lines_are_those_of_both_files(
    tmp_path: Path, old: list[bytes], new: list[bytes], rest: bytes, count: int
) -> None:
    path = tmp_path / "console.log"
    earlier = b"".join(word.replace(b"\n", b"?") + b"\n" for word in old)
    later = b"".join(word.replace(b"\n", b"?") + b"\n" for word in new) + rest
    path.with_name("console.log.1").write_bytes(earlier)
    path.write_bytes(later)
    lines = split(earlier) + split(later)
    wanted = lines[len(lines) - min(count, len(lines)) :]
    assert asyncio.run(kept(path, Beginning(tail_lines=count))) == b"".join(wanted)


def split(data: bytes) -> list[bytes]:
    pieces = data.split(b"\n")
    return [piece + b"\n" for piece in pieces[:-1]] + ([pieces[-1]] if pieces[-1] else [])


async def test_history_begins_with_a_line(path: Path) -> None:
    path.with_name("console.log.1").write_bytes(b"first\nsecond\n")
    append(path, b"third\nfourth\n")
    assert await kept(path, Beginning(tail_bytes=9)) == b"fourth\n"
    assert await kept(path, Beginning(tail_bytes=13)) == b"third\nfourth\n"
    assert await kept(path, Beginning(tail_bytes=17)) == b"third\nfourth\n"
    assert await kept(path, Beginning(tail_bytes=20)) == b"second\nthird\nfourth\n"
    assert await kept(path, Beginning(tail_bytes=1000)) == b"first\nsecond\nthird\nfourth\n"
    assert await kept(path, Beginning(tail_bytes=0)) == b""


async def test_since_a_time(path: Path) -> None:
    log = ConsoleLog(path)
    for second in range(10):
        log.append(b"at %d\nand more\n" % second, (Mark(0, 1000.0 + 10 * second),))
    for second in (0, 3, 9):
        whole = b"".join(b"at %d\nand more\n" % n for n in range(second, 10))
        assert await kept(path, Beginning(since_seconds=1000.0 + 10 * second)) == whole
        assert await kept(path, Beginning(since_seconds=995.0 + 10 * second)) == whole
    assert await kept(path, Beginning(since_seconds=2000.0)) == b""
    assert await kept(path, Beginning(since_seconds=1000.0, tail_lines=1)) == b"and more\n"


async def test_a_log_that_nobody_dated_is_shown(path: Path) -> None:
    append(path, b"one\n")
    assert await kept(path, Beginning(since_seconds=2000.0)) == b"one\n"


async def test_the_kernels_queue_is_given_back_when_nobody_reads(path: Path) -> None:
    append(path, b"one\n")
    watch = LogWatch()
    before = queues()
    pieces = follow_log(path, watch, lambda: True)
    await anext(pieces)
    assert queues() == before + 1
    await pieces.aclose()  # type: ignore[attr-defined]
    assert queues() == before
    watch.close()


def queues() -> int:
    links = (str(fd.readlink()) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink())
    return sum("inotify" in link for link in links)
