"""Machines as VMs under QEMU: `hosted` (translated code, no hardware needed) and `kvm` (the same on hardware)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from triarch.drivers.base import Stdio, capabilities_of
from triarch.drivers.qemu import probe, resize
from triarch.drivers.qemu.checkpoint import (
    SavedState,
    check_state_fits,
    head_of,
    open_state,
    save_state,
    take_in,
)
from triarch.drivers.qemu.cmdline import MAX_PROCESSORS, MIN_MEMORY_BYTES, Accelerator, guest_config, processors
from triarch.drivers.qemu.console import SerialLines
from triarch.drivers.qemu.control import ControlPort, open_control
from triarch.drivers.qemu.devices import Devices, was_interrupted
from triarch.drivers.qemu.freeze import Freezes
from triarch.drivers.qemu.hardware import ask_hardware
from triarch.drivers.qemu.launch import launch, owner_of
from triarch.drivers.qemu.metering import usage_of
from triarch.drivers.qemu.monitor import is_paused, monitor
from triarch.drivers.qemu.run import Record, Run, new_record, runs
from triarch.drivers.qemu.watch import Watch, Watches, remove_group
from triarch.errors import (
    Busy,
    Damaged,
    Denied,
    Error,
    Invalid,
    MachineFailed,
    MissingProgram,
    TimedOut,
    Unavailable,
    Unsupported,
    WrongState,
)
from triarch.guest.agent import Agent
from triarch.guest.freeze import set_clock
from triarch.guest.keys import generate_keys
from triarch.guest.protocol import Stop
from triarch.host.rights import rights
from triarch.host.spawn import reap
from triarch.model.device import HardwareInfo, HostDevice, UsbDevice
from triarch.model.driver import DriverInfo, ExecRequest, Kind, MachineSpec, Observation, Resize, ResolvedDevice, Usage
from triarch.model.instance import Instance
from triarch.model.machine import Exit, Machine
from triarch.model.resources import format_size
from triarch.model.snapshot import Consistency
from triarch.model.state import Status

_START_SECONDS = 60.0
# QEMU writes the report a moment before, or after, it passes on what the control port says.
_REPORT_TRIES, _REPORT_PAUSE_SECONDS = 200, 0.005

# Errors of a start that say more than that it failed.
_TELLING = (Busy, Damaged, Denied, Invalid, MachineFailed, MissingProgram, Unsupported)


class QemuDriver:
    """What both architectures are. All that must outlive this object is in files (`Run`) and in QEMU itself."""

    name: ClassVar[str]
    kind: ClassVar[Kind]
    accelerator: ClassVar[Accelerator]
    needs_guest_pack: ClassVar[bool] = True

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._watches = Watches()
        self._agents: dict[str, Agent] = {}
        self._attached: dict[str, ControlPort] = {}
        self._lines = SerialLines()
        self._freezes = Freezes()
        self._devices = Devices()

    async def probe(self) -> DriverInfo:
        """Start QEMU for a moment; for `kvm` run real guest code too."""
        version = await probe.try_accelerator(self.accelerator, as_others=rights().other_users)
        return DriverInfo(name=self.name, kind=self.kind, version=version, capabilities=capabilities_of(self))

    def validate(self, machine: Machine) -> None:
        """A kernel takes some room, and q35 has a limit of processors."""
        resources = machine.resources
        if resources.memory_bytes is not None and resources.memory_bytes < MIN_MEMORY_BYTES:
            raise Invalid(
                f"machine '{machine.name}' has {format_size(resources.memory_bytes)} of memory; "
                f"a VM needs at least {format_size(MIN_MEMORY_BYTES)}"
            )
        for name, device in machine.devices.items():
            if isinstance(device, HostDevice | UsbDevice):
                raise Unsupported(
                    f"machine '{machine.name}' cannot have device '{name}' as a VM: a VM's kernel has no driver for "
                    "devices of the host; container passes them on",
                    machine=machine.name,
                )
        if processors(resources) > MAX_PROCESSORS:
            raise Invalid(
                f"machine '{machine.name}' has {processors(resources)} processors; a VM takes at most {MAX_PROCESSORS}"
            )

    # -- start

    async def create(self, spec: MachineSpec) -> None:
        """QEMU keeps no register."""

    async def start(self, spec: MachineSpec) -> None:
        watch = self._live(spec)
        if watch is not None and spec.devices and await was_interrupted(watch.run, spec.machine.name):
            await self._watches.kill(watch)
            watch = None
        if watch is None:
            await self._start(spec)

    async def start_attached(self, spec: MachineSpec, stdio: Stdio, terminal: Resize | None) -> Exit:
        if self._live(spec) is not None:
            raise WrongState(f"cannot run machine '{spec.machine.name}': it is running; run needs stopped")
        watch = await self._start(spec, attached=True, terminal=terminal)
        with suppress(Unavailable):
            async with open_control(watch.run.control) as control:
                self._attached[spec.uuid] = control
                try:
                    await control.carry(stdio)
                finally:
                    del self._attached[spec.uuid]
        ending = await self._end_early(watch)
        await remove_group(spec.cgroup)
        if ending.failed or ending.exit is None:
            raise MachineFailed(f"machine '{spec.machine.name}' failed: {ending.detail}", machine=spec.machine.name)
        return ending.exit

    async def _end_early(self, watch: Watch) -> Observation:
        """The end of a run whose exit was told on the control port: powering off takes longer than all else of it."""
        for _ in range(_REPORT_TRIES):
            if watch.ended.done():
                break
            if watch.run.exit_told:
                return await self._watches.kill(watch)
            await asyncio.sleep(_REPORT_PAUSE_SECONDS)
        return await asyncio.shield(watch.ended)

    async def _start(
        self,
        spec: MachineSpec,
        *,
        attached: bool = False,
        terminal: Resize | None = None,
        state: SavedState | None = None,
    ) -> Watch:
        name = spec.machine.name
        for path in (Path(spec.run_dir), Path(spec.state_dir), Path(spec.log_path).parent):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        run = Run.of(spec)
        if run.process() is not None:
            raise Busy(f"machine '{name}' is running under another architecture")
        await self._close_agent(spec.uuid)
        run.remove()
        keys = generate_keys() if state is None else state.head.keys
        config = guest_config(spec, keys.host_key, keys.client_public_key, attached=attached, terminal=terminal)
        record = new_record(spec, self.name, keys)
        watch: Watch | None = None
        try:
            run.write_record(record)
            process = launch(spec, run, config, self.accelerator, incoming=state is not None)
            watch = self._watches.take(run, record, starting=True)
            if watch is None:
                reap(process.pid)
                raise MachineFailed(f"machine '{name}' did not start: {run.ending(record).detail}", machine=name)
            await self._wait_running(watch)
            if spec.devices:
                await self._devices.plug_all(spec, run, process, go_on=state is None)
            await resize.throttle_from_start(spec, watch.run)
            if state is not None:
                await take_in(run, name, state)
        except BaseException as error:
            await self._undo(run, record, watch)
            if isinstance(error, Error | OSError) and not isinstance(error, _TELLING):
                raise MachineFailed(f"machine '{name}' did not start: {error}", machine=name) from error
            raise
        self._watches.started(watch)
        return watch

    async def _wait_running(self, watch: Watch) -> None:
        """Until QEMU answers that the guest runs, or has ended in good order already."""
        name = watch.record.name
        answer = asyncio.ensure_future(is_paused(watch.run.monitor, name))
        either: tuple[asyncio.Future[Any], ...] = (answer, watch.ended)
        try:
            async with asyncio.timeout(_START_SECONDS):
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                with suppress(Unavailable):
                    if answer.done():
                        answer.result()
                        return
                # QEMU hung up: its end is not far.
                ending = await asyncio.shield(watch.ended)
        except TimeoutError as error:
            raise MachineFailed(f"machine '{name}' did not start: QEMU does not answer", machine=name) from error
        finally:
            answer.cancel()
            await asyncio.gather(answer, return_exceptions=True)
        if ending.failed:
            reason = watch.run.complaint() or ending.detail
            raise MachineFailed(f"machine '{name}' did not start: {reason}", machine=name)

    async def _undo(self, run: Run, record: Record, watch: Watch | None) -> None:
        """A start that fails leaves nothing."""
        if watch is not None and not watch.ended.done():
            await self._watches.kill(watch)
        run.remove()
        await remove_group(record.cgroup)

    # -- end

    async def stop(self, spec: MachineSpec, timeout_seconds: float) -> None:
        watch = self._live(spec)
        if watch is not None:
            try:
                async with asyncio.timeout(timeout_seconds):
                    await self._ask_to_stop(watch)
            except TimeoutError as error:
                raise TimedOut(
                    f"machine '{spec.machine.name}' did not stop within {timeout_seconds:g} s; it still runs",
                    hint=f"triarch kill {spec.machine.name}",
                ) from error
        await self._put_away(spec)

    async def _ask_to_stop(self, watch: Watch) -> None:
        attached = self._attached.get(watch.record.uuid)
        if attached is not None:
            await attached.send(Stop())
            await asyncio.shield(watch.ended)
            return
        with suppress(Unavailable):
            async with open_control(watch.run.control) as control:
                await control.send(Stop())
                await asyncio.shield(watch.ended)
        await asyncio.shield(watch.ended)

    async def kill(self, spec: MachineSpec) -> None:
        watch = self._live(spec)
        if watch is not None:
            watch.run.note_killed()
            await self._watches.kill(watch)
        await self._put_away(spec)

    async def _put_away(self, spec: MachineSpec) -> None:
        """What no longer runs holds nothing on the host but the files that say how it ended."""
        await self._close_agent(spec.uuid)
        if self._record(spec) is not None:
            Run.of(spec).remove_sockets()
            await remove_group(spec.cgroup)

    async def _close_agent(self, uuid: str) -> None:
        agent = self._agents.pop(uuid, None)
        if agent is not None:
            await agent.close()

    async def delete(self, spec: MachineSpec) -> None:
        if self._live(spec) is not None:
            raise WrongState(f"cannot forget machine '{spec.machine.name}': it is running")
        await self._put_away(spec)
        if self._record(spec) is not None:
            Run.of(spec).remove()

    # -- look

    async def observe(self, spec: MachineSpec) -> Observation:
        record = self._record(spec)
        run = Run.of(spec)
        if record is None or not run.begun:
            return Observation(uuid=spec.uuid, status=Status.ABSENT)
        return await self._observe(run, record)

    async def _observe(self, run: Run, record: Record) -> Observation:
        watch = self._watches.take(run, record)
        if watch is None:
            return run.ending(record)
        status, detail = Status.RUNNING, ""
        try:
            if await is_paused(run.monitor, record.name):
                status = Status.PAUSED
        except Error as error:
            if self._watches.take(run, record) is None:
                return run.ending(record)
            detail = error.message
        return Observation(uuid=record.uuid, status=status, pid=watch.process.pid, detail=detail)

    async def events(self) -> AsyncIterator[Observation]:
        ends = self._watches.ends = asyncio.Queue()
        # Which of them live is settled before anything is awaited, so that no end is told twice or not at all.
        known = [(run, record) for run, record in runs(self._instance, self.name) if run.begun]
        live = [(run, record) for run, record in known if self._watches.take(run, record) is not None]
        over = [run.ending(record) for run, record in known if (run, record) not in live]
        try:
            for observation in over:
                yield observation
            for run, record in live:
                observation = await self._observe(run, record)
                if observation.status is not Status.STOPPED:
                    yield observation
            while True:
                yield await ends.get()
        finally:
            if self._watches.ends is ends:
                self._watches.ends = None

    async def close(self) -> None:
        self._freezes.forget()
        for uuid in tuple(self._agents):
            await self._close_agent(uuid)
        self._watches.close()
        self._devices.close()

    def _record(self, spec: MachineSpec) -> Record | None:
        """What is known of the machine's run, if it is one of this architecture."""
        record = Run.of(spec).record()
        return record if record is not None and record.architecture == self.name else None

    def _live(self, spec: MachineSpec) -> Watch | None:
        record = self._record(spec)
        return None if record is None else self._watches.take(Run.of(spec), record)

    def _need_live(self, spec: MachineSpec, verb: str) -> Watch:
        watch = self._live(spec)
        if watch is None:
            raise WrongState(f"cannot {verb} machine '{spec.machine.name}': it is not running")
        return watch

    # -- capabilities

    async def exec(self, spec: MachineSpec, request: ExecRequest, stdio: Stdio) -> Exit:
        environment = spec.template.environment | spec.machine.environment | request.environment
        request = msgspec.structs.replace(request, environment=environment)
        return await self._agent(spec, "exec in").exec(request, stdio)

    def _agent(self, spec: MachineSpec, verb: str) -> Agent:
        watch = self._need_live(spec, verb)
        agent = self._agents.get(spec.uuid)
        if agent is None:
            agent = self._agents[spec.uuid] = Agent(watch.run.agent, watch.record.keys)
        return agent

    async def serve_files(self, spec: MachineSpec, stdio: Stdio) -> None:
        await self._agent(spec, "reach the files of").serve_files(stdio)

    async def console(self, spec: MachineSpec, stdio: Stdio) -> None:
        watch = self._need_live(spec, "attach to")
        with suppress(Unavailable):
            await self._lines.type_into(watch.run.console, stdio)

    async def pause(self, spec: MachineSpec) -> None:
        await self._command(spec, "pause", "stop")

    async def resume(self, spec: MachineSpec) -> None:
        await self._command(spec, "resume", "cont")

    async def _command(self, spec: MachineSpec, verb: str, command: str) -> None:
        watch = self._need_live(spec, verb)
        async with monitor(watch.run.monitor, spec.machine.name) as client:
            await client.execute(command)

    async def freeze(self, spec: MachineSpec) -> Consistency:
        return await self._freezes.freeze(spec, self._agent(spec, "freeze"))

    async def thaw(self, spec: MachineSpec) -> float | None:
        return None if self._live(spec) is None else await self._freezes.thaw(spec)

    async def check_checkpoint(self, spec: MachineSpec) -> None:
        check_state_fits(spec)

    async def save(self, spec: MachineSpec, path: str) -> None:
        watch = self._need_live(spec, "save")
        await self._close_agent(spec.uuid)
        head = head_of(spec, watch.record)
        await save_state(watch.run, spec.machine.name, head, Path(path))

    async def load(self, spec: MachineSpec, path: str) -> None:
        with open_state(path, spec, self.name) as state:
            await self._start(spec, state=state)
        # A clock that is late is no reason to give up a machine that runs.
        with suppress(Error):
            await set_clock(self._agent(spec, "set the clock of"))

    async def attach(self, spec: MachineSpec, device: ResolvedDevice) -> None:
        watch, agent = self._need_live(spec, "attach a device to"), self._agent(spec, "attach a device to")
        await self._devices.attach(spec, watch.run, watch.process, agent, device)

    async def detach(self, spec: MachineSpec, device: ResolvedDevice) -> None:
        watch, agent = self._need_live(spec, "detach a device from"), self._agent(spec, "detach a device from")
        await self._devices.detach(spec, watch.run, agent, device)

    async def hardware(self, spec: MachineSpec) -> HardwareInfo:
        return await ask_hardware(self._agent(spec, "look at"), spec.machine.name)

    async def resize(self, spec: MachineSpec) -> None:
        watch = self._need_live(spec, "change the limits of")
        await resize.resize(spec, watch.run, attached=spec.uuid in self._attached)

    async def grow_disk(self, spec: MachineSpec) -> None:
        watch = self._need_live(spec, "grow the disk of")
        await resize.grow_disk(spec, watch.run, watch.process, owner_of(spec))

    async def usage(self, spec: MachineSpec) -> Usage:
        return usage_of(spec, self._need_live(spec, "measure").process)


class HostedDriver(QemuDriver):
    """A VM in an ordinary process: QEMU translates the guest's code. Runs wherever QEMU does."""

    name = "hosted"
    kind = Kind.HOSTED
    accelerator = Accelerator.TCG


class KvmDriver(QemuDriver):
    """The same VM on the processor's own virtualization."""

    name = "kvm"
    kind = Kind.BARE_METAL
    accelerator = Accelerator.KVM
