"""One run of a container: watching it, and putting everything away once it has ended."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from triarch.drivers.container.log import LogPump, RunLog
from triarch.drivers.container.monitor import exit_code
from triarch.drivers.container.record import Record, RunFiles, read_record, write_record
from triarch.errors import Busy, Failed, NotFound, TimedOut
from triarch.host import cgroup
from triarch.host.locks import lock_file
from triarch.host.netlink import Netlink
from triarch.host.pidfd import ProcessId, find_by_argument, is_alive, process_id, send_signal, wait_for_end
from triarch.model.driver import Observation
from triarch.model.machine import Exit
from triarch.model.state import Status
from triarch.model.template import Init

_GONE_SECONDS = 10.0
_POLL_SECONDS = 0.003
_KILLED = 128 + signal.SIGKILL


class Run:
    """A run that was alive when this object was made. `ended` is set once it is put away."""

    def __init__(self, record: Record, files: RunFiles, pump: LogPump, on_end: Callable[[Run], None]) -> None:
        self.record = record
        self.files = files
        self._pump = pump
        self._log = RunLog(record.state_dir, record.log_path)
        self._on_end = on_end
        self._task: asyncio.Task[None] | None = None

    def watch(self) -> None:
        """Put it away as soon as it ends."""
        self._pump.follow(self._log)
        self._task = asyncio.create_task(self._until_put_away())

    async def put_away(self) -> None:
        """Return when the run has ended and nothing of it is left but its record."""
        assert self._task is not None
        await asyncio.shield(self._task)

    def leave(self) -> None:
        """Stop watching; the machine runs on."""
        self._pump.leave(self._log)
        if self._task is not None:
            self._task.cancel()

    def signal(self, number: int) -> None:
        """Signal the first process. Ends that this causes are no failures."""
        self.files.ending.touch()
        send_signal(self.record.first, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        # A frozen process of a version 1 group does not die before it is thawed.
        cgroup.set_frozen(self.record.cgroup, False)

    def observe(self) -> Observation:
        """What the host says of it now."""
        return observation(self.record, self.files)

    async def _until_put_away(self) -> None:
        await wait_for_end(self.record.monitor)
        # The monitor does not outlive its container; where it was killed, the container must not outlive it.
        if is_alive(self.record.first):
            send_signal(self.record.first, signal.SIGKILL)
            cgroup.set_frozen(self.record.cgroup, False)
        await wait_for_end(self.record.first)
        try:
            self.record = await finish(self.record, self.files)
        finally:
            # Told even when something is left over: whoever acts on the machine next tries again, and hears why.
            self._pump.leave(self._log)
            with suppress(OSError):
                self._log.finish()
            self._on_end(self)


async def finish(record: Record, files: RunFiles) -> Record:
    """Put away what a run that has ended left on the host, and write how it ended. Idempotent.

    Raises `Failed` or `Busy` when something does not go away.
    """
    kept = read_record(files)
    if kept is not None and kept.exit is not None and kept.monitor == record.monitor:
        return kept
    exit_, failed = how_it_ended(record, files)
    await release(record.cgroup, record.host_interface)
    await until_free(record.delta_path)
    ended = msgspec.structs.replace(record, exit=exit_, failed=failed)
    if files.run_dir.is_dir():
        # Before the files, among which is the only other one that knows the exit.
        write_record(files, ended)
        remove_files(files)
    return ended


def how_it_ended(record: Record, files: RunFiles) -> tuple[Exit, bool]:
    """The exit of a run, and whether it is a failure."""
    code = exit_code(files.exit(record.uuid))
    asked = files.ending.exists()
    if code is None:
        if asked:
            return Exit(code=_KILLED, reason="killed"), False
        return Exit(code=None, reason="its monitor was killed, so the machine was ended too"), True
    if files.out_of_memory.exists() and code == _KILLED:
        return Exit(code=code, reason="out of memory"), True
    if record.init is Init.APP or code < 128:
        return Exit(code=code, reason="killed" if asked and code == _KILLED else ""), False
    # The kernel ends an init that calls reboot(2) by a signal (pid_namespaces(7)).
    if code == 128 + signal.SIGINT:
        return Exit(code=0, reason="powered off"), False
    if code == 128 + signal.SIGHUP:
        return Exit(code=0, reason="rebooted"), False
    return Exit(code=code, reason="killed" if asked else f"its init was ended by signal {code - 128}"), not asked


def observation(record: Record, files: RunFiles) -> Observation:
    """What the host says now of the run in `record`."""
    if record.exit is not None:
        return Observation(
            uuid=record.uuid,
            status=Status.STOPPED,
            exit=record.exit,
            failed=record.failed,
            detail=record.exit.reason,
        )
    if not is_alive(record.monitor):
        exit_, failed = how_it_ended(record, files)
        return Observation(
            uuid=record.uuid, status=Status.STOPPED, exit=exit_, failed=failed, detail="not all of it is put away"
        )
    if files.start_fifo(record.uuid).exists():
        return Observation(uuid=record.uuid, status=Status.STOPPED, detail="its start was interrupted")
    frozen = cgroup.is_frozen(record.cgroup)
    return Observation(uuid=record.uuid, status=Status.PAUSED if frozen else Status.RUNNING, pid=record.first.pid)


async def release(cgroup_path: str, host_interface: str | None) -> None:
    """Return when neither interface nor control groups are left. Raises `Failed`."""
    if host_interface is not None:
        _delete_interface(host_interface)
    deadline = time.monotonic() + _GONE_SECONDS
    while not cgroup.remove(cgroup_path):
        if time.monotonic() > deadline:
            raise Failed(f"control group {cgroup_path} does not get empty")
        cgroup.kill_all(cgroup_path)
        await asyncio.sleep(_POLL_SECONDS)


async def until_free(delta_path: str, wait_seconds: float = _GONE_SECONDS) -> None:
    """Wait until nothing holds the delta's lock: the kernel undoes a dead machine's mounts a little later.

    Raises `Busy` when that takes too long; an absent delta is free.
    """
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            os.close(lock_file(delta_path))
            return
        except NotFound:
            return
        except Busy:
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(_POLL_SECONDS)


def remove_files(files: RunFiles) -> None:
    """Empty `run_dir`, but for the record."""
    if not files.run_dir.is_dir():
        return
    for path in files.run_dir.iterdir():
        if path == files.record:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


async def sweep(run_dir: Path, cgroup_path: str) -> None:
    """End every process of a run that has no record: a start that was interrupted. Raises `TimedOut`.

    They are found by the bundle's directory, an argument of conmon and of crun, and by their control group.
    """
    deadline = time.monotonic() + _GONE_SECONDS
    while found := {*find_by_argument(str(run_dir)), *_members(cgroup_path)}:
        if time.monotonic() > deadline:
            raise TimedOut(f"processes of {run_dir} do not end: {', '.join(str(process.pid) for process in found)}")
        for process in found:
            send_signal(process, signal.SIGKILL)
        cgroup.set_frozen(cgroup_path, False)
        with suppress(TimeoutError):
            async with asyncio.timeout(1):
                await asyncio.gather(*(wait_for_end(process) for process in found))


def _members(cgroup_path: str) -> set[ProcessId]:
    return {process for pid in cgroup.pids_in(cgroup_path) if (process := process_id(pid)) is not None}


def _delete_interface(name: str) -> None:
    with Netlink() as host:
        index = host.index_of(name)
        if index is not None:
            with suppress(NotFound):
                host.delete(index)
