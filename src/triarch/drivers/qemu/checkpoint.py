"""A VM's memory in a file: QEMU's own migration stream behind a head that says whose it is.

    TRIARCH-VM-STATE 1\\n
    length of the next line as ten digits\\n
    `Head` as JSON
    migration stream

Memory that the VM shares with the host's page cache, which is its template's layers, is left out (`x-ignore-shared` of
QEMU's docs/devel/migration.rst): it comes from the same files again.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from triarch.drivers.qemu.freeze import hold
from triarch.drivers.qemu.monitor import monitor
from triarch.drivers.qemu.run import Record, Run, new_record
from triarch.errors import Damaged, Failed, Unavailable, Unsupported
from triarch.guest.keys import AgentKeys
from triarch.model.device import FolderDevice, HostDevice, UsbDevice
from triarch.model.driver import MachineSpec

_MAGIC = b"TRIARCH-VM-STATE 1\n"
_LENGTH_DIGITS = 10
_MAX_HEAD_BYTES = 1 << 20
_POLL_SECONDS = 0.02
_CAPABILITY = {"capability": "x-ignore-shared", "state": True}
# Everything goes to a file as fast as it takes it.
_BYTES_PER_SECOND = 1 << 40
_FD_NAME = "state"
_COPY_BYTES = 1 << 20


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """What a state fits to: nothing else may change under a guest that goes on. `keys` are those of its agent."""

    uuid: str
    architecture: str
    template_digest: str
    pack: str
    memory_bytes: int | None
    cpus: float | None
    keys: AgentKeys


def head_of(spec: MachineSpec, record: Record) -> Head:
    """What the state of this machine, run like this, is good for."""
    return Head(
        uuid=spec.uuid,
        architecture=record.architecture,
        template_digest=spec.template.digest,
        pack=record.pack,
        memory_bytes=spec.machine.resources.memory_bytes,
        cpus=spec.machine.resources.cpus,
        keys=record.keys,
    )


async def save_state(run: Run, name: str, head: Head, path: Path) -> None:
    """Hold the VM and write its state into the new file `path`. Raises `Failed`."""
    encoded = msgspec.json.encode(head)
    # Not the file itself: the size of every file that QEMU may write is limited to that of its disks.
    read_fd, write_fd = os.pipe()
    copying: asyncio.Task[None] | None = None
    try:
        await hold(run, name)
        with path.open("xb") as file:
            path.chmod(0o600)
            file.write(_MAGIC + b"%0*d\n" % (_LENGTH_DIGITS, len(encoded)) + encoded)
            file.flush()
            async with monitor(run.monitor, name) as client:
                await client.execute("migrate-set-capabilities", {"capabilities": [_CAPABILITY]})
                await client.execute("migrate-set-parameters", {"max-bandwidth": _BYTES_PER_SECOND})
                client.send_fd_scm(write_fd)
                await client.execute("getfd", {"fdname": _FD_NAME})
                await client.execute("migrate", {"uri": f"fd:{_FD_NAME}"})
            # QEMU has its own now, whose end is the stream's end.
            os.close(write_fd)
            write_fd = -1
            copying = asyncio.create_task(asyncio.to_thread(_copy, read_fd, file.fileno()))
            await _until_migrated(run, name)
            await copying
    finally:
        if write_fd >= 0:
            os.close(write_fd)
        if copying is not None and not copying.done():
            await asyncio.wait({copying})
        os.close(read_fd)


def _copy(source_fd: int, target_fd: int) -> None:
    while data := os.read(source_fd, _COPY_BYTES):
        view = memoryview(data)
        while view:
            view = view[os.write(target_fd, view) :]


async def _until_migrated(run: Run, name: str) -> None:
    """A session per look: one alone is good for half a minute, and memory may be large."""
    while True:
        async with monitor(run.monitor, name) as client:
            answer = await client.execute("query-migrate")
        status = answer.get("status") if isinstance(answer, dict) else None
        if status == "completed":
            return
        if status in ("failed", "cancelled"):
            reason = answer.get("error-desc", status) if isinstance(answer, dict) else status
            raise Failed(f"cannot keep the memory of machine '{name}': {reason}", hint="df -h", machine=name)
        await asyncio.sleep(_POLL_SECONDS)


class SavedState(msgspec.Struct, frozen=True, kw_only=True):
    """A state that fits; `fd` is the file, open where the stream begins."""

    head: Head
    path: str
    fd: int


def check_state_fits(spec: MachineSpec) -> None:
    """Raises `Unsupported` for a machine whose state could not be taken in again."""
    passed_through = [each.name for each in spec.devices if isinstance(each.device, UsbDevice | HostDevice)]
    if passed_through:
        raise Unsupported(
            f"the memory of machine '{spec.machine.name}' cannot be kept: "
            f"'{passed_through[0]}' is a device of the host, whose state is not ours",
            hint=f"triarch snapshot create {spec.machine.name}",
            machine=spec.machine.name,
        )
    folders = [each.name for each in spec.devices if isinstance(each.device, FolderDevice)]
    if folders:
        raise Unsupported(
            f"the memory of machine '{spec.machine.name}' cannot be kept: "
            f"'{folders[0]}' is a folder of the host, which goes on changing meanwhile",
            hint=f"triarch snapshot create {spec.machine.name}",
            machine=spec.machine.name,
        )


@contextmanager
def open_state(path: str, spec: MachineSpec, architecture: str) -> Iterator[SavedState]:
    """The state in `path`. Raises `Damaged` for what is none, or one of another machine, template or guest pack."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        head = _read_head(fd, path)
        wanted = head_of(spec, new_record(spec, architecture, head.keys))
        for field in Head.__struct_fields__:
            if getattr(head, field) != getattr(wanted, field):
                raise Damaged(
                    f"the memory in {path} is not that of machine '{spec.machine.name}' as it is now: its "
                    f"{field.replace('_', ' ')} is {getattr(head, field)}, not {getattr(wanted, field)}",
                    path=path,
                )
        yield SavedState(head=head, path=path, fd=fd)
    finally:
        os.close(fd)


def _read_head(fd: int, path: str) -> Head:
    start = os.read(fd, len(_MAGIC) + _LENGTH_DIGITS + 1)
    digits = start[len(_MAGIC) : -1]
    if not start.startswith(_MAGIC) or not digits.isdigit() or int(digits) > _MAX_HEAD_BYTES:
        raise Damaged(f"{path} holds no state of a VM", path=path)
    try:
        return msgspec.json.decode(os.read(fd, int(digits)), type=Head)
    except msgspec.MsgspecError as error:
        raise Damaged(f"{path} holds no state of a VM: {error}", path=path) from error


async def take_in(run: Run, name: str, state: SavedState) -> None:
    """Let a QEMU that waits for a state (`-incoming defer`) read it, and the guest go on. Raises `Damaged`."""
    async with monitor(run.monitor, name) as client:
        await client.execute("migrate-set-capabilities", {"capabilities": [_CAPABILITY]})
        client.send_fd_scm(state.fd)
        await client.execute("getfd", {"fdname": _FD_NAME})
        await client.execute("migrate-incoming", {"uri": f"fd:{_FD_NAME}"})
    try:
        await _until_migrated(run, name)
    except (Failed, Unavailable) as error:
        raise Damaged(f"QEMU does not take the memory in {state.path}: {error.message}", path=state.path) from error
    async with monitor(run.monitor, name) as client:
        await client.execute("cont")
