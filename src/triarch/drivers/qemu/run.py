"""One run of a VM as files, so that any daemon can tell what it is, whether it lives, and how it ended.

`run.json` is written before QEMU exists; `process` is written by QEMU's own process before its program begins; QEMU
itself appends to `qemu.log` and `report`. Those two are on disk and not in `run_dir`, because a guest can make them
long and `run_dir` is memory.
"""

from __future__ import annotations

import os
import re
import socket
from contextlib import suppress
from pathlib import Path

import msgspec

from triarch.drivers.qemu.cmdline import REASON_TRACE, STATE_TRACE
from triarch.errors import Damaged
from triarch.guest.keys import AgentKeys
from triarch.guest.protocol import Ended, GuestDecoder, GuestProblem
from triarch.host.pidfd import ProcessId, is_alive
from triarch.host.spawn import read_process_id
from triarch.model.driver import MachineSpec, Observation
from triarch.model.instance import Instance
from triarch.model.machine import Exit
from triarch.model.state import Status
from triarch.model.template import Init

_RECORD = "run.json"
_KILLED = "killed"
# What is known of each virtiofsd: its log, its process.
FOLDER_FILES = "folder-"
_TAIL_BYTES = 8192
_REPORT_BYTES = 1 << 20
_REASON = re.compile(rf"{REASON_TRACE} reason=(\d+)")
_SHUT_DOWN = re.compile(rf"{STATE_TRACE} .*\(shutdown\)")
_STRANGE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[^\x20-\x7e]")
_PANIC = "Kernel panic"

# ShutdownCause of qapi/run-state.json: the guest powered off; it restarted or panicked.
_GUEST_SHUTDOWN, _GUEST_RESET, _GUEST_PANIC = 6, 7, 8


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What a later daemon must know of a run. It holds the agent's keys and is readable for the daemon alone."""

    uuid: str
    name: str
    architecture: str
    init: Init
    cgroup: str
    log_path: str
    log_offset_bytes: int
    keys: AgentKeys
    pack: str = ""


def new_record(spec: MachineSpec, architecture: str, keys: AgentKeys) -> Record:
    """The record of a run that begins now. A guest pack is known by its directory, which no other content has."""
    log_path = Path(spec.log_path)
    return Record(
        uuid=spec.uuid,
        name=spec.machine.name,
        architecture=architecture,
        init=spec.machine.init,
        cgroup=spec.cgroup,
        log_path=spec.log_path,
        log_offset_bytes=log_path.stat().st_size if log_path.exists() else 0,
        keys=keys,
        pack="" if spec.guest_pack is None else Path(spec.guest_pack.kernel_path).parent.name,
    )


