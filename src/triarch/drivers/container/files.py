"""A running container's files: the file server joins them, seen by nobody inside."""

from __future__ import annotations

import os

from triarch.drivers.base import Stdio
from triarch.drivers.container.run import Run
from triarch.errors import WrongState
from triarch.guest.file_server import open_file_server
from triarch.host.carry import carry
from triarch.host.launcher.client import Launcher
from triarch.host.launcher.protocol import Join
from triarch.host.pidfd import open_process
from triarch.model.driver import MachineSpec


async def serve_files(spec: MachineSpec, run: Run, launcher: Launcher, stdio: Stdio) -> None:
    """As `Files.serve_files`, for a machine that runs."""
    program_fd = await open_file_server()
    try:
        pidfd = open_process(run.record.first)
        if pidfd is None:
            raise WrongState(f"machine '{spec.machine.name}' has just ended", machine=spec.machine.name)
        try:
            request = Join(id=0, cgroup=spec.cgroup)
            await carry(stdio, lambda fd: launcher.join(request, program_fd, fd, pidfd))
        finally:
            os.close(pidfd)
    finally:
        os.close(program_fd)
