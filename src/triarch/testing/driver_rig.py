"""What `check_driver` works with: the harness that a driver's author supplies, and the rig that the tests use."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar, NoReturn
from uuid import uuid4

import pytest

from triarch.drivers.base import Attachable, Console, Driver, Exec, Metered, Pausable
from triarch.errors import Error
from triarch.model.driver import EndOfInput, ExecRequest, Input, LayerFile, MachineSpec, Observation, Stream
from triarch.model.instance import Instance
from triarch.model.machine import Exit, Machine
from triarch.model.network import NoLink
from triarch.model.state import Status
from triarch.model.template import Init, Layer, Template, TemplateRef

POLL_SECONDS = 0.02


def shell(script: str) -> tuple[str, ...]:
    """The argv that runs `script` in any Unix tree."""
    return ("/bin/sh", "-c", script)


# Says `ready`, and ends with code 7 when it is asked to.
IDLE = shell('trap "exit 7" TERM; echo ready; sleep 1000 & wait')
# Says `ready`, and does not end when it is asked to.
STUBBORN = shell('trap "" TERM; echo ready; sleep 1000')
TICKING = shell('trap "exit 7" TERM; echo ready; while :; do echo tick; sleep 0.2; done')


class DriverHarness(ABC):
    """What the author of a driver supplies to have it checked.

    The tree that machines run must have `/bin/sh`, `sleep`, `cat`, `seq`, `id` and `stty` (busybox is enough).
    `patience` stretches every timeout of the suite. `real` says that machines run real programs on a real delta; only
    a fake sets it to False, and then what needs a kernel is skipped.
    """

    patience: ClassVar[float] = 1.0
    real: ClassVar[bool] = True

    @abstractmethod
    def make_driver(self) -> Driver:
        """A new driver object on the same instance every time, as a daemon that has just started makes it."""

    @abstractmethod
    async def app_machine(self, command: tuple[str, ...], environment: Mapping[str, str]) -> MachineSpec:
        """A machine that runs `command`, with a new delta, and a run and a state directory that exist and are empty."""

    async def system_machine(self) -> MachineSpec | None:
        """As `app_machine`, but its template's own init boots. None when there is no such template here."""
        return None

    async def abandon(self, driver: Driver) -> None:  # noqa: B027
        """Let go of `driver` as the death of the daemon would: end what dies with it, without its help."""

    def leaks(self) -> Sequence[str]:
        """What is left on the host when all machines are deleted and drivers closed: one line each, naming it."""
        return ()


def machine_spec(
    instance: Instance,
    *,
    index: int,
    layers: Sequence[LayerFile],
    delta_path: str | Path,
    architecture: str,
    init: Init = Init.APP,
    command: tuple[str, ...] = (),
    environment: Mapping[str, str] | None = None,
) -> MachineSpec:
    """A resolved machine without a network, and its directories; `msgspec.structs.replace` changes the rest."""
    uuid = str(uuid4())
    now = datetime.now(UTC)
    kept = tuple(Layer(digest=layer.digest, size_bytes=layer.size_bytes) for layer in layers)
    template = Template(name="check", level=1, digest="0" * 64, layers=kept, init=init, created_at=now)
    machine = Machine(
        name=f"check-{index}",
        uuid=uuid,
        index=index,
        template=TemplateRef(name=template.name, level=template.level, digest=template.digest),
        architecture=architecture,
        init=init,
        command=command,
        environment=dict(environment or {}),
        network="none",
        ids=instance.id_range(index),
        created_at=now,
    )
    run_dir, state_dir = instance.machine_run_dir(uuid), instance.machine_state_dir(uuid)
    for directory in (run_dir, state_dir):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return MachineSpec(
        machine=machine,
        template=template,
        layers=tuple(layers),
        delta_path=str(delta_path),
        link=NoLink(),
        run_dir=str(run_dir),
        state_dir=str(state_dir),
        log_path=str(instance.log_path(uuid)),
        cgroup=instance.cgroup(uuid),
    )


