"""Commands in a running machine, by `crun exec`."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from triarch.drivers.base import Stdio
from triarch.drivers.container.account import look_up
from triarch.drivers.container.config import exec_process
from triarch.drivers.container.record import files_of
from triarch.drivers.container.refusal import refusal
from triarch.drivers.container.streams import copy_until, pipe_for_child, readable, write_all
from triarch.errors import MachineFailed
from triarch.host.cgroup import pids_in
from triarch.host.child import Child
from triarch.host.pidfd import ProcessId, command_lines, members, parent_of, send_signal
from triarch.host.terminal import set_window_size
from triarch.model.account import Account, NoSuchUser
from triarch.model.driver import (
    NOT_EXECUTABLE_CODE,
    TIMED_OUT_CODE,
    TIMEOUT_GRACE_SECONDS,
    Data,
    EndOfInput,
    ExecRequest,
    MachineSpec,
    Resize,
    Stream,
)
from triarch.model.machine import Exit

_RUNTIME_FAILED = 255
_HANGUP_SECONDS = 0.3
_LOOK_SECONDS = 0.05
_TERMINAL_SECONDS = 0.2
_numbers = itertools.count()


async def run_exec(spec: MachineSpec, first: ProcessId, request: ExecRequest, stdio: Stdio, crun: str) -> Exit:
    """As `Exec.exec`, for a machine that runs; `first` is its first process."""
    try:
        account, request = await look_up(first, spec, request)
    except NoSuchUser as error:
        await stdio.write(Stream.STDERR, f"triarch: {error}\n".encode())
        return Exit(code=NOT_EXECUTABLE_CODE, reason=str(error))
    with ExitStack() as stack:
        session = _Session(spec, request, account, stdio, crun, stack)
        await session.start()
        try:
            code = await session.converse()
        except BaseException:
            await asyncio.shield(session.end())
            raise
        return session.exit(code)


async def end_orphans(cgroups: Mapping[str, str]) -> None:
    """Hang up, then kill, the commands of a daemon that has died: their far ends died with it.

    `cgroups` is each machine's control group by its runtime root. Terminals were hung up by the kernel already.
    """
    options = {os.fsencode(f"--root={root}"): cgroup for root, cgroup in cgroups.items()}
    orphans = []
    for pid, words in command_lines():
        cgroup = next((options[word] for word in words if word in options), None)
        if cgroup is not None and b"exec" in words and parent_of(pid) != os.getpid():
            for command in (each for each in pids_in(cgroup) if parent_of(each) == pid):
                with suppress(ProcessLookupError):
                    orphans.append(_Kin(cgroup, os.getsid(command), os.getsid))
    if sum(orphan.signal(signal.SIGHUP) for orphan in orphans):
        await asyncio.sleep(_HANGUP_SECONDS)
        for orphan in orphans:
            orphan.signal(signal.SIGKILL)


class _Session:
    """One command: its files, its process, and the pumps between it and the far end."""

    def __init__(
        self, spec: MachineSpec, request: ExecRequest, account: Account, stdio: Stdio, crun: str, stack: ExitStack
    ) -> None:
        self._spec = spec
        self._request = request
        self._account = account
        self._stdio = stdio
        self._crun = crun
        self._stack = stack
        self._pid_fd = self._memory_file("pid")
        self._log_fd = self._memory_file("log")
        self._expired = False
        self._input_fd = -1
        self._outputs: dict[int, Stream] = {}

    async def start(self) -> None:
        process_fd = self._memory_file("process")
        os.write(process_fd, msgspec.json.encode(exec_process(self._spec, self._request, self._account)))
        argv = [
            self._crun,
            f"--root={files_of(self._spec).runtime_root}",
            "--cgroup-manager=cgroupfs",
            f"--log=/proc/self/fd/{self._log_fd}",
            "exec",
            f"--process=/proc/self/fd/{process_fd}",
            f"--pid-file=/proc/self/fd/{self._pid_fd}",
        ]
        passed = (process_fd, self._pid_fd, self._log_fd)
        if self._request.terminal:
            await self._start_on_terminal(argv, passed)
        else:
            self._start_on_pipes(argv, passed)

    def _start_on_pipes(self, argv: list[str], passed: tuple[int, ...]) -> None:
        self._input_fd, child_in = pipe_for_child(child_writes=False)
        out, child_out = pipe_for_child(child_writes=True)
        err, child_err = pipe_for_child(child_writes=True)
        self._outputs = {out: Stream.STDOUT, err: Stream.STDERR}
        for fd in (out, err):
            self._stack.callback(os.close, fd)
        self._stack.callback(self._close_input)
        try:
            self._child = Child(
                [*argv, self._spec.uuid],
                stdin_fd=child_in,
                stdout_fd=child_out,
                stderr_fd=child_err,
                pass_fds=passed,
            )
        finally:
            for fd in (child_in, child_out, child_err):
                os.close(fd)

    async def _start_on_terminal(self, argv: list[str], passed: tuple[int, ...]) -> None:
        """crun makes the terminal inside the machine and sends its other end over a socket."""
        async with _console_socket(files_of(self._spec).run_dir) as (path, listener):
            null_fd = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
            self._stack.callback(os.close, null_fd)
            self._child = Child(
                [*argv, "--tty", f"--console-socket={path}", self._spec.uuid],
                stdin_fd=null_fd,
                stdout_fd=null_fd,
                stderr_fd=null_fd,
                pass_fds=passed,
            )
            # crun sets the terminal's size beside a command that may ask for it already: crun has to be first.
            self._child.hurry()
            ended = asyncio.create_task(self._child.wait())
            received = asyncio.create_task(_receive_descriptor(listener))
            try:
                await asyncio.wait((ended, received), return_when=asyncio.FIRST_COMPLETED)
                # A command may have ended already, and its terminal still wait to be taken.
                await asyncio.wait((received,), timeout=_TERMINAL_SECONDS)
                if not received.done():
                    return
                terminal_fd = received.result()
            except BaseException:
                self._child.kill()
                raise
            finally:
                received.cancel()
                ended.cancel()
        os.set_blocking(terminal_fd, False)
        self._stack.callback(os.close, terminal_fd)
        self._input_fd = terminal_fd
        self._outputs = {terminal_fd: Stream.STDOUT}

    async def converse(self) -> int:
        """Move bytes until the command has ended and what it wrote is delivered; return its code.

        What the command's own children write later is not waited for.
        """
        ended = asyncio.create_task(self._child.wait())
        outputs = [
            asyncio.create_task(copy_until(fd, partial(self._stdio.write, stream), ended))
            for fd, stream in self._outputs.items()
        ]
        feeding = asyncio.create_task(self._feed())
        expiring = asyncio.create_task(self._expire(ended))
        pending: set[asyncio.Task[Any]] = {ended, feeding, expiring, *outputs}
        try:
            # What has run out of time is over when all of its session is.
            while pending - ({feeding} if self._expired else {feeding, expiring}):
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            return ended.result()
        finally:
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    def exit(self, code: int) -> Exit:
        """crun's own failures have a code that commands have too: what it logged tells them apart."""
        if self._expired:
            return Exit(code=TIMED_OUT_CODE, reason=f"timed out after {self._request.timeout_seconds:g} s")
        if code < 0:
            return Exit(code=128 - code, reason=f"crun was ended by signal {-code}")
        reason = os.pread(self._log_fd, 4096, 0).decode(errors="replace").strip() if code == _RUNTIME_FAILED else ""
        if not reason:
            return Exit(code=code)
        text = reason.splitlines()[-1]
        refused = refusal(text)
        if refused is None:
            raise MachineFailed(f"cannot run a command in machine '{self._spec.machine.name}': {text}")
        return refused

    async def _expire(self, ended: asyncio.Future[int]) -> None:
        """End the command, and what it began in its session, once its time is over; then crun, should it hang."""
        if self._request.timeout_seconds is None:
            return
        await asyncio.sleep(self._request.timeout_seconds)
        self._expired = True
        session = self._kin(os.getsid)
        session.signal(signal.SIGTERM)
        # What is stopped does not end.
        session.signal(signal.SIGCONT)
        deadline = time.monotonic() + TIMEOUT_GRACE_SECONDS
        while session.signal(0) and time.monotonic() < deadline:
            await asyncio.sleep(_LOOK_SECONDS)
        session.signal(signal.SIGKILL)
        await asyncio.wait((ended,), timeout=TIMEOUT_GRACE_SECONDS)
        self._child.kill()

    async def end(self) -> None:
        """The far end is gone: hang up, as a terminal would, then kill."""
        self._close_input()
        waiting = asyncio.create_task(self._child.wait())
        # Not the session: what a shell put into the background is its own affair.
        group = self._kin(os.getpgid)
        for number in (signal.SIGHUP, signal.SIGKILL):
            if not waiting.done() and group.signal(number):
                await asyncio.wait((waiting,), timeout=_HANGUP_SECONDS)
        if not waiting.done():
            self._child.kill()
        await waiting

    def _kin(self, number_of: Callable[[int], int]) -> _Kin:
        """The command and those of its session or group. They are crun's, unless the command has a terminal."""
        pid_text = os.pread(self._pid_fd, 32, 0).strip()
        number = 0
        with suppress(ProcessLookupError):
            # crun is its parent and has not reaped it: the number cannot be another process's.
            number = number_of(int(pid_text)) if pid_text else 0
        return _Kin(self._spec.cgroup, number, number_of)

    async def _feed(self) -> None:
        while True:
            piece = await self._stdio.read()
            if isinstance(piece, EndOfInput):
                break
            if isinstance(piece, Resize):
                if self._request.terminal and self._input_fd >= 0:
                    set_window_size(self._input_fd, piece.columns, piece.rows)
            elif isinstance(piece, Data) and self._input_fd >= 0:
                # A command may end without reading all of its input.
                with suppress(OSError):
                    await write_all(self._input_fd, piece.data)
        if not self._request.terminal:
            self._close_input()

    def _close_input(self) -> None:
        if self._input_fd >= 0 and not self._request.terminal:
            os.close(self._input_fd)
            self._input_fd = -1

    def _memory_file(self, name: str) -> int:
        fd = os.memfd_create(name)
        self._stack.callback(os.close, fd)
        return fd


class _Kin:
    """Processes of the machine that are in one session or process group; 0 is none."""

    def __init__(self, cgroup: str, number: int, number_of: Callable[[int], int]) -> None:
        self._cgroup = cgroup
        self._number = number
        self._number_of = number_of

    def signal(self, number: int) -> int:
        """How many got it."""
        found = members(pids_in(self._cgroup), self._number, self._number_of) if self._number else ()
        return sum(send_signal(process, number) for process in found)


@asynccontextmanager
async def _console_socket(directory: Path) -> AsyncIterator[tuple[Path, socket.socket]]:
    path = directory / f"exec-{next(_numbers)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as listener:
        listener.setblocking(False)
        listener.bind(str(path))
        try:
            listener.listen(1)
            yield path, listener
        finally:
            path.unlink(missing_ok=True)


async def _receive_descriptor(listener: socket.socket) -> int:
    loop = asyncio.get_running_loop()
    connection, _ = await loop.sock_accept(listener)
    with connection:
        await readable(connection.fileno())
        _, fds, _, _ = socket.recv_fds(connection, 4096, 1)
    if not fds:
        raise MachineFailed("crun sent no terminal")
    os.set_inheritable(fds[0], False)
    return fds[0]
