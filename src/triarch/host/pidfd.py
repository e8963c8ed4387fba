"""Processes that are not our children, held so that a reused process id is never mistaken for them."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

_START_TIME_FIELD = 22 - 3  # counted after the name, which may hold anything (proc_pid_stat(5))


class ProcessId(msgspec.Struct, frozen=True, kw_only=True):
    """A process for as long as the host is up: its id and when it began (clock ticks since boot)."""

    pid: int
    start_ticks: int


def process_id(pid: int) -> ProcessId | None:
    """Who `pid` is now; None when there is no such process (a zombie still is one)."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    return ProcessId(pid=pid, start_ticks=int(stat.rpartition(")")[2].split()[_START_TIME_FIELD]))


def open_process(process: ProcessId) -> int | None:
    """A pidfd of exactly this process, or None when it has been reaped."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return None
    if process_id(process.pid) == process:
        return pidfd
    os.close(pidfd)
    return None


def has_ended(pidfd: int) -> bool:
    """A pidfd is readable once the process has ended (reaped or not)."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def is_alive(process: ProcessId) -> bool:
    """Whether it runs: a zombie does not."""
    pidfd = open_process(process)
    if pidfd is None:
        return False
    try:
        return not has_ended(pidfd)
    finally:
        os.close(pidfd)


def send_signal(process: ProcessId, number: int) -> bool:
    """Signal exactly this process; False when it is gone."""
    pidfd = open_process(process)
    if pidfd is None:
        return False
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(pidfd)
    return True


async def wait_for_end(process: ProcessId) -> None:
    """Return when the process has ended."""
    # The fork server imports this module and must stay small.
    import asyncio

    pidfd = open_process(process)
    if pidfd is None:
        return
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    loop.add_reader(pidfd, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


def find_by_argument(argument: str) -> tuple[ProcessId, ...]:
    """Every process that has `argument` as one whole word of its command line."""
    wanted = os.fsencode(argument)
    found = (process_id(pid) for pid, words in command_lines() if wanted in words)
    return tuple(process for process in found if process is not None)


def command_lines() -> Iterator[tuple[int, list[bytes]]]:
    """The words that each process of the host was begun with."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            yield int(entry.name), (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue


def parent_of(pid: int) -> int:
    """The parent's process id; 0 when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return 0
    return int(stat.rpartition(")")[2].split()[1])


def members(pids: Iterable[int], number: int, number_of: Callable[[int], int]) -> tuple[ProcessId, ...]:
    """Those of `pids` whose session (`os.getsid`) or process group (`os.getpgid`) has this number."""
    found = []
    for pid in pids:
        process = process_id(pid)
        with suppress(ProcessLookupError):
            if process is not None and number_of(pid) == number:
                found.append(process)
    return tuple(found)
