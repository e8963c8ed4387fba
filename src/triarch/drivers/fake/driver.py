"""The driver of fake machines.

A machine's environment can make it misbehave: `fake.fail-start` is the reason for which its start fails,
`fake.start-seconds` how long a start takes, with `fake.ignore-stop` it never ends when asked, and `fake.exit-reason` is
what is said of its end.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from triarch import __version__
from triarch.drivers.base import FREEZE_SECONDS, Stdio, capabilities_of
from triarch.drivers.fake.host import KILLED, FakeHost, FakeMachine
from triarch.drivers.fake.shell import Forever, Output, Plan, Program, Read, Shell, Sleep, plan
from triarch.errors import Damaged, InUse, Invalid, MachineFailed, TimedOut, WrongState
from triarch.host.console_log import append_now
from triarch.model.account import NoSuchUser, find_account, parse_user
from triarch.model.device import HardwareInfo
from triarch.model.driver import (
    NOT_EXECUTABLE_CODE,
    TIMED_OUT_CODE,
    Data,
    DriverInfo,
    EndOfInput,
    ExecRequest,
    Input,
    Kind,
    MachineSpec,
    Observation,
    Resize,
    ResolvedDevice,
    Stream,
    Usage,
)
from triarch.model.instance import Instance
from triarch.model.machine import Exit, Machine
from triarch.model.snapshot import Consistency
from triarch.model.state import Status
from triarch.model.template import Init

FAIL_START = "fake.fail-start"
START_SECONDS = "fake.start-seconds"
IGNORE_STOP = "fake.ignore-stop"
EXIT_REASON = "fake.exit-reason"

POLL_SECONDS = 0.02
PIECE_BYTES = 1 << 16
# Every fake machine's own.
PASSWD_FILE = b"root:x:0:0::/root:/bin/sh\nbob:x:1000:1000::/home/bob:/bin/sh\n"
GROUP_FILE = b"root:x:0:\nbob:x:1000:\n"
HANG_UP = Exit(code=128 + 1, reason="the far end went away")


class FakeDriver:
    """Architecture `fake`."""

    name: ClassVar[str] = "fake"
    kind: ClassVar[Kind] = Kind.OS_LEVEL
    needs_guest_pack: ClassVar[bool] = False

    def __init__(self, instance: Instance) -> None:
        self.host = FakeHost(instance)
        self._alive: set[int] = set()

    async def probe(self) -> DriverInfo:
        return DriverInfo(name=self.name, kind=self.kind, version=__version__, capabilities=capabilities_of(self))

    def validate(self, machine: Machine) -> None:
        seconds = machine.environment.get(START_SECONDS, "0")
        try:
            float(seconds)
        except ValueError as error:
            raise Invalid(f"illegal {START_SECONDS} {seconds!r}: it needs a number of seconds") from error

    async def create(self, spec: MachineSpec) -> None:
        if self.host.find(spec) is None:
            self.host.save(spec, FakeMachine(uuid=spec.uuid, delta_path=spec.delta_path))

    async def start(self, spec: MachineSpec) -> None:
        machine = self.host.find(spec)
        if machine is None or not machine.is_on:
            await self._begin(spec, attached=False)

    async def _begin(self, spec: MachineSpec, *, attached: bool) -> None:
        environment = spec.machine.environment
        await asyncio.sleep(float(environment.get(START_SECONDS, "0")))
        _check_files(spec)
        if FAIL_START in environment:
            raise MachineFailed(f"cannot start machine '{spec.machine.name}': {environment[FAIL_START]}")
        self.host.hold(spec)
        course = _plan(spec)
        log = Path(spec.log_path)
        log.parent.mkdir(parents=True, exist_ok=True)
        append_now(log, course.output)
        now = asyncio.get_running_loop().time()
        machine = FakeMachine(
            uuid=spec.uuid,
            delta_path=spec.delta_path,
            pid=_new_pid(),
            started_at=now,
            ends_at=None if attached or course.seconds is None else now + course.seconds,
            planned=Exit(code=course.code, reason=environment.get(EXIT_REASON, "")),
            on_terminate=None if IGNORE_STOP in environment else course.on_terminate,
            devices=tuple(device.name for device in spec.devices),
        )
        self.host.save(spec, machine)

    async def stop(self, spec: MachineSpec, timeout_seconds: float) -> None:
        machine = self.host.find(spec)
        if machine is None or not machine.is_on:
            return
        if machine.on_terminate is not None and machine.status is Status.RUNNING:
            self._end(spec, Exit(code=machine.on_terminate, reason="stopped"))
            return
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._until_off(spec)
        except TimeoutError as error:
            raise TimedOut(f"machine '{spec.machine.name}' did not stop within {timeout_seconds:g} s") from error

    async def kill(self, spec: MachineSpec) -> None:
        self._end(spec, KILLED)

    def _end(self, spec: MachineSpec, how: Exit) -> None:
        machine = self.host.find(spec)
        if machine is not None and machine.is_on:
            self.host.save(spec, machine.ended(how))
        self.host.release(spec)

    async def delete(self, spec: MachineSpec) -> None:
        self.host.remove(spec)

    async def observe(self, spec: MachineSpec) -> Observation:
        machine = self.host.find(spec)
        return machine.observe() if machine else Observation(uuid=spec.uuid, status=Status.ABSENT)

    async def events(self) -> AsyncIterator[Observation]:
        offset = self.host.feed_end()
        latest: dict[str, FakeMachine] = {}
        ended: dict[str, float] = {}
        for machine in self.host.machines():
            latest[machine.uuid] = machine
            if not machine.is_on:
                ended[machine.uuid] = machine.started_at
            yield machine.observe()
        while True:
            changed, offset = self.host.changes(offset)
            for uuid in dict.fromkeys(changed):
                now = self.host.find_uuid(uuid)
                if now is None:
                    latest.pop(uuid, None)
                    ended.pop(uuid, None)
                    continue
                latest[uuid] = now
                if now.is_on:
                    yield now.observe()
            # A run may have begun and ended since the last look; it is known by when it began.
            for machine in latest.values():
                has_run = machine.pid is not None and ended.get(machine.uuid) != machine.started_at
                if has_run and (machine.exit or machine.ends_at) is not None and not machine.is_on:
                    ended[machine.uuid] = machine.started_at
                    yield machine.observe()
            await asyncio.sleep(POLL_SECONDS)

    async def close(self) -> None:
        self._alive.clear()

    # ---- capabilities

    async def exec(self, spec: MachineSpec, request: ExecRequest, stdio: Stdio) -> Exit:
        self._need_running(spec, "exec")
        await self._until_thawed(spec)
        try:
            account = find_account(parse_user(request.user), PASSWD_FILE, GROUP_FILE)
        except NoSuchUser as error:
            await stdio.write(Stream.STDERR, f"fake: {error}\n".encode())
            return Exit(code=NOT_EXECUTABLE_CODE, reason=str(error))
        shell = Shell(
            environment={**account.environment, **request.environment},
            pid=_new_pid(),
            user=account.uid,
            group=account.gid,
            directory=request.directory or (account.home if request.login else "/"),
            terminal=Resize(request.columns, request.rows) if request.terminal else None,
            is_alive=self._alive.__contains__,
        )
        program = shell.run_login() if request.login else shell.run(request.command)
        self._alive.add(shell.pid)
        try:
            async with asyncio.timeout(request.timeout_seconds) as limit:
                return await self._while_on(spec, _perform(shell, program, stdio))
        except TimeoutError:
            if not limit.expired():
                raise
            return Exit(code=TIMED_OUT_CODE, reason=f"timed out after {request.timeout_seconds:g} s")
        finally:
            self._alive.discard(shell.pid)

    async def console(self, spec: MachineSpec, stdio: Stdio) -> None:
        """Performs the machine's command once more, for who types: what it says then is logged."""
        self._need_running(spec, "console")
        shell = Shell(environment=spec.machine.environment)
        system = spec.machine.init is Init.SYSTEM
        program = shell.run_login() if system else shell.run(spec.command)
        logged = _OnLog(stdio, Path(spec.log_path), known_bytes=len(_plan(spec).output))
        await self._while_on(spec, _perform(shell, program, logged))

    async def start_attached(self, spec: MachineSpec, stdio: Stdio, terminal: Resize | None) -> Exit:
        await self._begin(spec, attached=True)
        shell = Shell(environment=spec.machine.environment, terminal=terminal)
        self._end(spec, await self._while_on(spec, _perform(shell, shell.run(spec.command), stdio)))
        machine = self.host.find(spec)
        return (machine.end if machine else None) or KILLED

    async def pause(self, spec: MachineSpec) -> None:
        self.host.save(spec, self._need_running(spec, "pause").paused())

    async def resume(self, spec: MachineSpec) -> None:
        machine = self.host.find(spec)
        if machine is None or machine.status is not Status.PAUSED:
            raise WrongState(f"cannot resume machine '{spec.machine.name}': it is not paused")
        self.host.save(spec, machine.resumed())

    async def usage(self, spec: MachineSpec) -> Usage:
        """All that a fake machine uses is its file."""
        machine = self._need_running(spec, "usage")
        return Usage(cpu_seconds=0.0, memory_bytes=len(msgspec.json.encode(machine)), processes=1)

    async def attach(self, spec: MachineSpec, device: ResolvedDevice) -> None:
        machine = self._need_running(spec, "attach a device to")
        devices = tuple(sorted({*machine.devices, device.name}))
        self.host.save(spec, msgspec.structs.replace(machine, devices=devices))

    async def detach(self, spec: MachineSpec, device: ResolvedDevice) -> None:
        machine = self._need_running(spec, "detach a device from")
        if spec.machine.environment.get("fake.keeps-device") == device.name:
            raise InUse(f"something in machine '{spec.machine.name}' still uses device '{device.name}'")
        devices = tuple(name for name in machine.devices if name != device.name)
        self.host.save(spec, msgspec.structs.replace(machine, devices=devices))

    async def hardware(self, spec: MachineSpec) -> HardwareInfo:
        self._need_running(spec, "look at")
        return HardwareInfo(kernel=("none",), drivers=("none",), detail="nothing of it is real")

    async def freeze(self, spec: MachineSpec) -> Consistency:
        machine = self.host.find(spec)
        if machine is None or not machine.is_on:
            raise WrongState(f"cannot freeze machine '{spec.machine.name}': it does not run")
        self.host.save(spec, machine.frozen(FREEZE_SECONDS))
        return Consistency.FROZEN

    async def thaw(self, spec: MachineSpec) -> float | None:
        machine = self.host.find(spec)
        if machine is None or machine.frozen_at is None:
            return None
        self.host.save(spec, machine.thawed())
        if not machine.is_frozen:
            raise TimedOut(f"machine '{spec.machine.name}' was not held still for long enough")
        return machine.frozen_seconds

    async def check_checkpoint(self, spec: MachineSpec) -> None:
        self._need_running(spec, "checkpoint")

    async def save(self, spec: MachineSpec, path: str) -> None:
        machine = self._need_running(spec, "save")
        Path(path).write_bytes(msgspec.json.encode(machine))
        self.host.save(spec, machine.frozen(FREEZE_SECONDS))

    async def load(self, spec: MachineSpec, path: str) -> None:
        try:
            machine = msgspec.json.decode(Path(path).read_bytes(), type=FakeMachine)
        except msgspec.MsgspecError as error:
            raise Damaged(f"{path} holds no state of machine '{spec.machine.name}'") from error
        await self._begin(spec, attached=False)
        self.host.save(spec, msgspec.structs.replace(machine, uuid=spec.uuid, delta_path=spec.delta_path))

    async def _until_thawed(self, spec: MachineSpec) -> None:
        """What is frozen lets no command write."""
        while (machine := self.host.find(spec)) is not None and machine.is_frozen:
            await asyncio.sleep(POLL_SECONDS)

    def _need_running(self, spec: MachineSpec, verb: str) -> FakeMachine:
        machine = self.host.find(spec)
        if machine is None or machine.status is not Status.RUNNING:
            status = machine.status.value if machine else Status.ABSENT.value
            raise WrongState(f"cannot {verb} machine '{spec.machine.name}': it is {status}; {verb} needs running")
        return machine

    async def _until_off(self, spec: MachineSpec) -> None:
        while (machine := self.host.find(spec)) is not None and machine.is_on:
            await asyncio.sleep(POLL_SECONDS)

    async def _while_on(self, spec: MachineSpec, work: Coroutine[Any, Any, Exit]) -> Exit:
        """What `work` returns, or `KILLED` when the machine ends first."""
        task = asyncio.create_task(work)
        off = asyncio.create_task(self._until_off(spec))
        try:
            await asyncio.wait({task, off}, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else KILLED
        finally:
            task.cancel()
            off.cancel()
            await asyncio.gather(task, off, return_exceptions=True)


def _new_pid() -> int:
    """Unlike any other's, also of machines that an earlier daemon started."""
    return random.randrange(1 << 10, 1 << 22)


def _check_files(spec: MachineSpec) -> None:
    for path in (*(layer.path for layer in spec.layers), spec.delta_path):
        if not Path(path).is_file():
            raise MachineFailed(f"cannot start machine '{spec.machine.name}': there is no file {path}")


def _plan(spec: MachineSpec) -> Plan:
    if spec.machine.init is Init.APP and not spec.command:
        raise MachineFailed(f"cannot start machine '{spec.machine.name}': it has no command to run")
    return plan(spec.command, spec.machine.init, spec.machine.environment)


class _OnLog:
    """The input of a far end, and output to a log, which knows the first `known_bytes` of it already."""

    def __init__(self, stdio: Stdio, path: Path, *, known_bytes: int) -> None:
        self._stdio = stdio
        self._path = path
        self._known_bytes = known_bytes

    async def read(self) -> Input:
        return await self._stdio.read()

    async def write(self, stream: Stream, data: bytes) -> None:
        new = data[self._known_bytes :]
        self._known_bytes = max(0, self._known_bytes - len(data))
        append_now(self._path, new)


async def _perform(shell: Shell, program: Program, stdio: Stdio) -> Exit:
    """Run for real: time passes, output goes out, input comes in."""
    has_input = True
    answer: bytes | None = None
    while True:
        try:
            effect = program.send(answer)
        except StopIteration as end:
            return Exit(code=end.value)
        answer = None
        match effect:
            case Sleep():
                await asyncio.sleep(effect.seconds)
            case Output():
                try:
                    await _write(shell, effect, stdio)
                except ConnectionError:
                    return HANG_UP
            case Read() if has_input:
                answer = await _read(shell, stdio)
                has_input = answer is not None
            case Read() | Forever():
                pass


async def _read(shell: Shell, stdio: Stdio) -> bytes | None:
    while True:
        piece = await stdio.read()
        match piece:
            case Data():
                return piece.data
            case Resize():
                shell.terminal = piece if shell.terminal else None
            case EndOfInput():
                return None


async def _write(shell: Shell, output: Output, stdio: Stdio) -> None:
    """A terminal has one stream and ends lines with CR LF."""
    stream, data = output.stream, output.data
    if shell.terminal:
        stream, data = Stream.STDOUT, data.replace(b"\n", b"\r\n")
    for start in range(0, len(data), PIECE_BYTES):
        await stdio.write(stream, data[start : start + PIECE_BYTES])
