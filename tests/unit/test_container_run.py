"""How a run ended, from what it left behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from triarch.drivers.container.record import Record, RunFiles, read_record, write_record
from triarch.drivers.container.run import how_it_ended
from triarch.host.pidfd import ProcessId
from triarch.model.machine import Exit
from triarch.model.template import Init

APP, SYSTEM = Init.APP, Init.SYSTEM


def record(init: Init) -> Record:
    gone = ProcessId(pid=1 << 30, start_ticks=0)
    return Record(
        uuid="u",
        init=init,
        monitor=gone,
        first=gone,
        cgroup="/none",
        delta_path="/none",
        host_interface=None,
        log_path="/none",
        state_dir="/none",
        terminal=False,
    )


@pytest.fixture
def files(tmp_path: Path) -> RunFiles:
    made = RunFiles(run_dir=tmp_path)
    made.exit_dir.mkdir()
    return made


@pytest.mark.parametrize(
    ("init", "code", "asked", "expected", "failed"),
    [
        (APP, 0, False, Exit(code=0), False),
        (APP, 42, True, Exit(code=42), False),
        (APP, 137, True, Exit(code=137, reason="killed"), False),
        (APP, 137, False, Exit(code=137), False),
        (APP, None, True, Exit(code=137, reason="killed"), False),
        (SYSTEM, 0, True, Exit(code=0), False),
        (SYSTEM, 1, False, Exit(code=1), False),
        (SYSTEM, 130, True, Exit(code=0, reason="powered off"), False),
        (SYSTEM, 130, False, Exit(code=0, reason="powered off"), False),
        (SYSTEM, 129, False, Exit(code=0, reason="rebooted"), False),
        (SYSTEM, 137, True, Exit(code=137, reason="killed"), False),
        (SYSTEM, 137, False, Exit(code=137, reason="its init was ended by signal 9"), True),
    ],
)
def test_ends(files: RunFiles, init: Init, code: int | None, asked: bool, expected: Exit, failed: bool) -> None:
    if code is not None:
        files.exit("u").write_text(str(code))
    if asked:
        files.ending.touch()
    assert how_it_ended(record(init), files) == (expected, failed)


@pytest.mark.parametrize("init", list(Init))
def test_a_monitor_that_left_nothing(files: RunFiles, init: Init) -> None:
    exit_, failed = how_it_ended(record(init), files)
    assert exit_.code is None and "monitor" in exit_.reason
    assert failed


def test_out_of_memory(files: RunFiles) -> None:
    files.exit("u").write_text("137")
    files.out_of_memory.touch()
    assert how_it_ended(record(APP), files) == (Exit(code=137, reason="out of memory"), True)


def test_records(files: RunFiles) -> None:
    assert read_record(files) is None
    write_record(files, record(APP))
    assert read_record(files) == record(APP)
    files.record.write_bytes(b'{"uuid": "half')
    assert read_record(files) is None
