"""The crash walk: SIGKILL the daemon before and after every journalled step of every verb, and see what is left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import msgspec

from triarch.client import Client
from triarch.engine.machine_procedures import MACHINE_PROCEDURES, MachineArguments
from triarch.engine.services import Services
from triarch.errors import Error, NotFound
from triarch.model.machine import CreateMachine, IdRange, Machine, MachineView, SwitchMachine
from triarch.model.operation import Operation
from triarch.model.state import State
from triarch.model.stream import RunRequest
from triarch.model.template import Init, TemplateRef
from triarch.testing.daemon_rig import DaemonRig
from triarch.testing.leaks import leaks

SIGKILLED = -9


class Point(msgspec.Struct, frozen=True):
    """One place to die."""

    verb: str
    step: str
    when: str

    def __str__(self) -> str:
        return f"{self.verb}-{self.step}-{self.when}"


class Walk(msgspec.Struct, frozen=True, kw_only=True):
    """What a walk runs on.

    `sleep` is a command that ends when asked to, once `ready` succeeds in its machine; `brief` ends by itself soon.
    """

    template: str
    first: str
    second: str | None
    network: str
    sleep: tuple[str, ...]
    brief: tuple[str, ...]
    ready: tuple[str, ...] = ()
    patience_seconds: float


def points(*, switch: bool) -> list[Point]:
    """Every journalled step of every verb of a machine that begins from a running or a stopped one."""
    found = []
    for procedure in MACHINE_PROCEDURES:
        verb = procedure.verb
        if verb in ("pause", "resume") or (verb == "switch" and not switch):
            continue
        arguments = MachineArguments(machine=_any_machine(), start=verb == "launch", architecture="x", name="y")
        steps = procedure(cast(Services, None), arguments).steps()
        found += [Point(verb, step.name, when) for step in steps for when in ("before", "after")]
    return found


def _any_machine() -> Machine:
    return Machine(
        name="web",
        uuid="",
        index=1,
        template=TemplateRef(name="t", level=1, digest=""),
        architecture="container",
        init=Init.APP,
        ids=IdRange(base=0),
        state=State.RUNNING,
        created_at=datetime.now(UTC),
    )


class CrashRig(DaemonRig):
    """A daemon that can be told where to die."""

    def __init__(self, root: Path, *, fake: bool) -> None:
        super().__init__(root)
        self.failpoint: str | None = None
        self._fake = fake

    @property
    def environment(self) -> dict[str, str]:
        environment = super().environment
        if not self._fake:
            del environment["TRIARCH_ENABLE_FAKE"]
        if self.failpoint is not None:
            environment["TRIARCH_FAILPOINT"] = self.failpoint
        return environment

    def restart(self, failpoint: Point | None = None) -> None:
        self.failpoint = None if failpoint is None else f"{failpoint.verb}:{failpoint.step}:{failpoint.when}"
        if self._process is not None:
            self.stop()
        self.start()

    def died(self, patience_seconds: float) -> bool:
        """Whether the daemon killed itself at its failpoint."""
        assert self._process is not None
        return self._process.wait(patience_seconds) == SIGKILLED


@contextmanager
def real_daemon(root: Path) -> Iterator[CrashRig]:
    """A daemon with this host's own architectures. At the end all is brought down, and nothing may be left."""
    rig = CrashRig(root, fake=False)
    rig.root.mkdir()
    rig.start()
    try:
        yield rig
    finally:
        rig.restart()
        with rig.client() as client:
            client.finish(client.down())
            client.wait_closed()
        rig.stop()
    assert leaks(rig.instance) == ()


def request(walk: Walk, name: str, command: tuple[str, ...], *, start: bool) -> CreateMachine:
    return msgspec.convert(
        {
            "name": name,
            "template": walk.template,
            "architecture": walk.first,
            "settings": {"network": walk.network},
            "init": "app",
            "command": command,
            "start": start,
        },
        CreateMachine,
    )


def arrange(client: Client, walk: Walk, verb: str) -> None:
    """Bring machine 'web' to where the verb begins."""
    if verb in ("create", "launch", "run", "settle"):
        return
    running = verb in ("stop", "kill", "restart", "switch")
    client.finish(client.create(request(walk, "web", walk.sleep, start=running)))
    if running and walk.ready:
        # A first process hears no signal before it has a handler for it.
        end = time.monotonic() + walk.patience_seconds
        while client.execute("web", *walk.ready).exit.code:
            assert time.monotonic() < end
            time.sleep(0.02)


def act(client: Client, walk: Walk, verb: str) -> None:
    """Ask for the verb. The daemon may die before it answers."""
    try:
        operation = _ask(client, walk, verb)
        if operation is not None:
            client.wait(operation)
    except (Error, OSError):
        return


def _ask(client: Client, walk: Walk, verb: str) -> Operation | None:
    match verb:
        case "create" | "launch":
            return client.create(request(walk, "web", walk.sleep, start=verb == "launch"))
        case "settle":
            return client.create(request(walk, "web", walk.brief, start=True))
        case "run":
            with client.run(RunRequest(machine=request(walk, "web", walk.brief, start=False))) as stream:
                stream.communicate(b"")
            return None
        case "rename":
            return client.rename("web", "www")
        case "switch":
            assert walk.second is not None
            return client.switch("web", SwitchMachine(architecture=walk.second))
        case "delete":
            return client.delete("web")
        case _:
            return cast(Operation, getattr(client, verb)("web"))


def settled(client: Client, patience_seconds: float) -> None:
    """Until no operation runs any more."""
    end = time.monotonic() + patience_seconds
    while any(not operation.status.ended for operation in client.operations()):
        assert time.monotonic() < end, client.operations()
        time.sleep(0.02)


def find(client: Client, name: str) -> MachineView | None:
    try:
        return client.machine(name)
    except NotFound:
        return None


def check_consistent(client: Client, rig: CrashRig, walk: Walk) -> None:
    """What is recorded is what is there: a running machine answers, a stopped one starts, a missing one is gone."""
    deltas = Path(rig.instance.state_dir) / "pool/deltas"
    recorded = {view.uuid for view in client.machines()}
    assert {path.stem for path in deltas.glob("*.raw")} == recorded
    for name in ("web", "www"):
        view = find(client, name)
        if view is None:
            continue
        if view.state is not State.RUNNING:
            client.finish(client.start(name))
        assert client.execute(name, "echo", "alive").stdout == b"alive\n"
        client.finish(client.delete(name, force=True))
