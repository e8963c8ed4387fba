"""The peer above: podman on the ground's tree, with storage of its own."""

from __future__ import annotations

import subprocess
from functools import cached_property

from bench.ground import IDLE, Ground
from triarch.host.process import find_program

# Podman raises these by default, which a host without CAP_SYS_RESOURCE refuses.
_LIMITS = ("--ulimit=nofile=1024:1024", "--ulimit=nproc=4096:4096")


class Podman:
    """Containers on an overlay over the tree, without network."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self._directory = ground.directory / "podman"

    def run(self, *command: str) -> None:
        """A container from its making to its removal."""
        self._call("run", "--rm", *self._options(), *command)

    def start(self, name: str) -> None:
        self._call("run", "--detach", f"--name={name}", *self._options(), *IDLE)

    def create(self, name: str) -> None:
        self._call("create", f"--name={name}", *self._options(), *IDLE)

    def exec(self, name: str, *command: str) -> None:
        self._call("exec", name, *command)

    def list(self) -> None:
        """Every container, running or not."""
        self._call("ps", "--all")

    def clear(self) -> None:
        """Remove every container."""
        self._call("rm", "--all", "--force", "--time=0")

    def _options(self) -> tuple[str, ...]:
        return ("--network=none", *_LIMITS, "--rootfs", f"{self._ground.tree}:O")

    def _call(self, *arguments: str) -> None:
        storage = (f"--root={self._directory}/root", f"--runroot={self._directory}/run")
        subprocess.run(
            [self._program, *storage, "--cgroup-manager=cgroupfs", "--runtime=crun", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            check=True,
        )

    @cached_property
    def _program(self) -> str:
        return find_program("podman")
