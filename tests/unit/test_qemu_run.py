"""How a run ended, from the files that QEMU and the guest left: every way, and hostile ones."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from triarch.drivers.qemu.cmdline import REASON_TRACE, STATE_TRACE
from triarch.drivers.qemu.run import Record, Run, runs
from triarch.errors import Damaged
from triarch.guest.keys import AgentKeys
from triarch.guest.protocol import FrameType
from triarch.model.driver import Observation
from triarch.model.instance import instance_at
from triarch.model.state import Status
from triarch.model.template import Init

KEYS = AgentKeys(host_key=b"h", host_public_key="hp", client_key="c", client_public_key="cp")


def frame(kind: FrameType, payload: bytes = b"") -> bytes:
    return bytes((kind,)) + len(payload).to_bytes(4, "big") + payload


def exit_frame(code: int, reason: bytes = b"") -> bytes:
    return frame(FrameType.EXIT, code.to_bytes(4, "big") + reason)


class Scene:
    """A run over whose files a test has the say."""

    def __init__(self, root: Path, init: Init = Init.APP) -> None:
        self.log = root / "console.log"
        self.run = Run(root, root)
        self.log.write_bytes(b"Kernel panic of an earlier run\n")
        self.record = Record(
            uuid="u",
            name="web",
            architecture="hosted",
            init=init,
            cgroup="/none",
            log_path=str(self.log),
            log_offset_bytes=self.log.stat().st_size,
            keys=KEYS,
        )
        self.run.write_record(self.record)

    def say(self, *, report: bytes = b"", qemu: str = "", console: bytes = b"") -> Observation:
        self.run.report.write_bytes(report)
        self.run.qemu_log.write_text(qemu)
        with self.log.open("ab") as log:
            log.write(console)
        return self.run.ending(self.record)


PAUSED = f"{STATE_TRACE} current_run_state 9 (running) new_state 4 (paused)\n"


def powered_off(reason: int = 6) -> str:
    return f"{REASON_TRACE} reason={reason}\n{SHUT_DOWN}"


# A restart is an end without a reason, because of -no-reboot.
SHUT_DOWN = f"{STATE_TRACE} current_run_state 9 (running) new_state 11 (shutdown)\n"


def test_the_guest_told_its_exit(tmp_path: Path) -> None:
    ending = Scene(tmp_path).say(report=frame(FrameType.READY) + exit_frame(42, b"done"), qemu=powered_off())
    assert ending.exit is not None
    assert (ending.status, ending.exit.code, ending.exit.reason, ending.failed) == (Status.STOPPED, 42, "done", False)


def test_the_exit_counts_even_when_qemu_was_killed_after_it(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.run.note_killed()
    ending = scene.say(report=exit_frame(7))
    assert ending.exit is not None and ending.exit.code == 7


def test_killed_by_us_is_no_failure(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.run.note_killed()
    ending = scene.say(report=frame(FrameType.READY))
    assert ending.exit is not None
    assert (ending.exit.code, ending.failed) == (137, False)


def test_killed_by_another_is_a_failure_with_qemus_last_word(tmp_path: Path) -> None:
    ending = Scene(tmp_path).say(report=frame(FrameType.READY), qemu=f"qemu-system-x86_64: out of luck\n{PAUSED}")
    assert ending.failed and "out of luck" in ending.detail


def test_a_system_machine_powers_off(tmp_path: Path) -> None:
    ending = Scene(tmp_path, Init.SYSTEM).say(report=frame(FrameType.READY), qemu=powered_off())
    assert ending.exit is not None
    assert (ending.exit.code, ending.failed) == (0, False)


def test_a_system_machine_restarts(tmp_path: Path) -> None:
    ending = Scene(tmp_path, Init.SYSTEM).say(qemu=SHUT_DOWN)
    assert ending.exit is not None and not ending.failed and ending.exit.reason == "rebooted"


def test_a_panic_is_a_failure_with_the_last_line(tmp_path: Path) -> None:
    console = (
        b"[    1.0] Kernel panic - not syncing: \x1b[31mVFS\x1b[0m\r\n[    1.1] ---[ end Kernel panic ]---\r\n\r\n"
    )
    ending = Scene(tmp_path, Init.SYSTEM).say(qemu=SHUT_DOWN, console=console)
    assert ending.failed and ending.detail == "the guest panicked: [    1.1] ---[ end Kernel panic ]---"


def test_a_guest_that_gave_up_says_why(tmp_path: Path) -> None:
    ending = Scene(tmp_path).say(report=frame(FrameType.PROBLEM, b"cannot mount\n\x1b[2J"), qemu=powered_off())
    assert ending.failed and ending.detail == "the guest gave up: cannot mount??[2J"


def test_an_app_that_powers_off_without_a_word_is_a_failure(tmp_path: Path) -> None:
    ending = Scene(tmp_path).say(report=frame(FrameType.READY), qemu=powered_off(), console=b"last words\n")
    assert ending.failed and "last words" in ending.detail


@pytest.mark.parametrize(
    "report", [b"\xff" * 100, os.urandom(3 << 20), frame(FrameType.READY) + b"\x14\xff\xff\xff\xff"]
)
def test_a_hostile_report_tells_nothing(tmp_path: Path, report: bytes) -> None:
    ending = Scene(tmp_path).say(report=report, qemu=powered_off())
    assert ending.status is Status.STOPPED
    assert ending.failed


def test_a_record_is_for_its_owner_alone_and_comes_back(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    assert scene.run.record() == scene.record
    assert (tmp_path / "run.json").stat().st_mode & 0o777 == 0o600


def test_a_damaged_record_is_an_error_of_ours(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(Damaged):
        scene.run.record()


def test_remove_leaves_nothing_and_may_be_repeated(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    for each in scene.run.listen():
        each.close()
    scene.say(report=b"x", qemu="y")
    scene.run.note_killed()
    scene.run.process_path.write_text("1 1\n")
    scene.run.remove()
    scene.run.remove()
    assert [path.name for path in tmp_path.iterdir()] == ["console.log"]


def test_runs_finds_its_own_architecture_only(tmp_path: Path) -> None:
    instance = msgspec.structs.replace(instance_at(tmp_path / "state"), run_dir=str(tmp_path / "run"))
    assert runs(instance, "hosted") == []
    for uuid in ("one", "two"):
        directory = instance.machine_run_dir(uuid)
        directory.mkdir(parents=True)
        scene = Scene(directory)
        scene.run.write_record(msgspec.structs.replace(scene.record, uuid=uuid))
    assert [record.uuid for _, record in runs(instance, "hosted")] == ["one", "two"]
    assert runs(instance, "kvm") == []
