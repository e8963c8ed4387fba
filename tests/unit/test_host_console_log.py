"""The console log on disk: its bound, and when what it holds was written."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from triarch.host import console_log
from triarch.host.console_log import MAX_LOG_BYTES, ConsoleLog, Mark, index_of, offset_since, predecessor_of, read_dates


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "console.log"


def test_the_names(path: Path) -> None:
    assert predecessor_of(path).name == "console.log.1"
    assert (index_of(path).name, index_of(predecessor_of(path)).name) == ("console.times", "console.times.1")


def test_a_log_that_grew_too_long_begins_anew_under_the_writers_hands(path: Path) -> None:
    log, predecessor = ConsoleLog(path), predecessor_of(path)
    writer = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(writer, b"short")
    log.look_after()
    assert path.read_bytes() == b"short" and not predecessor.exists()
    os.write(writer, b"x" * MAX_LOG_BYTES)
    log.look_after()
    os.write(writer, b"after")
    os.close(writer)
    assert path.read_bytes() == b"after"
    assert predecessor.read_bytes() == b"x" * MAX_LOG_BYTES
    assert stat.S_IMODE(predecessor.stat().st_mode) == 0o600


def test_a_flood_while_nobody_looked_leaves_two_files(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_log, "MAX_LOG_BYTES", 1000)
    path.write_bytes(b"x" * 100_000 + b"y" * 1000)
    ConsoleLog(path).look_after()
    assert path.read_bytes() == b"" and predecessor_of(path).read_bytes() == b"y" * 1000


def test_an_index_that_grew_too_long_begins_its_log_anew(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_log, "_MAX_INDEX_BYTES", 160)
    log = ConsoleLog(path)
    for second in range(100):
        log.append(b"a line\n", (Mark(0, 1000.0 + 2 * second),))
    for each in (path, predecessor_of(path)):
        assert 0 < index_of(each).stat().st_size <= 176
        assert len(read_dates(each).marks) == each.stat().st_size // len("a line\n")


def test_what_is_appended_is_dated_to_a_second(path: Path) -> None:
    log = ConsoleLog(path)
    for tenth in range(50):
        log.append(b"0123456789", (Mark(0, 100.0 + tenth / 10),))
    marks = read_dates(path).marks
    assert len(marks) == 5
    for tenth in range(50):
        offset = offset_since(marks, 100.0 + tenth / 10)
        assert offset is not None
        # Never too late, and a little more than a second too early at most.
        assert 10 * (tenth - 20) <= offset <= 10 * tenth
    assert offset_since(marks, 107.0) is None


def test_another_daemon_goes_on_in_the_index(path: Path) -> None:
    ConsoleLog(path).append(b"one", (Mark(0, 100.0),))
    ConsoleLog(path).append(b"two", (Mark(0, 100.5),))
    ConsoleLog(path).append(b"three", (Mark(0, 200.0),))
    assert read_dates(path).marks == (Mark(0, 100.0), Mark(6, 200.0))


def test_half_a_record_counts_for_nothing(path: Path) -> None:
    ConsoleLog(path).append(b"one", (Mark(0, 100.0),))
    with index_of(path).open("ab") as file:
        file.write(b"half")
    assert read_dates(path).marks == (Mark(0, 100.0),)
    ConsoleLog(path).append(b"two", (Mark(0, 200.0),))
    assert read_dates(path).marks == (Mark(0, 100.0), Mark(3, 200.0))


def test_an_index_of_a_log_that_is_gone_is_put_away(path: Path) -> None:
    """A crash between beginning the log anew and beginning its index anew."""
    ConsoleLog(path).append(b"x" * 100, (Mark(50, 100.0),))
    path.replace(predecessor_of(path))
    ConsoleLog(path).append(b"new", (Mark(0, 300.0),))
    assert read_dates(path).marks == (Mark(0, 300.0),)
    assert read_dates(predecessor_of(path)).marks == (Mark(50, 100.0),)


def test_growth_that_others_make_is_dated(path: Path) -> None:
    log = ConsoleLog(path)
    for second in (100, 110, 120):
        with path.open("ab") as file:
            file.write(b"0123456789")
        os.utime(path, (second, second))
        log.look_after()
        log.look_after()
    assert read_dates(path).marks == (Mark(0, 100.0), Mark(10, 110.0), Mark(20, 120.0))
    with path.open("ab") as file:
        file.write(b"while no daemon lived")
    os.utime(path, (130, 130))
    ConsoleLog(path).look_after()
    assert read_dates(path).marks[-1] == Mark(30, 130.0)


def test_another_daemon_dates_nothing_twice(path: Path) -> None:
    """What was looked at within a second of a record has none of its own, and is no news to the next daemon."""
    log = ConsoleLog(path)
    for tenth in range(5):
        with path.open("ab") as file:
            file.write(b"0123456789")
        os.utime(path, (100 + tenth / 10, 100 + tenth / 10))
        log.look_after()
    with path.open("ab") as file:
        file.write(b"while no daemon lived")
    os.utime(path, (200, 200))
    ConsoleLog(path).look_after()
    assert read_dates(path).marks == (Mark(0, 100.0), Mark(50, 200.0))


def test_links_are_not_followed(path: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    index_of(path).symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        ConsoleLog(path).append(b"one", (Mark(0, 100.0),))
    assert victim.read_text() == "untouched"
