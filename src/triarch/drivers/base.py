"""The contract between the engine and the code of one architecture.

A driver has nine methods. Everything else is a capability protocol; the engine raises `Unsupported` where a driver
lacks one, and a driver never has a method that does nothing. `triarch.testing.check_driver` is this page as tests.

Rules for all of them:
- Drivers never touch locks of the engine, the store or HTTP, never import one another, and make no disks or networks:
  the engine hands over a `MachineSpec` in which everything is resolved.
- Methods on one machine are called one at a time; methods on different machines run at once.
- Every method may be cancelled; what it had begun is then undone by `kill` and `delete`.
- What keeps a machine running must not be the daemon: after SIGKILL of the daemon at any instruction the machine runs
  on, and a new driver object adopts it from `spec.run_dir` and the host alone.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import ClassVar, Protocol, runtime_checkable

from triarch.model.device import HardwareInfo
from triarch.model.driver import (
    DriverInfo,
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

DriverFactory = Callable[[Instance], "Driver"]


class Driver(Protocol):
    """One architecture, bound to one instance. Constructing it does nothing that can fail or block."""

    name: ClassVar[str]
    kind: ClassVar[Kind]
    needs_guest_pack: ClassVar[bool]

    async def probe(self) -> DriverInfo:
        """Try whether machines can run here, for real. Raises `DriverUnavailable(reason)` or `MissingProgram`."""
        ...

    def validate(self, machine: Machine) -> None:
        """Pure. Raises `Invalid` or `Unsupported` for what this architecture can never run."""
        ...

    async def create(self, spec: MachineSpec) -> None:
        """Register the machine with the hypervisor, where it keeps a register. Idempotent; makes no disks."""
        ...

    async def start(self, spec: MachineSpec) -> None:
        """Return when the hypervisor accepted the machine (its first process exists). Already running is success.

        Raises `MachineFailed` with the reason, `Busy` when something else holds the delta's lock. A start that raises
        has left nothing behind.
        """
        ...

    async def stop(self, spec: MachineSpec, timeout_seconds: float) -> None:
        """Ask the guest to end and wait until all is gone and the delta is put away. Never escalates.

        Raises `TimedOut`; the machine then still runs. Not running is success.
        """
        ...

    async def kill(self, spec: MachineSpec) -> None:
        """End it now, without its consent; return when nothing of it runs and the delta is free.

        Not running is success.
        """
        ...

    async def delete(self, spec: MachineSpec) -> None:
        """Forget a stopped machine: remove everything in `run_dir` and on the host. Absent is success. Keeps disks."""
        ...

    async def observe(self, spec: MachineSpec) -> Observation:
        """Ask the host, never a cache."""
        ...

    def events(self) -> AsyncIterator[Observation]:
        """First every machine that this driver owns on the host (how a new daemon adopts), then each change.

        Only ends of runs and adoption must be reported; a machine that ended is reported once, with its `exit`.
        One consumer at a time; ends when the consumer closes it.
        """
        ...

    async def close(self) -> None:
        """Let go of sockets, watches and helper processes. Machines keep running."""
        ...


class Stdio(Protocol):
    """The far end of a command's or console's input and output."""

    async def read(self) -> Input:
        """The next piece of input; after `EndOfInput` it is not called again."""
        ...

    async def write(self, stream: Stream, data: bytes) -> None:
        """Take output; returns when the far end has room (back pressure). Raises `ConnectionError` when it is gone."""
        ...


@runtime_checkable
class Exec(Protocol):
    """Run a command in a running machine."""

    async def exec(self, spec: MachineSpec, request: ExecRequest, stdio: Stdio) -> Exit:
        """Return the command's exit. A far end that goes away ends the command (SIGHUP, then SIGKILL)."""
        ...


@runtime_checkable
class Console(Protocol):
    """Type into the machine's own console; what it says is in `spec.log_path`, as it comes."""

    async def console(self, spec: MachineSpec, stdio: Stdio) -> None:
        """Pass on what `stdio` reads, until that ends or the machine does not take it any more. Any number may type.

        Nothing is written to `stdio`, and no reader of the console can hold the machine up.
        """
        ...


@runtime_checkable
class Attachable(Protocol):
    """Start an `app` machine with its command's input and output connected, as `run` does."""

    async def start_attached(self, spec: MachineSpec, stdio: Stdio, terminal: Resize | None) -> Exit:
        """As `start`, then return the command's exit when the machine has ended and is put away."""
        ...


