"""Starting QEMU: open all that it may touch, give that to an unprivileged process, and let go of it here."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from triarch.drivers.qemu.cmdline import (
    Accelerator,
    Headroom,
    Wiring,
    headroom,
    memory_bytes,
    processors,
    qemu_argv,
)
from triarch.drivers.qemu.run import Run
from triarch.errors import Failed, NotFound, Unavailable, Unsupported
from triarch.guest.protocol import GuestConfig, encode_config
from triarch.host.facts import memory_bytes as host_memory_bytes
from triarch.host.kvm import groups_that_may_open
from triarch.host.limits import Limits, make_limited_group
from triarch.host.locks import lock_file
from triarch.host.pidfd import ProcessId
from triarch.host.rights import rights
from triarch.host.spawn import FIRST_FD, Detached, Identity, spawn
from triarch.host.tap import open_macvtap, open_tap
from triarch.model.driver import MachineSpec
from triarch.model.machine import Machine
from triarch.model.network import BridgeLink, Link, MacvlanLink

_OTHERS_READ = 0o004
_INCOMING = ("-incoming", "defer")

# QEMU's tables of translated code grow by copying: one heap, and large blocks that go back when freed (mallopt(3)).
_ALLOCATION = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "131072",
    "MALLOC_TRIM_THRESHOLD_": "131072",
}

# What QEMU needs beside the guest's memory: its own, the translated code, page tables, buffers in flight.
_OVERHEAD_BYTES = 320 << 20
_OVERHEAD_SHARE = 16
# QEMU's own threads; its pool for disk requests has up to 64.
_OVERHEAD_THREADS = 128


def launch(
    spec: MachineSpec, run: Run, config: GuestConfig, accelerator: Accelerator, *, incoming: bool = False
) -> ProcessId:
    """Start QEMU (blocking, milliseconds). It owns the delta's lock and the tap from then on.

    With `incoming` it waits to be given the state that it goes on from.

    It runs as the machine's own user where this process may start programs as others, else as the daemon's.
    Raises `Busy` when something holds the delta, and whatever the pieces raise; then nothing of it is left but files
    of `run`, which `Run.remove` takes away, and the control group.
    """
    owner = owner_of(spec)
    with ExitStack() as held:
        fds = _Descriptors(held)
        wiring = _wire(spec, run, config, fds, owner)
        stderr_fd = held.enter_context(_opened(run.qemu_log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND))
        process_id_fd = held.enter_context(_opened(run.process_path, os.O_RDWR | os.O_CREAT | os.O_TRUNC))
        return spawn(
            Detached(
                argv=(*qemu_argv(spec, config, wiring, accelerator, _headroom(spec)), *(_INCOMING if incoming else ())),
                fds=fds.sources,
                stderr_fd=stderr_fd,
                process_id_fd=process_id_fd,
                cgroup_fds=_enter_group(spec, held),
                identity=None if owner is None else _identity(owner, accelerator),
                environment=_ALLOCATION,
                huge_pages=accelerator is Accelerator.KVM,
                max_file_bytes=Path(spec.delta_path).stat().st_size,
            )
        )


def owner_of(spec: MachineSpec) -> int | None:
    """The user that the machine's QEMU runs as; None for the daemon's own."""
    return spec.machine.ids.base if rights().other_users else None


class _Descriptors:
    """Collects what QEMU inherits; `add` tells the number that a descriptor will have there."""

    def __init__(self, held: ExitStack) -> None:
        self.sources: list[int] = []
        self._held = held

    def add(self, fd: int) -> int:
        self._held.callback(os.close, fd)
        self.sources.append(fd)
        return FIRST_FD + len(self.sources) - 1


def _wire(spec: MachineSpec, run: Run, config: GuestConfig, fds: _Descriptors, owner: int | None) -> Wiring:
    pack = spec.guest_pack
    if pack is None:
        raise Unavailable(f"machine '{spec.machine.name}' cannot start: there is no guest pack")
    delta = fds.add(lock_file(spec.delta_path))
    kernel = fds.add(_open_shared(pack.kernel_path, owner))
    initrd = fds.add(_open_shared(pack.initrd_path, owner))
    layers = tuple(fds.add(_open_shared(layer.path, owner)) for layer in spec.layers)
    sockets = tuple(fds.add(each.detach()) for each in run.listen())
    monitor, console, agent, control = sockets
    return Wiring(
        kernel=kernel,
        initrd=initrd,
        config=fds.add(_config_file(config, owner)),
        delta=delta,
        log=fds.add(_open(Path(spec.log_path), os.O_WRONLY | os.O_CREAT | os.O_APPEND)),
        report=fds.add(_open(run.report, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)),
        monitor=monitor,
        console=console,
        agent=agent,
        control=control,
        layers=layers,
        modules=fds.add(_open_shared(pack.modules_path, owner)) if config.modules else None,
        tap=_tap(spec, fds),
    )


def _tap(spec: MachineSpec, fds: _Descriptors) -> int | None:
    fd = tap_of(spec.link)
    return None if fd is None else fds.add(fd)


def tap_of(link: Link) -> int | None:
    """The descriptor of a card's tap, made and plugged in; None for a link that has none. Raises as `open_tap` does."""
    match link:
        case BridgeLink():
            return open_tap(link.host_interface, link.bridge)
        case MacvlanLink():
            return open_macvtap(link.host_interface, link.parent, link.nic.mac)
        case _:
            return None


