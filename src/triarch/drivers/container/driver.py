"""The `container` architecture: an OCI container per machine, run by crun and minded by conmon."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import msgspec

from triarch.drivers.base import Stdio, capabilities_of
from triarch.drivers.container import resize
from triarch.drivers.container.attached import converse, type_into
from triarch.drivers.container.cards import interfaces_of
from triarch.drivers.container.checkpoint import check_checkpoint
from triarch.drivers.container.config import Paths, capabilities, make_config, small_files
from triarch.drivers.container.devices import attach, detach, until_volumes_free
from triarch.drivers.container.exec import end_orphans, run_exec
from triarch.drivers.container.files import serve_files
from triarch.drivers.container.freeze import Freezes
from triarch.drivers.container.hardware import hardware_of_host
from triarch.drivers.container.log import LogPump, RunLog
from triarch.drivers.container.metering import usage_of
from triarch.drivers.container.monitor import Attachment, conmon_command, resize_console
from triarch.drivers.container.prerequisites import check_host, runtime_version
from triarch.drivers.container.record import (
    RECORD,
    Record,
    RunFiles,
    files_of,
    interface_of,
    read_record,
    write_record,
)
from triarch.drivers.container.refusal import CommandRefused, failed_start
from triarch.drivers.container.resize import limit_at_start
from triarch.drivers.container.run import Run, finish, observation, release, remove_files, sweep, until_free
from triarch.drivers.container.seccomp import FilterCache, Seccomp, load_profile, resolve
from triarch.errors import Busy, Invalid, MachineFailed, TimedOut, Unsupported, WrongState
from triarch.host import cgroup
from triarch.host.launcher.client import Launcher
from triarch.host.launcher.protocol import Launch, Launched, LayerSource, SmallFile
from triarch.host.lxcfs import own_view
from triarch.host.pidfd import is_alive
from triarch.host.process import find_program
from triarch.model.device import HardwareInfo
from triarch.model.driver import (
    DriverInfo,
    ExecRequest,
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
from triarch.model.network import UserLink
from triarch.model.snapshot import Consistency
from triarch.model.state import Status
from triarch.model.template import Init

CACHE_DIR = Path("/var/cache/triarch/seccomp")
# systemd's halt, understood by no other init as anything else (systemd(1)).
_STOP_SIGNALS = {Init.SYSTEM: signal.SIGRTMIN + 3, Init.APP: signal.SIGTERM}
_RELEASE_SECONDS = 10.0
_POLL_SECONDS = 0.002
# How long the mounts of a start that was broken off may take to vanish.
_DELTA_SECONDS = 2.0


class ContainerDriver:
    """Machines as OS containers, each in namespaces, mounts and control groups of its own."""

    name: ClassVar[str] = "container"
    kind: ClassVar[Kind] = Kind.OS_LEVEL
    needs_guest_pack: ClassVar[bool] = False

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._launcher = Launcher(instance.run_dir)
        self._pump = LogPump()
        self._runs: dict[str, Run] = {}
        self._listeners: set[asyncio.Queue[Observation]] = set()
        self._starting = 0
        self._freezes = Freezes()

    # ---- the nine methods

    async def probe(self) -> DriverInfo:
        """Assemble a small machine without running it."""
        version = await check_host(self._instance, self._launcher)
        return DriverInfo(name=self.name, kind=self.kind, version=version, capabilities=tuple(capabilities_of(self)))

    def validate(self, machine: Machine) -> None:
        if machine.network == "user":
            raise Unsupported(
                f"machine '{machine.name}' cannot be a container: user-mode networks are QEMU's; "
                "a container needs 'nat' or 'none'",
                machine=machine.name,
            )
        if machine.forwards and machine.network == "none":
            raise Invalid(f"machine '{machine.name}' has forwarded ports but no network", machine=machine.name)

    async def create(self, spec: MachineSpec) -> None:
        """Nothing is registered anywhere: a container exists from its start to its end."""
        self.validate(spec.machine)

    async def start(self, spec: MachineSpec) -> None:
        run = await self._run_of(spec)
        if run is not None:
            if run.observe().status is not Status.STOPPED:
                return
            # A daemon died between making the container and letting it go.
            run.kill()
            await run.put_away()
        async with self._undone_when_failing(spec):
            run = await self._launch(spec, terminal=None, attached=False)
            await self._plug_all(spec, run)
            await _let_go(run)

    async def stop(self, spec: MachineSpec, timeout_seconds: float) -> None:
        run = await self._run_of(spec)
        if run is None:
            return
        run.signal(_STOP_SIGNALS[spec.machine.init])
        try:
            async with asyncio.timeout(timeout_seconds):
                await run.put_away()
                await until_volumes_free(spec)
        except BaseException as error:
            # An end that comes later was not asked for any more.
            run.files.ending.unlink(missing_ok=True)
            if not isinstance(error, TimeoutError):
                raise
            raise TimedOut(
                f"machine '{spec.machine.name}' did not stop within {timeout_seconds:g} s",
                hint=f"triarch kill {spec.machine.name}",
                machine=spec.machine.name,
            ) from error

    async def kill(self, spec: MachineSpec) -> None:
        run = await self._run_of(spec)
        if run is not None:
            run.kill()
            await run.put_away()
            await until_volumes_free(spec)
            return
        if read_record(files_of(spec)) is None:
            await self._clear(spec, starting=False)

    async def delete(self, spec: MachineSpec) -> None:
        files = files_of(spec)
        if (await self._run_of(spec)) is not None:
            raise WrongState(f"cannot delete machine '{spec.machine.name}': it runs", machine=spec.machine.name)
        if read_record(files) is None:
            await self._clear(spec, starting=False)
        if files.run_dir.is_dir():
            remove_files(files)
            files.record.unlink(missing_ok=True)
            files.run_dir.rmdir()
        RunLog(spec.state_dir, spec.log_path).finish()
        self._remove_common_group(spec)

    async def observe(self, spec: MachineSpec) -> Observation:
        files = files_of(spec)
        run = await self._run_of(spec)
        if run is not None:
            return run.observe()
        record = read_record(files)
        if record is None:
            return Observation(uuid=spec.uuid, status=Status.ABSENT)
        return observation(record, files)

    async def events(self) -> AsyncIterator[Observation]:
        queue: asyncio.Queue[Observation] = asyncio.Queue()
        self._listeners.add(queue)
        try:
            records = self._records()
            for record, files in records:
                run = await self._adopt(record, files)
                known = run.record if run is not None else read_record(files)
                if known is not None and not (run is not None and known.exit is not None):
                    yield observation(known, files)
            await end_orphans({str(files.runtime_root): record.cgroup for record, files in records})
            while True:
                yield await queue.get()
        finally:
            self._listeners.discard(queue)

    async def close(self) -> None:
        await self._freezes.close()
        for run in self._runs.values():
            run.leave()
        self._runs.clear()
        self._pump.close()
        await self._launcher.close()

    # ---- capabilities

    async def exec(self, spec: MachineSpec, request: ExecRequest, stdio: Stdio) -> Exit:
        run = await self._running(spec, "run a command in")
        return await run_exec(spec, run.record.first, request, stdio, self._crun)

    async def serve_files(self, spec: MachineSpec, stdio: Stdio) -> None:
        await serve_files(spec, await self._running(spec, "reach the files of"), self._launcher, stdio)

    async def console(self, spec: MachineSpec, stdio: Stdio) -> None:
        run = await self._running(spec, "attach to")
        await type_into(stdio, run.files, takes_input=run.record.terminal)

    async def start_attached(self, spec: MachineSpec, stdio: Stdio, terminal: Resize | None) -> Exit:
        if spec.machine.init is Init.SYSTEM:
            raise Unsupported(f"machine '{spec.machine.name}' boots its own init: only a command can be attached to")
        if (await self._run_of(spec)) is not None:
            raise WrongState(f"cannot start machine '{spec.machine.name}': it runs", machine=spec.machine.name)
        try:
            async with self._undone_when_failing(spec):
                run = await self._launch(spec, terminal=terminal, attached=True)
                attachment = await Attachment.open(run.files)
                if terminal is not None:
                    resize_console(run.files, terminal)
                await self._plug_all(spec, run)
                await _let_go(run)
        except CommandRefused as error:
            await stdio.write(Stream.STDERR, f"{error.message}\n".encode())
            return error.meaning
        try:
            await converse(attachment, stdio, run.files, run.record.first, takes_input=True)
        except BaseException:
            run.kill()
            await asyncio.shield(run.put_away())
            raise
        await run.put_away()
        assert run.record.exit is not None
        return run.record.exit

    async def pause(self, spec: MachineSpec) -> None:
        await self._running(spec, "pause")
        await asyncio.to_thread(cgroup.set_frozen, spec.cgroup, True)

    async def resume(self, spec: MachineSpec) -> None:
        await self._need_run(spec, "resume")
        cgroup.set_frozen(spec.cgroup, False)

    async def usage(self, spec: MachineSpec) -> Usage:
        await self._need_run(spec, "measure")
        return usage_of(spec)

    async def attach(self, spec: MachineSpec, device: ResolvedDevice) -> None:
        run = await self._running(spec, "attach a device to")
        await attach(self._launcher, run.record, spec, device, new=False)

    async def detach(self, spec: MachineSpec, device: ResolvedDevice) -> None:
        run = await self._running(spec, "detach a device from")
        await detach(self._launcher, run.record, spec, device)

    async def hardware(self, spec: MachineSpec) -> HardwareInfo:
        await self._running(spec, "look at")
        return await asyncio.to_thread(hardware_of_host)

    async def _plug_all(self, spec: MachineSpec, run: Run) -> None:
        """What the machine has from its first instruction on."""
        for device in spec.devices:
            await attach(self._launcher, run.record, spec, device, new=True)

    async def freeze(self, spec: MachineSpec) -> Consistency:
        return await self._freezes.freeze(spec)

    async def thaw(self, spec: MachineSpec) -> float | None:
        return await self._freezes.thaw(spec)

    async def check_checkpoint(self, spec: MachineSpec) -> None:
        await check_checkpoint(spec)

    async def resize(self, spec: MachineSpec) -> None:
        await self._need_run(spec, "change the limits of")
        await resize.resize(spec)

    async def grow_disk(self, spec: MachineSpec) -> None:
        await self._need_run(spec, "grow the disk of")
        await resize.grow_disk(spec)

    async def _need_run(self, spec: MachineSpec, verb: str) -> Run:
        run = await self._run_of(spec)
        if run is None:
            name = spec.machine.name
            raise WrongState(f"cannot {verb} machine '{name}': it does not run", machine=name)
        return run

    # ---- runs

    async def _run_of(self, spec: MachineSpec) -> Run | None:
        """The run that is alive now, adopted if it has to be. One that has just ended is put away first."""
        files = files_of(spec)
        record = read_record(files)
        return None if record is None else await self._adopt(record, files)

    async def _adopt(self, record: Record, files: RunFiles) -> Run | None:
        run = self._runs.get(record.uuid)
        if run is not None and run.record.monitor == record.monitor:
            if not is_alive(record.monitor):
                await run.put_away()
            return self._runs.get(record.uuid)
        if record.exit is not None:
            return None
        if not is_alive(record.monitor) and not is_alive(record.first):
            log = RunLog(record.state_dir, record.log_path)
            await finish(record, files)
            log.finish()
            return None
        return self._watch(record, files)

    def _watch(self, record: Record, files: RunFiles) -> Run:
        run = Run(record, files, self._pump, self._ended)
        self._runs[record.uuid] = run
        run.watch()
        return run

    def _ended(self, run: Run) -> None:
        if self._runs.get(run.record.uuid) is run:
            del self._runs[run.record.uuid]
        for queue in self._listeners:
            queue.put_nowait(run.observe())

    def _records(self) -> list[tuple[Record, RunFiles]]:
        found = []
        for path in sorted(Path(self._instance.run_dir).glob(f"m/*/{RECORD}")):
            files = RunFiles(run_dir=path.parent)
            record = read_record(files)
            if record is not None:
                found.append((record, files))
        return found

    async def _running(self, spec: MachineSpec, verb: str) -> Run:
        run = await self._run_of(spec)
        status = Status.STOPPED if run is None else run.observe().status
        if run is None or status is not Status.RUNNING:
            name = spec.machine.name
            raise WrongState(f"cannot {verb} machine '{name}': it is {status}; that needs running", machine=name)
        return run

    # ---- starting

    async def _launch(self, spec: MachineSpec, *, terminal: Resize | None, attached: bool) -> Run:
        """Make the container; its first process waits. Whatever an earlier run left is removed first."""
        files = files_of(spec)
        await self._clear(spec, starting=True)
        seccomp = self._filter(spec.machine.init)
        compiled = self._filters.get(seccomp)
        request = self._prepare(spec, files, seccomp, compiled, terminal, attached)
        self._starting += 1
        try:
            launched = await self._launcher.launch(request)
        except MachineFailed as error:
            raise failed_start(error, spec) from error
        finally:
            self._starting -= 1
        limit_at_start(spec)
        record = _record(spec, launched, terminal)
        write_record(files, record)
        if compiled is None:
            self._filters.keep(seccomp, files.compiled_filter(spec.uuid))
        return self._watch(record, files)

    def _prepare(
        self,
        spec: MachineSpec,
        files: RunFiles,
        seccomp: Seccomp,
        compiled: str | None,
        terminal: Resize | None,
        attached: bool,
    ) -> Launch:
        """Write the runtime's configuration; return what to ask of the launcher."""
        if spec.machine.init is Init.APP and not spec.command:
            raise Invalid(f"machine '{spec.machine.name}' has no command to run", machine=spec.machine.name)
        if isinstance(spec.link, UserLink):
            raise Unsupported(f"machine '{spec.machine.name}' cannot be a container with a user-mode network")
        place = self._launcher.place
        small = small_files(spec)
        paths = Paths(
            root=place.root,
            user_namespace=place.user_namespace,
            network_namespace=place.network_namespace,
            files={name: place.file(name) for name in small},
        )
        log = RunLog(spec.state_dir, spec.log_path)
        log.prepare()
        for directory in (files.run_dir, files.runtime_root, files.exit_dir):
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        config = make_config(
            spec,
            paths,
            seccomp,
            compiled,
            terminal,
            device_rules=cgroup.can_filter_devices(),
            view=own_view(self._launcher.pid),
        )
        files.config.write_bytes(msgspec.json.encode(config))
        on_terminal = spec.machine.init is Init.SYSTEM or terminal is not None
        return Launch(
            id=0,
            layers=tuple(LayerSource(digest=layer.digest, path=layer.path) for layer in spec.layers),
            delta_path=spec.delta_path,
            durable=not spec.machine.ephemeral,
            id_base=spec.machine.ids.base,
            id_count=spec.machine.ids.count,
            interfaces=interfaces_of(spec),
            files=tuple(SmallFile(name=name, text=text) for name, text in small.items()),
            cgroup=spec.cgroup,
            monitor=conmon_command(
                self._conmon, self._crun, spec.uuid, files, str(log.source), terminal=on_terminal, attached=attached
            ),
            directory=str(files.run_dir),
        )

    async def _clear(self, spec: MachineSpec, *, starting: bool, wait_seconds: float = _DELTA_SECONDS) -> None:
        """Remove what an earlier run or an interrupted start left, the record too."""
        files = files_of(spec)
        if read_record(files) is None and _begun(files):
            await self._launcher.settle()
            await sweep(files.run_dir, spec.cgroup)
            await release(spec.cgroup, interface_of(spec))
            with suppress(Busy):
                # Another machine may hold the delta by right.
                await until_free(spec.delta_path, wait_seconds)
        if starting:
            files.record.unlink(missing_ok=True)
        remove_files(files)

    @asynccontextmanager
    async def _undone_when_failing(self, spec: MachineSpec) -> AsyncIterator[None]:
        """Whatever ends the block by an exception: the start is undone before that goes on."""
        try:
            yield
        except BaseException as error:
            wait_seconds = 0.0 if isinstance(error, Busy) else _DELTA_SECONDS
            await asyncio.shield(asyncio.create_task(self._undo(spec, wait_seconds)))
            raise

    async def _undo(self, spec: MachineSpec, wait_seconds: float) -> None:
        """After a start that failed or was cancelled: nothing of it is left."""
        run = self._runs.get(spec.uuid)
        if run is not None:
            run.kill()
            await run.put_away()
        files = files_of(spec)
        files.record.unlink(missing_ok=True)
        await self._clear(spec, starting=True, wait_seconds=wait_seconds)
        RunLog(spec.state_dir, spec.log_path).finish()
        self._remove_common_group(spec)

    def _remove_common_group(self, spec: MachineSpec) -> None:
        """The instance's own group, once no machine is in it; not while a start is about to make one below it."""
        if not self._starting:
            cgroup.remove_if_empty(str(Path(spec.cgroup).parent))

    # ---- what does not change while the daemon runs

    @cached_property
    def _crun(self) -> str:
        return find_program("crun")

    @cached_property
    def _conmon(self) -> str:
        return find_program("conmon")

    @cached_property
    def _filters(self) -> FilterCache:
        return FilterCache(CACHE_DIR, runtime_version())

    def _filter(self, init: Init) -> Seccomp:
        if init not in self._resolved:
            self._resolved[init] = resolve(load_profile(), capabilities(init))
        return self._resolved[init]

    @cached_property
    def _resolved(self) -> dict[Init, Seccomp]:
        return {}


async def _let_go(run: Run) -> None:
    """Let the first process run: it waits to read one byte. Raises `MachineFailed` when it is gone."""
    fifo = run.files.start_fifo(run.record.uuid)
    deadline = time.monotonic() + _RELEASE_SECONDS
    while is_alive(run.record.first) and time.monotonic() < deadline:
        try:
            fd = os.open(fifo, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            await asyncio.sleep(_POLL_SECONDS)
            continue
        try:
            os.write(fd, b"0")
        finally:
            os.close(fd)
        fifo.unlink(missing_ok=True)
        return
    raise MachineFailed("the container's first process ended before it was released")


def _begun(files: RunFiles) -> bool:
    """Whether a start got as far as a configuration."""
    return files.config.exists()


def _record(spec: MachineSpec, launched: Launched, terminal: Resize | None) -> Record:
    return Record(
        uuid=spec.uuid,
        init=spec.machine.init,
        monitor=launched.monitor,
        first=launched.init,
        cgroup=spec.cgroup,
        delta_path=spec.delta_path,
        host_interface=interface_of(spec),
        log_path=spec.log_path,
        state_dir=spec.state_dir,
        terminal=spec.machine.init is Init.SYSTEM or terminal is not None,
    )
