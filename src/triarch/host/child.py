"""A program whose input and output the caller holds, as descriptors."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress

from triarch.host.pidfd import process_id, wait_for_end
from triarch.host.process import find_program, program_environment


class Child:
    """Runs from construction on, in its own session; `wait` reaps it."""

    def __init__(
        self, argv: Sequence[str], *, stdin_fd: int, stdout_fd: int, stderr_fd: int, pass_fds: Sequence[int] = ()
    ) -> None:
        """The three descriptors and `pass_fds` (under the same numbers) go to the program; the caller closes its own.

        Raises `MissingProgram`.
        """
        self._process = subprocess.Popen(
            [find_program(argv[0]), *argv[1:]],
            stdin=stdin_fd,
            stdout=stdout_fd,
            stderr=stderr_fd,
            pass_fds=pass_fds,
            env=program_environment(),
            start_new_session=True,
        )
        self._id = process_id(self._process.pid)

    async def wait(self) -> int:
        """The exit code, or minus the signal's number. May be asked again."""
        if self._process.returncode is None and self._id is not None:
            await wait_for_end(self._id)
        return self._process.wait()

    def hurry(self) -> None:
        """Let the program itself, but none of its children, go before everything else. Ignored where refused."""
        with suppress(OSError):
            policy = os.SCHED_RR | os.SCHED_RESET_ON_FORK
            os.sched_setscheduler(self._process.pid, policy, os.sched_param(1))

    def kill(self) -> None:
        """SIGKILL; an ended one is ignored."""
        self._process.kill()
