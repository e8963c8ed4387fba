"""What a run leaves in `run_dir`, so that any daemon can take it over."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from triarch.host.pidfd import ProcessId
from triarch.model.driver import MachineSpec
from triarch.model.machine import Exit
from triarch.model.network import BridgeLink
from triarch.model.template import Init

RECORD = "container.json"


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One run. Written once the container exists, and again, with `exit`, once all of it is put away."""

    uuid: str
    init: Init
    monitor: ProcessId
    first: ProcessId
    cgroup: str
    delta_path: str
    host_interface: str | None
    log_path: str
    state_dir: str
    terminal: bool
    exit: Exit | None = None
    failed: bool = False


class RunFiles(msgspec.Struct, frozen=True, kw_only=True):
    """The files of one machine's `run_dir`."""

    run_dir: Path

    @property
    def record(self) -> Path:
        return self.run_dir / RECORD

    @property
    def config(self) -> Path:
        return self.run_dir / "config.json"

    @property
    def runtime_root(self) -> Path:
        """crun's state: a directory for each machine, so that deleting it is deleting all of it."""
        return self.run_dir / "crun"

    def start_fifo(self, uuid: str) -> Path:
        return self.runtime_root / uuid / "exec.fifo"

    def compiled_filter(self, uuid: str) -> Path:
        return self.runtime_root / uuid / "seccomp.bpf"

    @property
    def exit_dir(self) -> Path:
        return self.run_dir / "exit"

    def exit(self, uuid: str) -> Path:
        """conmon's last word: the exit code as text."""
        return self.exit_dir / uuid

    @property
    def out_of_memory(self) -> Path:
        """conmon makes this when the kernel killed something in the container for its memory limit."""
        return self.run_dir / "oom"

    @property
    def ending(self) -> Path:
        """Made before a machine is asked or forced to end: its end is then no failure."""
        return self.run_dir / "ending"

    @property
    def monitor_pid(self) -> Path:
        return self.run_dir / "conmon.pid"

    @property
    def first_pid(self) -> Path:
        return self.run_dir / "first.pid"

    @property
    def attach_socket(self) -> Path:
        return self.run_dir / "attach"

    @property
    def control_fifo(self) -> Path:
        return self.run_dir / "ctl"


def files_of(spec: MachineSpec) -> RunFiles:
    return RunFiles(run_dir=Path(spec.run_dir))


def interface_of(spec: MachineSpec) -> str | None:
    return spec.link.host_interface if isinstance(spec.link, BridgeLink) else None


def read_record(files: RunFiles) -> Record | None:
    """The run that this directory tells of; None when there was none, or when it never came to exist."""
    try:
        return msgspec.json.decode(files.record.read_bytes(), type=Record)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def write_record(files: RunFiles, record: Record) -> None:
    """Replace the record in one step."""
    draft = files.record.with_suffix(".new")
    draft.write_bytes(msgspec.json.encode(record))
    os.replace(draft, files.record)  # noqa: PTH105
