"""The QEMU processes that live now: who waits for an end hears of it, and what a run leaves on the host goes."""

from __future__ import annotations

import asyncio
import os
import signal
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from triarch.drivers.qemu.run import Record, Run
from triarch.errors import TimedOut, Unavailable
from triarch.host import cgroup
from triarch.host.console_log import STEP_SECONDS, ConsoleLog
from triarch.host.pidfd import ProcessId, open_process, send_signal
from triarch.host.spawn import reap
from triarch.model.driver import Observation

_KILL_SECONDS = 30.0
_GROUP_TRIES, _GROUP_PAUSE_SECONDS = 100, 0.01


@dataclass(slots=True)
class Watch:
    """One live QEMU; `ended` is done once it is gone and put away. While it only starts, its end is nobody's news."""

    run: Run
    record: Record
    process: ProcessId
    pidfd: int
    log: ConsoleLog
    starting: bool = False
    ended: asyncio.Future[Observation] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Watches:
    """All of one driver object, by machine. Ends are put into `ends` while someone consumes events."""

    def __init__(self) -> None:
        self._watches: dict[str, Watch] = {}
        self.ends: asyncio.Queue[Observation] | None = None
        self._next_look: asyncio.TimerHandle | None = None

    def take(self, run: Run, record: Record, *, starting: bool = False) -> Watch | None:
        """The watch of the machine's live QEMU, begun at the first call; None when it does not live (any more)."""
        watch = self._watches.get(record.uuid)
        process = run.process()
        if watch is not None and watch.process != process:
            self._settle(watch)
            watch = None
        if watch is not None or process is None:
            return watch
        pidfd = open_process(process)
        if pidfd is None:
            return None
        log = ConsoleLog(Path(record.log_path))
        watch = self._watches[record.uuid] = Watch(run, record, process, pidfd, log, starting)
        asyncio.get_running_loop().add_reader(pidfd, self._settle, watch)
        if self._next_look is None:
            self._look_after_logs()
        return watch

    def started(self, watch: Watch) -> None:
        """Its start succeeded: from now on, and if it has ended already, its end is news."""
        watch.starting = False
        if watch.ended.done():
            self._tell(watch)

    async def kill(self, watch: Watch) -> Observation:
        """SIGKILL, and wait until it is gone. Raises `TimedOut` for a process that the kernel cannot end."""
        send_signal(watch.process, signal.SIGKILL)
        try:
            async with asyncio.timeout(_KILL_SECONDS):
                return await asyncio.shield(watch.ended)
        except TimeoutError as error:
            raise TimedOut(
                f"QEMU of machine '{watch.record.name}' (pid {watch.process.pid}) has not ended "
                f"{_KILL_SECONDS:.0f} s after it was killed"
            ) from error

    def _look_after_logs(self) -> None:
        """What machines say is dated, and a machine that talks without end must not fill the disk."""
        for watch in self._watches.values():
            with suppress(OSError):
                watch.log.look_after()
        later = asyncio.get_running_loop().call_later
        self._next_look = later(STEP_SECONDS, self._look_after_logs) if self._watches else None

    def close(self) -> None:
        """Look no longer; the machines run on."""
        if self._next_look is not None:
            self._next_look.cancel()
            self._next_look = None
        for watch in self._watches.values():
            self._drop(watch)
        self._watches.clear()

    def _settle(self, watch: Watch) -> None:
        """QEMU is gone: put away what it used, say how it ended."""
        if self._watches.pop(watch.record.uuid, None) is None:
            return
        self._drop(watch)
        with suppress(OSError):
            watch.log.look_after()
        reap(watch.process.pid)
        watch.run.remove_sockets()
        watch.ended.set_result(watch.run.ending(watch.record))
        if not watch.starting:
            self._tell(watch)

    def _tell(self, watch: Watch) -> None:
        if self.ends is not None:
            self.ends.put_nowait(watch.ended.result())

    def _drop(self, watch: Watch) -> None:
        asyncio.get_running_loop().remove_reader(watch.pidfd)
        os.close(watch.pidfd)


async def remove_group(path: str) -> None:
    """Remove the machine's control group, and the instance's when it was the last. Absent is success."""
    with suppress(Unavailable):
        for _ in range(_GROUP_TRIES):
            if cgroup.remove(path):
                break
            await asyncio.sleep(_GROUP_PAUSE_SECONDS)
        cgroup.remove_if_empty(str(PurePosixPath(path).parent))