def _open(path: Path, flags: int) -> int:
    return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    fd = _open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


def _open_shared(path: str, owner: int | None) -> int:
    """Open what many machines read. QEMU opens it once more through /proc, with no more rights than anybody."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NotFound(f"there is no file {path}", path=path) from error
    if owner is not None and not os.fstat(fd).st_mode & _OTHERS_READ:
        os.close(fd)
        raise Failed(f"QEMU runs unprivileged and may not read {path}", hint=f"chmod a+r {path}", path=path)
    return fd


def _config_file(config: GuestConfig, owner: int | None) -> int:
    """Keys and environment in memory that only this QEMU reads."""
    fd = os.memfd_create("triarch-config", os.MFD_CLOEXEC)
    try:
        os.fchmod(fd, 0o400)
        if owner is not None:
            os.fchown(fd, owner, owner)
        os.write(fd, encode_config(config))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _identity(owner: int, accelerator: Accelerator) -> Identity:
    """Nobody else's user. KVM's device is opened by name, so a group that may comes along."""
    groups = groups_that_may_open() if accelerator is Accelerator.KVM else ()
    return Identity(user_id=owner, group_id=owner, groups=groups or ())


def _enter_group(spec: MachineSpec, held: ExitStack) -> tuple[int, ...]:
    """Where the host lets us make none, a machine runs without limits other than its memory and processors."""
    try:
        fds = make_limited_group(spec.cgroup, limits_of(spec.machine))
    except Unavailable as error:
        cpus = spec.machine.resources.cpus
        if cpus is not None and cpus != int(cpus):
            raise Unsupported(
                f"cannot give machine '{spec.machine.name}' {cpus} processors: {error.message}; "
                "without a control group a VM needs a whole number"
            ) from error
        return ()
    for fd in fds:
        held.callback(os.close, fd)
    return fds


def limits_of(machine: Machine, guest_bytes: int | None = None) -> Limits:
    """What the VM takes from the host; `guest_bytes` replaces what the guest itself may use of memory.

    The guest's own processes are not the host's, so `pids` bounds nothing here. QEMU itself bounds rates of I/O.
    """
    resources = machine.resources
    memory = memory_bytes(resources) if guest_bytes is None else guest_bytes
    return Limits(
        memory_bytes=memory + _OVERHEAD_BYTES + memory // _OVERHEAD_SHARE,
        swap_bytes=resources.swap_bytes,
        cpus=resources.cpus,
        cpu_weight=resources.cpu_weight,
        cpu_set=resources.cpu_set,
        pids=_OVERHEAD_THREADS + max(processors(resources), os.cpu_count() or 1),
        io_weight=resources.io_weight,
    )


def _headroom(spec: MachineSpec) -> Headroom:
    return headroom(spec.machine.resources, os.cpu_count() or 1, host_memory_bytes())
