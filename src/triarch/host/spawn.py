"""Programs that outlive the daemon: started with few rights and only the descriptors they are given."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import msgspec

from triarch.errors import Failed
from triarch.host.pidfd import ProcessId
from triarch.host.process import find_program, program_environment
from triarch.host.syscalls import disable_huge_pages

FIRST_FD = 3


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """The user and groups that a program runs as. Leaving uid 0 behind drops every capability (capabilities(7))."""

    user_id: int
    group_id: int
    groups: tuple[int, ...] = ()


class Detached(msgspec.Struct, frozen=True, kw_only=True):
    """How to start a program that outlives the daemon.

    `fds` become descriptors `FIRST_FD`, `FIRST_FD + 1`, … of the program, in order; it inherits no others.
    `stderr_fd` takes its output and its errors; its input is empty. `process_id_fd` is a file into which the new
    process writes its `ProcessId` before the program begins, so that no crash of the caller can lose it.
    `cgroup_fds` are open `cgroup.procs` files, entered before the program begins. `max_file_bytes` bounds every file
    that it writes; beyond that its writes fail (EFBIG). Without `identity` it runs as the caller does. Without
    `huge_pages` its memory is in small pages, of which it holds no more than it touched.
    """

    argv: Sequence[str]
    fds: Sequence[int]
    stderr_fd: int
    process_id_fd: int
    cgroup_fds: Sequence[int] = ()
    identity: Identity | None = None
    max_file_bytes: int | None = None
    huge_pages: bool = True
    environment: Mapping[str, str] = {}


def spawn(program: Detached) -> ProcessId:
    """Start it in its own session and return when it has begun. Raises `MissingProgram` or `Failed`.

    It is a child of this process: call `reap` when it has ended (`host.pidfd` tells when). When this process ends
    first, init takes it over.
    """
    path = find_program(program.argv[0])
    environment = program_environment(program.environment)
    failure_fd, report_fd = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        _begin(program, path, environment, report_fd)
    os.close(report_fd)
    try:
        failure = os.read(failure_fd, 4096).decode(errors="replace")
    finally:
        os.close(failure_fd)
    if failure:
        os.waitpid(pid, 0)
        raise Failed(f"cannot start {program.argv[0]}: {failure}", program=program.argv[0])
    return _read_process_id(program.process_id_fd)


def _begin(program: Detached, path: str, environment: Mapping[str, str], report_fd: int) -> NoReturn:
    """In the child: only system calls from here to exec, because other threads' locks may be held for ever."""
    try:
        os.setsid()
        os.chdir("/")
        for fd in program.cgroup_fds:
            os.write(fd, b"0")
        os.write(program.process_id_fd, _describe_self())
        _limit(program.max_file_bytes)
        if not program.huge_pages:
            disable_huge_pages()
        if program.identity is not None:
            os.setgroups(program.identity.groups)
            os.setresgid(*(program.identity.group_id,) * 3)
            os.setresuid(*(program.identity.user_id,) * 3)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        report_fd = _arrange(program, report_fd)
        os.execve(path, list(program.argv), environment)
    except BaseException as error:  # noqa: BLE001 - the parent raises it
        os.write(report_fd, str(error).encode())
    finally:
        os._exit(127)


def _describe_self() -> bytes:
    """`PID START` of this process, from one read of its own stat file."""
    fd = os.open("/proc/self/stat", os.O_RDONLY)
    return f"{os.getpid()} {_start_ticks(os.read(fd, 1024))}\n".encode()


def _start_ticks(stat: bytes) -> int:
    # The second field is the program's name in parentheses and may hold anything; start time is field 22.
    return int(stat.rpartition(b")")[2].split()[19])


def _limit(max_file_bytes: int | None) -> None:
    """Memory of a guest never goes to a core file; a file that grows too long fails the write (EFBIG, no signal)."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if max_file_bytes is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        # The hard limit stays: the file may grow, and whoever may not change limits cannot use that.
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_file_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def _arrange(program: Detached, report_fd: int) -> int:
    """Move descriptors to their places, `report_fd` behind them (closed by exec), and return that one's.

    They go through high numbers first, because places and sources overlap.
    """
    above = FIRST_FD + len(program.fds) + 1
    null_fd = os.open("/dev/null", os.O_RDONLY)
    sources = (null_fd, program.stderr_fd, program.stderr_fd, *program.fds, report_fd)
    safe = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for fd in sources]
    for place, fd in enumerate(safe):
        os.dup2(fd, place, inheritable=place < above - 1)
    os.closerange(above, os.sysconf("SC_OPEN_MAX"))
    return above - 1


def _read_process_id(fd: int) -> ProcessId:
    pid, start_ticks = os.pread(fd, 100, 0).split()
    return ProcessId(pid=int(pid), start_ticks=int(start_ticks))


def read_process_id(path: Path) -> ProcessId | None:
    """What a program started by `spawn` left in its process id file; None while there is nothing."""
    try:
        pid, start_ticks = path.read_bytes().split()
        return ProcessId(pid=int(pid), start_ticks=int(start_ticks))
    except (OSError, ValueError):
        return None


def allow_longer_files(process: ProcessId, user_id: int | None, max_file_bytes: int) -> None:
    """Raise the bound on files of a process that `spawn` started as `user_id`, or as the caller. Raises `Failed`.

    Only the user himself, or a holder of CAP_SYS_RESOURCE, may (prlimit(2)): a child does it as that user.
    """
    pid = os.fork()
    if pid == 0:
        try:
            if user_id is not None:
                os.setresgid(user_id, user_id, user_id)
                os.setresuid(user_id, user_id, user_id)
            soft, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
            if soft not in (resource.RLIM_INFINITY, max_file_bytes):
                resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (max(soft, max_file_bytes), hard))
            os._exit(0)
        finally:
            os._exit(1)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0:
        raise Failed(f"cannot let process {process.pid} write longer files")


def reap(pid: int) -> None:
    """Take an ended child of this process off the process table; another's child is init's business."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
