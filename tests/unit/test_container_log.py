"""Copying conmon's file to the plain log."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from triarch.drivers.container.log import RunLog, plain
from triarch.host import console_log
from triarch.host.console_log import Mark


def line(text: str, tag: str = "F", stream: str = "stdout") -> bytes:
    return f"2026-01-02T03:04:05.678901234+00:00 {stream} {tag} {text}\n".encode()


@pytest.fixture
def run_log(tmp_path: Path) -> RunLog:
    made = RunLog(str(tmp_path), str(tmp_path / "console.log"))
    made.prepare()
    return made


def text(lines: bytes) -> bytes:
    return plain(lines)[0]


def test_plain() -> None:
    assert text(line("one") + line("two", stream="stderr")) == b"one\ntwo\n"
    assert text(line("part", "P") + line("whole")) == b"partwhole\n"
    assert text(line("") + line("  spaces  ")) == b"\n  spaces  \n"
    assert text(b"") == b""
    assert text(b"garbage\n" + line("after")) == b"after\n"


def test_each_second_is_marked_once() -> None:
    later = line("three").replace(b":05.6", b":06.1")
    _, marks = plain(line("one") + line("two") + later + b"no-date stdout F text\n")
    began = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC).timestamp()
    assert marks == (Mark(0, began), Mark(8, began - 0.678901 + 1.178901))


def test_one_turn_copies_no_more_than_it_may(run_log: RunLog, tmp_path: Path) -> None:
    run_log.source.write_bytes(line("x" * 100) * 10_000)
    assert 300_000 < run_log.copy(limit_bytes=300_000) < 1_000_000
    run_log.copy()
    assert (tmp_path / "console.log").read_bytes() == b"x" * 100 + b"\n" + (b"x" * 100 + b"\n") * 9_999


def test_copies_only_what_is_new(run_log: RunLog, tmp_path: Path) -> None:
    with run_log.source.open("ab") as source:
        source.write(line("one"))
        source.flush()
        run_log.copy()
        source.write(line("two")[:-4])
        source.flush()
        run_log.copy()
        assert (tmp_path / "console.log").read_bytes() == b"one\n"
        source.write(line("two")[-4:])
    # Another daemon goes on where this one was.
    RunLog(str(tmp_path), str(tmp_path / "console.log")).copy()
    assert (tmp_path / "console.log").read_bytes() == b"one\ntwo\n"


def test_a_file_that_was_begun_anew_is_read_from_its_start(run_log: RunLog, tmp_path: Path) -> None:
    run_log.source.write_bytes(line("a long line that comes first"))
    run_log.copy()
    fresh = tmp_path / "fresh"
    fresh.write_bytes(line("new"))
    fresh.replace(run_log.source)
    run_log.copy()
    assert (tmp_path / "console.log").read_bytes() == b"a long line that comes first\nnew\n"


def test_the_log_is_bounded(run_log: RunLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console_log, "MAX_LOG_BYTES", 100)
    for number in range(30):
        with run_log.source.open("ab") as source:
            source.write(line(f"line number {number}"))
        run_log.copy()
    sizes = [path.stat().st_size for path in tmp_path.glob("console.log*")]
    assert len(sizes) == 2 and max(sizes) <= 100
    assert (tmp_path / "console.log").read_bytes().endswith(b"line number 29\n")


def test_a_link_in_place_of_the_log_is_not_followed(run_log: RunLog, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    (tmp_path / "console.log").symlink_to(victim)
    run_log.source.write_bytes(line("one"))
    with pytest.raises(OSError, match="symbolic links"):
        run_log.copy()
    assert victim.read_text() == "untouched"


def test_finish_leaves_only_the_log(run_log: RunLog, tmp_path: Path) -> None:
    run_log.source.write_bytes(line("one"))
    run_log.finish()
    assert {path.name for path in tmp_path.iterdir()} == {"console.log", "console.times"}