class FarEnd:
    """A `Stdio` whose other side is a test: it feeds input, reads what came out, and may go away."""

    def __init__(self, *inputs: Input, open_ended: bool = False) -> None:
        self._inputs: asyncio.Queue[Input] = asyncio.Queue()
        for piece in inputs if open_ended else (*inputs, EndOfInput()):
            self._inputs.put_nowait(piece)
        self._ended = False
        self._changed = asyncio.Event()
        self.stdout = b""
        self.stderr = b""
        self.gone = False

    async def read(self) -> Input:
        assert not self._ended, "read() was called after EndOfInput"
        piece = await self._inputs.get()
        self._ended = isinstance(piece, EndOfInput)
        return piece

    async def write(self, stream: Stream, data: bytes) -> None:
        if self.gone:
            raise ConnectionError("the far end is gone")
        if stream is Stream.STDOUT:
            self.stdout += data
        else:
            self.stderr += data
        self._changed.set()

    def feed(self, *inputs: Input) -> None:
        for piece in inputs:
            self._inputs.put_nowait(piece)

    async def until(self, marker: bytes, seconds: float) -> None:
        """Wait for `marker` in standard output."""
        async with asyncio.timeout(seconds):
            while marker not in self.stdout:
                self._changed.clear()
                await self._changed.wait()


class Watcher:
    """Consumes `events()` of one driver and keeps what came."""

    def __init__(self) -> None:
        self.seen: list[Observation] = []
        self._changed = asyncio.Event()

    async def consume(self, events: AsyncIterator[Observation]) -> None:
        async for observation in events:
            self.seen.append(observation)
            self._changed.set()

    def of(self, spec: MachineSpec, status: Status) -> list[Observation]:
        return [o for o in self.seen if o.uuid == spec.uuid and o.status is status]

    async def changed(self) -> None:
        """Wait until one more came."""
        self._changed.clear()
        await self._changed.wait()

    async def until(self, spec: MachineSpec, status: Status, seconds: float) -> Observation:
        async with asyncio.timeout(seconds):
            while not self.of(spec, status):
                await self.changed()
        return self.of(spec, status)[0]


