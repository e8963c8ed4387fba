"""The peers of `hosted`: QEMU alone, with the driver's own command line."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from bench.ground import IDLE, Ground
from bench.specs import machine_spec
from triarch.drivers.qemu.cmdline import Accelerator, Headroom, Wiring, guest_config, headroom, qemu_argv
from triarch.errors import TimedOut
from triarch.guest import cpio
from triarch.guest.keys import generate_keys
from triarch.guest.pack import ensure_pack
from triarch.guest.protocol import GuestConfig, GuestDecoder, Ready, encode_config
from triarch.host.facts import memory_bytes
from triarch.host.process import find_program, run
from triarch.model.driver import MachineSpec

_POLL_SECONDS = 0.002
_BOOT_SECONDS = 120.0
_SOCKETS = ("monitor", "console", "agent", "control")
_SOURCE = Path(__file__).parent / "poweroff.c"


def _room(spec: MachineSpec) -> Headroom:
    """As the driver leaves it."""
    return headroom(spec.machine.resources, os.cpu_count() or 1, memory_bytes())


class RawQemu:
    """QEMU started by hand: as root, without control group, monitor client or record."""

    def __init__(self, ground: Ground) -> None:
        pack = asyncio.run(ensure_pack(lambda _: None))
        self._spec = machine_spec(ground, "raw", IDLE, pack)
        self._directory = Path(self._spec.run_dir)
        self._directory.mkdir(exist_ok=True)
        keys = generate_keys()
        self._config: GuestConfig = guest_config(self._spec, keys.host_key, keys.client_public_key)
        self._blanks = Path(ground.instance.state_dir) / "pool" / "blank"

    def boot(self) -> float:
        """Seconds from QEMU's start until the guest's init runs the command. It is then killed."""
        run(["cp", "--sparse=always", str(next(self._blanks.glob("*.raw"))), self._spec.delta_path])
        report = self._directory / "report"
        with ExitStack() as stack:
            wiring = self._wire(stack, report)
            argv = qemu_argv(self._spec, self._config, wiring, Accelerator.TCG, _room(self._spec))
            started = time.perf_counter()
            with _qemu(argv, _descriptors(wiring)):
                wait_ready(report)
                return time.perf_counter() - started

    def power_off(self) -> float:
        """Seconds of the same QEMU, without devices, whose only file in its initramfs powers it off."""
        init = self._directory / "poweroff"
        if not init.exists():
            run(["cc", "-static", "-Os", "-s", "-o", str(init), str(_SOURCE)])
        initrd = self._directory / "initrd"
        initrd.write_bytes(cpio.write_archive([cpio.folder("dev"), cpio.file("init", init.read_bytes(), 0o755)]))
        pack = self._spec.guest_pack
        assert pack is not None
        argv = [
            *_machine_part(qemu_argv(self._spec, self._config, _no_wiring(), Accelerator.TCG, _room(self._spec))),
            "-serial",
            "null",
        ]
        argv[argv.index("-kernel") + 1] = pack.kernel_path
        argv[argv.index("-initrd") + 1] = str(initrd)
        started = time.perf_counter()
        with _qemu(tuple(argv), ()) as process:
            process.wait(_BOOT_SECONDS)
            return time.perf_counter() - started

    def close(self) -> None:
        shutil.rmtree(self._directory)

    def _wire(self, stack: ExitStack, report: Path) -> Wiring:
        """Open what the driver would open."""

        def opened(path: str | Path, flags: int) -> int:
            fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, fd)
            return fd

        def listening(name: str) -> int:
            path = self._directory / name
            path.unlink(missing_ok=True)
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(path))
            listener.listen()
            return listener.fileno()

        pack = self._spec.guest_pack
        assert pack is not None
        config = os.memfd_create("config")
        stack.callback(os.close, config)
        os.write(config, encode_config(self._config))
        return Wiring(
            kernel=opened(pack.kernel_path, os.O_RDONLY),
            initrd=opened(pack.initrd_path, os.O_RDONLY),
            config=config,
            delta=opened(self._spec.delta_path, os.O_RDWR),
            log=opened(self._spec.log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND),
            report=opened(report, os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
            layers=tuple(opened(layer.path, os.O_RDONLY) for layer in self._spec.layers),
            **{name: listening(name) for name in _SOCKETS},
        )


def wait_ready(report: Path) -> None:
    """Return once the guest has reported that its command runs. Raises `TimedOut`."""
    deadline = time.monotonic() + _BOOT_SECONDS
    while not _is_ready(report):
        if time.monotonic() > deadline:
            raise TimedOut(f"no guest reported to {report} within {_BOOT_SECONDS:g} s")
        time.sleep(_POLL_SECONDS)


def _is_ready(report: Path) -> bool:
    try:
        return any(isinstance(message, Ready) for message in GuestDecoder().feed(report.read_bytes()))
    except FileNotFoundError:
        return False


@contextmanager
def _qemu(argv: tuple[str, ...], fds: tuple[int, ...]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [find_program(argv[0]), *argv[1:]],
        pass_fds=fds,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _descriptors(wiring: Wiring) -> tuple[int, ...]:
    return (
        *(wiring.kernel, wiring.initrd, wiring.config, wiring.delta, wiring.log, wiring.report),
        *(wiring.monitor, wiring.console, wiring.agent, wiring.control, *wiring.layers),
    )


def _machine_part(argv: tuple[str, ...]) -> tuple[str, ...]:
    """Processor, memory, kernel: what comes before the devices."""
    return argv[: argv.index("-fw_cfg")]


def _no_wiring() -> Wiring:
    """For a command line of which only the machine's part is used."""
    return Wiring(
        kernel=0, initrd=0, config=0, delta=0, log=0, report=0, monitor=0, console=0, agent=0, control=0, layers=(0,)
    )
