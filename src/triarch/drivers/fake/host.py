"""The host of fake machines: one small file per machine, one per delta in use, and a feed of changes.

All of it is files, written whole, so that it outlives the daemon whenever that dies. Time is the monotonic clock, which
all processes of one boot share: a machine that sleeps for a second ends in a second, with nobody there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from triarch.errors import Busy
from triarch.model.driver import MachineSpec, Observation
from triarch.model.instance import Instance
from triarch.model.machine import Exit
from triarch.model.state import Status

KILLED = Exit(code=128 + 9, reason="killed")
_FILE = "fake.json"


class FakeMachine(msgspec.Struct, frozen=True, kw_only=True):
    """What the fake host knows of a machine. `pid` is None until it was started.

    A run ends at `ends_at` (monotonic seconds; None: never by itself) with `planned`, or earlier with `exit`.
    `on_terminate` is the exit code after a stop, None when it ignores one. Frozen at `frozen_at`, it is still until
    `thaws_at` unless it is thawed before.
    """

    uuid: str
    delta_path: str
    pid: int | None = None
    started_at: float = 0.0
    ends_at: float | None = None
    planned: Exit = Exit(code=0)
    on_terminate: int | None = 0
    paused_at: float | None = None
    frozen_at: float | None = None
    thaws_at: float = 0.0
    exit: Exit | None = None
    failed: bool = False
    devices: tuple[str, ...] = ()

    @property
    def end(self) -> Exit | None:
        """How the last run ended, None while it lasts or before the first."""
        if self.exit is None and self.paused_at is None and self.ends_at is not None and self.ends_at <= _now():
            return self.planned
        return self.exit

    @property
    def status(self) -> Status:
        if self.pid is None or self.end is not None:
            return Status.STOPPED
        return Status.RUNNING if self.paused_at is None else Status.PAUSED

    @property
    def is_on(self) -> bool:
        return self.status is not Status.STOPPED

    def observe(self) -> Observation:
        status = self.status
        pid = None if status is Status.STOPPED else self.pid
        return Observation(uuid=self.uuid, status=status, pid=pid, exit=self.end, failed=self.failed)

    def paused(self) -> FakeMachine:
        return msgspec.structs.replace(self, paused_at=_now())

    def resumed(self) -> FakeMachine:
        """Whatever was left of its time is still left."""
        assert self.paused_at is not None
        ends_at = None if self.ends_at is None else self.ends_at + _now() - self.paused_at
        return msgspec.structs.replace(self, paused_at=None, ends_at=ends_at)

    @property
    def is_frozen(self) -> bool:
        return self.frozen_at is not None and _now() < self.thaws_at

    def frozen(self, limit_seconds: float) -> FakeMachine:
        """Still for `limit_seconds` from now."""
        now = _now()
        frozen_at = self.frozen_at if self.is_frozen else now
        return msgspec.structs.replace(self, frozen_at=frozen_at, thaws_at=now + limit_seconds)

    def thawed(self) -> FakeMachine:
        return msgspec.structs.replace(self, frozen_at=None)

    @property
    def frozen_seconds(self) -> float:
        assert self.frozen_at is not None
        return _now() - self.frozen_at

    def ended(self, how: Exit, *, failed: bool = False) -> FakeMachine:
        """The run ends with `how`, unless it had ended already."""
        return msgspec.structs.replace(self, exit=self.end or how, failed=self.failed or failed)


def _now() -> float:
    return time.monotonic()


class FakeHost:
    """The files of one instance."""

    def __init__(self, instance: Instance) -> None:
        self._machines = instance.machine_run_dir("any").parent
        self._deltas = Path(instance.run_dir) / "fake" / "deltas"
        self._feed = Path(instance.run_dir) / "fake" / "changes"

    def find(self, spec: MachineSpec) -> FakeMachine | None:
        return _load(Path(spec.run_dir) / _FILE)

    def machines(self) -> Iterator[FakeMachine]:
        """All of this instance."""
        for path in self._machines.glob(f"*/{_FILE}"):
            machine = _load(path)
            if machine is not None:
                yield machine

    def find_uuid(self, uuid: str) -> FakeMachine | None:
        return _load(self._machines / uuid / _FILE)

    def save(self, spec: MachineSpec, machine: FakeMachine) -> None:
        path = Path(spec.run_dir) / _FILE
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write(path, msgspec.json.encode(machine))
        self._tell(machine.uuid)

    def remove(self, spec: MachineSpec) -> None:
        self.release(spec)
        shutil.rmtree(spec.run_dir, ignore_errors=True)
        self._tell(spec.uuid)

    def crash(self, spec: MachineSpec) -> None:
        """What a test does to see a machine die with nobody asking for it."""
        machine = self.find(spec)
        if machine is not None and machine.is_on:
            self.save(spec, machine.ended(KILLED, failed=True))

    # ---- one machine per delta

    def hold(self, spec: MachineSpec) -> None:
        """Take the delta: a link to the file of the machine that has it. Raises `Busy` while another's run lasts."""
        link = self._link_path(spec)
        holder = _load(link)
        if holder is not None and holder.is_on and holder.uuid != spec.uuid:
            raise Busy(f"cannot start machine '{spec.machine.name}': its delta is in use by machine {holder.uuid}")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(Path(spec.run_dir) / _FILE)

    def release(self, spec: MachineSpec) -> None:
        link = self._link_path(spec)
        if link.is_symlink() and link.readlink() == Path(spec.run_dir) / _FILE:
            link.unlink()

    def held_deltas(self) -> tuple[str, ...]:
        """The files of the machines that hold a delta."""
        return tuple(str(link.readlink()) for link in self._deltas.glob("*"))

    def _link_path(self, spec: MachineSpec) -> Path:
        return self._deltas / hashlib.sha256(os.fsencode(spec.delta_path)).hexdigest()[:32]

    # ---- changes, whoever makes them

    def feed_end(self) -> int:
        return self._feed.stat().st_size if self._feed.exists() else 0

    def changes(self, offset: int) -> tuple[list[str], int]:
        """The uuids that changed after `offset` of the feed, and its new end."""
        end = self.feed_end()
        if end == offset:
            return [], end
        with self._feed.open("rb") as feed:
            feed.seek(offset)
            return feed.read(end - offset).decode().split(), end

    def _tell(self, uuid: str) -> None:
        self._feed.parent.mkdir(parents=True, exist_ok=True)
        with self._feed.open("ab", buffering=0) as feed:
            feed.write(f"{uuid}\n".encode())


def _load(path: Path) -> FakeMachine | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=FakeMachine)
    except FileNotFoundError:
        return None


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all."""
    new = path.with_suffix(".new")
    new.write_bytes(data)
    new.replace(path)