@runtime_checkable
class Pausable(Protocol):
    """Freeze and thaw a running machine."""

    async def pause(self, spec: MachineSpec) -> None: ...

    async def resume(self, spec: MachineSpec) -> None: ...


@runtime_checkable
class Metered(Protocol):
    """Tell what a running machine uses now."""

    async def usage(self, spec: MachineSpec) -> Usage: ...


@runtime_checkable
class Files(Protocol):
    """Reach a running machine's files without a network and without trusting it.

    Those of a stopped one are the same under every architecture: the engine reaches them itself (`engine.trees`).
    """

    async def serve_files(self, spec: MachineSpec, stdio: Stdio) -> None:
        """Let the file server (`guest/files`) speak with the far end about the machine's own tree; return at its end.

        Whatever the guest planted, the server cannot see, read or write anything but the machine. It ends when the far
        end does, when this is cancelled, and when the machine is stopped or killed. A far end that has a `fileno` (a
        connected socket) may be given to the server itself. Raises `WrongState` when the machine does not run.
        """
        ...


@runtime_checkable
class Freezable(Protocol):
    """Hold a running machine's filesystems still for as long as a clone of its disks takes."""

    async def freeze(self, spec: MachineSpec) -> Consistency:
        """What was written is on the disks, and nothing is written until `thaw`; return what a copy made now is like.

        A freeze that nobody ends, because the daemon died, ends by itself after `FREEZE_SECONDS`; freezing again what
        is frozen makes it last that long from now. A guest that does not answer is stopped instead
        (`Consistency.CRASH`).
        """
        ...

    async def thaw(self, spec: MachineSpec) -> float | None:
        """Let it write again; return the seconds for which it could not. Not frozen is success (None).

        Raises `TimedOut` when the freeze had ended by itself: a copy that was made meanwhile is worth nothing.
        """
        ...


FREEZE_SECONDS = 10.0


@runtime_checkable
class CheckpointProbe(Protocol):
    """Tell whether a machine's memory can be kept. A driver that never can says why, and has no more than this."""

    async def check_checkpoint(self, spec: MachineSpec) -> None:
        """Try whether it works here, for this machine. Raises `Unsupported` with the reason."""
        ...


@runtime_checkable
class Checkpointing(CheckpointProbe, Protocol):
    """Put a running machine's memory into a file, and go on from there."""

    async def save(self, spec: MachineSpec, path: str) -> None:
        """Write the state to the new file `path` and hold the machine still, its disks as the state knows them.

        `thaw` lets it go on.
        """
        ...

    async def load(self, spec: MachineSpec, path: str) -> None:
        """As `start`, but from the state in `path`. Raises `Damaged` for what is no state of this machine."""
        ...


@runtime_checkable
class Resizable(Protocol):
    """Change limits while the machine runs."""

    async def resize(self, spec: MachineSpec) -> None:
        """Make `spec.machine.resources` hold now. Raises `Unsupported` for what takes a restart, changing nothing."""
        ...

    async def grow_disk(self, spec: MachineSpec) -> None:
        """The delta's file has grown: let the machine's filesystem have the room."""
        ...


@runtime_checkable
class Hotplug(Protocol):
    """Plug devices in and out while the machine runs. Those in the spec at `start` are there from the start."""

    async def attach(self, spec: MachineSpec, device: ResolvedDevice) -> None:
        """Idempotent. Raises `Unsupported` with the architectures or the restart that it takes."""
        ...

    async def detach(self, spec: MachineSpec, device: ResolvedDevice) -> None:
        """Absent is success. Raises `InUse` when the guest does not let go."""
        ...


@runtime_checkable
class Inspectable(Protocol):
    """Tell which virtual hardware a running machine sees."""

    async def hardware(self, spec: MachineSpec) -> HardwareInfo: ...


CAPABILITIES: dict[str, type] = {
    "exec": Exec,
    "console": Console,
    "attach": Attachable,
    "pause": Pausable,
    "usage": Metered,
    "files": Files,
    "freeze": Freezable,
    "checkpoint": Checkpointing,
    "resize": Resizable,
    "hotplug": Hotplug,
    "hardware": Inspectable,
}


def capabilities_of(driver: object) -> tuple[str, ...]:
    """The names of the capability protocols that `driver` has."""
    return tuple(name for name, protocol in CAPABILITIES.items() if isinstance(driver, protocol))
