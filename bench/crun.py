"""The peer below: an overlay and `crun`, with the machine's own configuration but for its namespaces."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from functools import cached_property
from types import TracebackType

import msgspec

from bench.ground import IDLE, Ground
from bench.specs import machine_spec
from triarch.drivers.container.config import Config, Linux, Namespace, Paths, capabilities, make_config
from triarch.drivers.container.seccomp import load_profile, resolve
from triarch.host.process import find_program
from triarch.host.syscalls import MNT_DETACH, mount, unmount
from triarch.model.template import Init

_NAMESPACES = ("pid", "ipc", "uts", "mount", "cgroup")
_numbers = itertools.count()


class Crun:
    """Containers on the ground's tree, each with an upper directory of its own; host network, no user namespace.

    As a context: whatever still runs at the end is deleted.
    """

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self._directory = ground.directory / "crun"
        self._directory.mkdir(exist_ok=True)
        self._started: set[str] = set()

    def __enter__(self) -> Crun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for name in tuple(self._started):
            self.delete(name)

    def bundle(self) -> str:
        """The name of a new container: its bundle is there, it is not started."""
        name = f"{self._ground.directory.name}-{next(_numbers)}"
        bundle = self._directory / name
        bundle.mkdir()
        config = msgspec.structs.replace(self._config, linux=self._linux(name))
        (bundle / "config.json").write_bytes(msgspec.json.encode(config))
        return name

    def start(self, name: str) -> None:
        """Mount the overlay and `crun run` it in the background."""
        bundle = self._directory / name
        for directory in ("upper", "work", "root"):
            (bundle / directory).mkdir()
        options = f"lowerdir={self._ground.tree},upperdir={bundle}/upper,workdir={bundle}/work"
        self._started.add(name)
        mount("overlay", f"{bundle}/root", "overlay", 0, options)
        self._run("run", "--detach", f"--bundle={bundle}", name)

    def exec(self, name: str, *command: str) -> None:
        self._run("exec", name, *command)

    def delete(self, name: str) -> None:
        self._run("delete", "--force", name)
        unmount(f"{self._directory}/{name}/root", MNT_DETACH)
        shutil.rmtree(self._directory / name)
        self._started.discard(name)

    def _run(self, *arguments: str) -> None:
        subprocess.run(
            [self._program, f"--root={self._directory}/state", "--cgroup-manager=cgroupfs", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            check=True,
        )

    @cached_property
    def _program(self) -> str:
        return find_program("crun")

    @cached_property
    def _config(self) -> Config:
        """What the driver writes for an app machine; the filter is the driver's own, for crun to compile."""
        seccomp = resolve(load_profile(), capabilities(Init.APP))
        paths = Paths(root="root", user_namespace="", network_namespace="", files={})
        return make_config(machine_spec(self._ground, "peer", IDLE), paths, seccomp, None, None)

    def _linux(self, name: str) -> Linux:
        return msgspec.structs.replace(
            self._config.linux,
            namespaces=tuple(Namespace(type=kind) for kind in _NAMESPACES),
            cgroups_path=f"/{name}",
            sysctl={},
        )