class Run:
    """The files of the run in `run_dir`. Constructing it touches nothing."""

    def __init__(self, run_dir: Path, state_dir: Path) -> None:
        self.directory = run_dir
        self.monitor = run_dir / "monitor.sock"
        self.console = run_dir / "console.sock"
        self.agent = run_dir / "agent.sock"
        self.control = run_dir / "control.sock"
        self.process_path = run_dir / "process"
        self.report = state_dir / "report"
        self.qemu_log = state_dir / "qemu.log"

    @classmethod
    def of(cls, spec: MachineSpec) -> Run:
        return cls(Path(spec.run_dir), Path(spec.state_dir))

    @property
    def _sockets(self) -> tuple[Path, ...]:
        return (self.monitor, self.console, self.agent, self.control)

    def record(self) -> Record | None:
        """None when QEMU was never about to start here, or another driver runs the machine."""
        try:
            return msgspec.json.decode((self.directory / _RECORD).read_bytes(), type=Record)
        except FileNotFoundError:
            return None
        except msgspec.MsgspecError as error:
            raise Damaged(f"{self.directory / _RECORD} is damaged: {error}") from error

    def write_record(self, record: Record) -> None:
        path = self.directory / _RECORD
        temporary = path.with_suffix(".new")
        temporary.touch(mode=0o600)
        temporary.write_bytes(msgspec.json.encode(record))
        temporary.rename(path)

    @property
    def begun(self) -> bool:
        """Whether QEMU's process ever existed."""
        return read_process_id(self.process_path) is not None

    def process(self) -> ProcessId | None:
        """QEMU's process, if it is alive."""
        process = read_process_id(self.process_path)
        return process if process is not None and is_alive(process) else None

    def listen(self) -> tuple[socket.socket, ...]:
        """The sockets of monitor, console, agent and control, listening: who connects now is served once QEMU is up."""
        opened: list[socket.socket] = []
        try:
            for path in self._sockets:
                path.unlink(missing_ok=True)
                opened.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                opened[-1].bind(os.fspath(path))
                opened[-1].listen(4)
        except BaseException:
            for each in opened:
                each.close()
            raise
        return tuple(opened)

    def note_killed(self) -> None:
        """The end that follows was asked for."""
        (self.directory / _KILLED).touch()

    def remove_sockets(self) -> None:
        for path in self._sockets:
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """Forget the run. Absent is success."""
        self.remove_sockets()
        for path in (self.process_path, self.directory / _KILLED, self.report, self.qemu_log):
            path.unlink(missing_ok=True)
        for path in self.directory.glob(f"{FOLDER_FILES}*"):
            path.unlink(missing_ok=True)
        # Last, so that what a crash leaves is still known to be ours.
        (self.directory / _RECORD).unlink(missing_ok=True)

    def complaint(self) -> str:
        """The last thing that QEMU said on standard error, but for its trace lines."""
        lines = (line.strip() for line in reversed(_tail(self.qemu_log).splitlines()))
        return next((line for line in lines if line and REASON_TRACE not in line and STATE_TRACE not in line), "")

    def ending(self, record: Record) -> Observation:
        """How a run that is over ended, from what QEMU and the guest left in files."""
        told = self._told()
        if isinstance(told, Ended):
            return _ended(record, told.exit)
        if (self.directory / _KILLED).exists():
            return _ended(record, Exit(code=137, reason="killed"))
        last_line = _last_line(record)
        if isinstance(told, GuestProblem):
            return _failed(record, f"the guest gave up: {told.text}")
        match self._shutdown_reason():
            case None:
                return _failed(record, f"QEMU was killed or crashed: {self.complaint() or 'it said nothing'}")
            case cause if cause == _GUEST_PANIC or _PANIC in _tail(Path(record.log_path), record.log_offset_bytes):
                return _failed(record, f"the guest panicked: {last_line}")
            case _ if record.init is Init.APP:
                return _failed(record, f"the guest ended without an exit code; it said last: {last_line}")
            case cause if cause == _GUEST_RESET:
                return _ended(record, Exit(code=0, reason="rebooted"))
            case cause if cause == _GUEST_SHUTDOWN:
                return _ended(record, Exit(code=0, reason="powered off"))
            case cause:
                return _failed(record, f"QEMU was told to end by something else (cause {cause})")

    @property
    def exit_told(self) -> bool:
        """Whether the command's exit is on file: the delta is put away then, and nothing is lost with QEMU."""
        return isinstance(self._told(), Ended)

    def _told(self) -> Ended | GuestProblem | None:
        """The last word of the guest in its report. What it wrote is hostile: only the beginning is read."""
        with suppress(OSError, Damaged), self.report.open("rb") as file:
            messages = GuestDecoder().feed(file.read(_REPORT_BYTES))
            return next((m for m in reversed(messages) if isinstance(m, Ended | GuestProblem)), None)
        return None

    def _shutdown_reason(self) -> int | None:
        """The cause of an orderly end; None when QEMU had no time for one."""
        said = _tail(self.qemu_log)
        reasons = _REASON.findall(said)
        if reasons:
            return int(reasons[-1])
        return _GUEST_RESET if _SHUT_DOWN.search(said) else None


def runs(instance: Instance, architecture: str) -> list[tuple[Run, Record]]:
    """Every run of this architecture that the instance's run directories know."""
    found = []
    for path in sorted(instance.machine_run_dir("x").parent.glob(f"*/{_RECORD}")):
        run = Run(path.parent, instance.machine_state_dir(path.parent.name))
        record = run.record()
        if record is not None and record.architecture == architecture:
            found.append((run, record))
    return found


def _ended(record: Record, how: Exit) -> Observation:
    return Observation(uuid=record.uuid, status=Status.STOPPED, exit=how, detail=how.reason)


def _failed(record: Record, detail: str) -> Observation:
    how = Exit(code=None, reason=detail)
    return Observation(uuid=record.uuid, status=Status.STOPPED, exit=how, failed=True, detail=detail)


def _last_line(record: Record) -> str:
    lines = _tail(Path(record.log_path), record.log_offset_bytes).splitlines()
    cleaned = (_STRANGE.sub("", line).strip() for line in reversed(lines))
    return next((line[:300] for line in cleaned if line), "nothing")


def _tail(path: Path, offset_bytes: int = 0) -> str:
    """The end of a file, but nothing from before `offset_bytes`; a shorter one was begun anew meanwhile."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(offset_bytes if offset_bytes <= size else 0, size - _TAIL_BYTES))
            return file.read(_TAIL_BYTES).decode(errors="replace")
    except OSError:
        return ""
