"""What every measurement stands on: an instance of Triarch of its own, with a template, and the template as a tree."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from types import TracebackType

from triarch.client import Client
from triarch.errors import Failed, NotFound
from triarch.host.process import run
from triarch.model.instance import Instance, instance_at
from triarch.model.machine import CreateMachine, MachineView
from triarch.model.operation import Operation
from triarch.model.request import BuildTemplate
from triarch.model.settings import Settings
from triarch.model.template import Template
from triarch.testing.leaks import leaks

TEMPLATE = "bookworm"
LOG_LINES = 30
IDLE = ("sleep", "infinity")
# An app that ends when it is asked to: the first process of a namespace ignores what it has no handler for.
OBEDIENT = ("sh", "-c", "trap 'exit 0' TERM; sleep infinity & wait")


class Ground:
    """As a context: a daemon runs in `root` (a temporary one unless given), and `TEMPLATE` is there.

    On leaving, its machines, daemon and mounts are gone. A root that was given keeps its template and nothing else of
    this run. Raises `Failed` when something was left over.
    """

    def __init__(self, rounds: int, root: Path | None) -> None:
        self.rounds = rounds
        self.directory = Path(tempfile.mkdtemp(prefix="triarch-bench-", dir="/var/tmp"))
        self.root = root or self.directory / "instance"
        self.instance: Instance = instance_at(self.root)
        self._stack = contextlib.ExitStack()
        self._stack.callback(shutil.rmtree, self.directory, ignore_errors=True)

    def __enter__(self) -> Ground:
        with contextlib.ExitStack() as undo:
            undo.push(self._stack)
            self._start_daemon()
            if self.client.machines():
                raise Failed(f"{self.root} has machines: measure in an instance that has none")
            self._need_template()
            undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()
        left = leaks(self.instance)
        if left and error is None:
            raise Failed("left over after the benchmark:\n" + "\n".join(left))

    @property
    def few_rounds(self) -> int:
        """For what takes seconds."""
        return max(2, self.rounds // 3)

    # -- the instance

    def log_tail(self) -> str:
        """The last that the daemon said. The log goes with the instance's run directory."""
        log = Path(self.instance.run_dir) / "triarchd.log"
        return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:]) if log.exists() else ""

    def _start_daemon(self) -> None:
        self._daemon = subprocess.Popen(
            [sys.executable, "-m", "triarch.daemon", "--root", str(self.root), "--background"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        assert self._daemon.stdout is not None
        word = self._daemon.stdout.read()
        if word != b"ready\n":
            raise Failed(f"the daemon in {self.root} did not start: {word.decode(errors='replace')}")
        self._stack.callback(self._end_daemon)

    def _end_daemon(self) -> None:
        with Client(self.instance) as client:
            for view in client.machines():
                client.finish(client.delete(view.name, force=True))
            client.finish(client.down())
        try:
            self._daemon.wait(30)
        except subprocess.TimeoutExpired:
            self._daemon.send_signal(signal.SIGTERM)
            self._daemon.wait(30)
        shutil.rmtree(self.instance.run_dir, ignore_errors=True)

    def _need_template(self) -> None:
        try:
            self.client.template(TEMPLATE)
        except NotFound:
            print(f"building template '{TEMPLATE}' …", file=sys.stderr)
            self.client.finish(self.client.build_template(BuildTemplate(name=TEMPLATE)))

    @cached_property
    def client(self) -> Client:
        return Client(self.instance)

    @cached_property
    def template(self) -> Template:
        return self.client.template(TEMPLATE)

    @property
    def layer_path(self) -> Path:
        (layer,) = self.template.layers
        return Path(self.instance.state_dir) / "pool" / "layers" / f"{layer.digest}.erofs"

    @cached_property
    def tree(self) -> Path:
        """The template's tree, read-only, for peers."""
        path = self.directory / "tree"
        path.mkdir()
        run(["mount", "-t", "erofs", "-o", "ro,loop", str(self.layer_path), str(path)])
        self._stack.callback(run, ["umount", str(path)])
        return path

    # -- machines

    @contextlib.contextmanager
    def machine(
        self,
        name: str,
        command: tuple[str, ...] = IDLE,
        *,
        architecture: str = "container",
        network: str = "nat",
        memory_bytes: int | None = None,
        start: bool = False,
    ) -> Iterator[MachineView]:
        """A machine that is deleted at the end. Without `command` it boots the template's own init."""
        request = CreateMachine(
            template=TEMPLATE,
            name=name,
            architecture=architecture,
            command=command,
            settings=Settings(network=network, memory_bytes=memory_bytes),
            start=start,
        )
        self.client.finish(self.client.create(request))
        try:
            yield self.client.machine(name)
        finally:
            self.client.finish(self.client.delete(name, force=True))

    def command_line(self, *arguments: str) -> None:
        """One run of `triarch`, as a whole process. Raises `CalledProcessError`."""
        subprocess.run(
            [self._program, *arguments],
            env={**os.environ, "TRIARCH_ROOT": str(self.root)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            check=True,
        )

    @cached_property
    def _program(self) -> str:
        return str(Path(sys.executable).parent / "triarch")


def duration_seconds(operation: Operation) -> float:
    """From the daemon's taking it up to its end. The operation must have ended."""
    assert operation.ended_at is not None
    return (operation.ended_at - operation.created_at).total_seconds()