class DriverRig:
    """One driver under test, the machines that the tests made, and the ways to look at them."""

    def __init__(self, harness: DriverHarness) -> None:
        self.harness = harness
        self.driver = harness.make_driver()
        self._machines: list[MachineSpec] = []
        self._idle: MachineSpec | None = None

    def seconds(self, count: float) -> float:
        """A timeout of `count` seconds on a fast machine, stretched by the harness's patience."""
        return count * self.harness.patience

    # ---- machines

    async def machine(self, command: tuple[str, ...], environment: Mapping[str, str] | None = None) -> MachineSpec:
        """A machine that exists and was not started yet; the rig deletes it after the test."""
        spec = await self.harness.app_machine(command, environment or {})
        await self.driver.create(self.remember(spec))
        return spec

    def remember(self, spec: MachineSpec) -> MachineSpec:
        """Delete this machine too after the test."""
        self._machines.append(spec)
        return spec

    async def started(self, command: tuple[str, ...], environment: Mapping[str, str] | None = None) -> MachineSpec:
        spec = await self.machine(command, environment)
        await self.driver.start(spec)
        return spec

    async def ready(self, command: tuple[str, ...] = IDLE) -> MachineSpec:
        """A running machine whose command has said `ready`."""
        spec = await self.started(command)
        await self.until_logged(spec, "ready")
        return spec

    async def idle(self) -> MachineSpec:
        """A running machine that tests share which only look at it; made anew when one of them ended it."""
        if self._idle is not None and (await self.driver.observe(self._idle)).status is not Status.RUNNING:
            await self._remove(self._idle)
            self._idle = None
        if self._idle is None:
            self._idle = await self.ready()
            self._machines.remove(self._idle)
        return self._idle

    async def tidy(self) -> None:
        """End and delete what the test made."""
        while self._machines:
            await self._remove(self._machines.pop())

    async def _remove(self, spec: MachineSpec) -> None:
        await self.driver.kill(spec)
        await self.driver.delete(spec)
        run_dir = Path(spec.run_dir)
        assert not run_dir.exists() or not list(run_dir.iterdir()), f"delete left files in {run_dir}"

    async def end(self) -> None:
        if self._idle is not None:
            self._machines.append(self._idle)
            self._idle = None
        try:
            await self.tidy()
        finally:
            await self.driver.close()

    # ---- daemon restarts

    async def restart(self) -> Driver:
        """Close the driver and make a new one; the old object is returned."""
        old = self.driver
        await old.close()
        self.driver = self.harness.make_driver()
        return old

    async def die(self) -> Driver:
        """As `restart`, but nobody closed the old driver."""
        old = self.driver
        await self.harness.abandon(old)
        self.driver = self.harness.make_driver()
        return old

    # ---- looking

    async def status(self, spec: MachineSpec) -> Status:
        return (await self.driver.observe(spec)).status

    async def until(self, spec: MachineSpec, status: Status, seconds: float = 20) -> Observation:
        """Observe until the machine has `status`."""
        last: Observation | None = None
        deadline = time.monotonic() + self.seconds(seconds)
        while time.monotonic() < deadline:
            last = await self.driver.observe(spec)
            if last.status is status:
                return last
            await asyncio.sleep(POLL_SECONDS)
        raise AssertionError(f"the machine did not become {status} in {self.seconds(seconds)} s: {last}")

    async def exit_of(self, spec: MachineSpec) -> Exit:
        """Wait until the machine has ended by itself, and tell how."""
        observation = await self.until(spec, Status.STOPPED)
        assert observation.exit is not None, f"a run has ended, but its exit is not told: {observation}"
        return observation.exit

    def log(self, spec: MachineSpec) -> str:
        path = Path(spec.log_path)
        return path.read_text(errors="replace") if path.exists() else ""

    async def until_logged(self, spec: MachineSpec, text: str) -> None:
        deadline = time.monotonic() + self.seconds(20)
        while text not in self.log(spec):
            assert time.monotonic() < deadline, f"{text!r} did not reach the log: {self.log(spec)[-2000:]!r}"
            await asyncio.sleep(POLL_SECONDS)

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[Watcher]:
        """Consume the driver's events while the block runs."""
        watcher = Watcher()
        events = self.driver.events()
        task = asyncio.create_task(watcher.consume(events))
        try:
            yield watcher
            assert not task.done() or task.exception() is None, f"events() ended: {task.exception()}"
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError, Error):
                await task

    # ---- capabilities: each skips the test where the driver lacks it

    @property
    def can_exec(self) -> Exec:
        return self.driver if isinstance(self.driver, Exec) else self._skip("exec")

    @property
    def can_console(self) -> Console:
        return self.driver if isinstance(self.driver, Console) else self._skip("console")

    @property
    def can_attach(self) -> Attachable:
        return self.driver if isinstance(self.driver, Attachable) else self._skip("attach")

    @property
    def can_pause(self) -> Pausable:
        return self.driver if isinstance(self.driver, Pausable) else self._skip("pause")

    @property
    def can_meter(self) -> Metered:
        return self.driver if isinstance(self.driver, Metered) else self._skip("usage")

    def _skip(self, capability: str) -> NoReturn:
        pytest.skip(f"driver '{self.driver.name}' lacks the capability '{capability}'")

    async def exec(self, request: ExecRequest, far_end: FarEnd | None = None) -> tuple[Exit, FarEnd]:
        """Run a command in the idle machine to its end."""
        far_end = far_end or FarEnd()
        driver, spec = self.can_exec, await self.idle()
        async with asyncio.timeout(self.seconds(30)):
            return await driver.exec(spec, request, far_end), far_end
