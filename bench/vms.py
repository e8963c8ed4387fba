"""Hosted VMs: boot, a whole run, a systemd that is up, and the memory of five."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

from bench.ground import TEMPLATE, Ground
from bench.guests import RawQemu, wait_ready
from bench.measure import Samples, alternate, pss_bytes, seconds
from bench.report import Row, compared
from triarch.errors import Error, Failed
from triarch.host.pidfd import find_by_argument

VMS = 5
VM_MEMORY_BYTES = 256 << 20
_UP = ("running", "degraded")
_PATIENCE_SECONDS = 180.0
_AGAIN_SECONDS = 0.2
# What several systemds that boot at once leave to do when they say that they are up.
_SETTLE_SECONDS = 5.0


def boot(ground: Ground) -> Iterator[Row]:
    """From the request to the guest's first command."""
    client = ground.client
    with ground.machine("bench-boot", architecture="hosted", network="none") as view:
        report = Path(ground.instance.machine_state_dir(view.uuid)) / "report"

        def ours() -> float:
            started = time.perf_counter()
            operation = client.start(view.name)
            wait_ready(report)
            took = time.perf_counter() - started
            client.finish(operation)
            client.finish(client.kill(view.name))
            return took

        with closing(RawQemu(ground)) as raw:
            pair = alternate(ground.few_rounds, raw.boot, ours)
    yield compared("hosted VM, from the request to userspace", "raw QEMU, same command line", pair, "s", 1.1)


def run(ground: Ground) -> Iterator[Row]:
    """A command in a throw-away VM, as a whole process."""

    def ours() -> float:
        return seconds(lambda: ground.command_line("run", "--as", "hosted", TEMPLATE, "--", "true"))

    with closing(RawQemu(ground)) as raw:
        pair = alternate(ground.few_rounds, raw.power_off, ours)
    what = f"`triarch run --as hosted {TEMPLATE} -- true`, whole process"
    yield compared(what, "bare kernel + one-file initramfs", pair, "s", 1.25)


def system(ground: Ground) -> Iterator[Row]:
    """A template's own systemd, until it says that it is up."""
    took = []
    with ground.machine("bench-system", (), architecture="hosted") as view:
        for _ in range(ground.few_rounds):
            took.append(seconds(lambda: _start_system(ground, view.name)))
            ground.client.finish(ground.client.stop(view.name))
    yield Row(what="hosted `system` machine until systemd is up", unit="s", ours=Samples(tuple(took)), at_most=11)


def memory(ground: Ground) -> Iterator[Row]:
    """Several `system` VMs of one template, idle."""
    with ExitStack() as stack:
        views = [
            stack.enter_context(
                ground.machine(
                    f"bench-vm-{number}", (), architecture="hosted", memory_bytes=VM_MEMORY_BYTES, start=True
                )
            )
            for number in range(VMS)
        ]
        for view in views:
            _wait_up(ground, view.name)
        time.sleep(_SETTLE_SECONDS)
        total_bytes = pss_bytes(process.pid for view in views for process in find_by_argument(view.uuid))
    yield Row(
        what=f"PSS of {VMS} hosted `system` VMs of {VM_MEMORY_BYTES >> 20} MiB, one template",
        unit="MiB",
        ours=Samples((total_bytes,)),
        at_most=800,
    )


def _start_system(ground: Ground, name: str) -> None:
    ground.client.finish(ground.client.start(name))
    _wait_up(ground, name)


def _wait_up(ground: Ground, name: str) -> None:
    """Until systemd has finished starting units, some of which may have failed."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    said = ""
    while time.monotonic() < deadline:
        try:
            said = ground.client.execute(name, "systemctl", "is-system-running", "--wait").stdout.decode().strip()
        except Error as error:
            said = error.message
        if said in _UP:
            return
        time.sleep(_AGAIN_SECONDS)
    raise Failed(f"systemd in machine '{name}' is not up after {_PATIENCE_SECONDS:g} s: {said}")


SECTION = (boot, run, system, memory)
