"""A console log that is replaced or cut while it is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from triarch.engine.logs import LogReader, follow_log


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
    assert b"".join([piece async for piece in follow_log(path, lambda: False)]) == b"x" * 100_000 + b"new"
