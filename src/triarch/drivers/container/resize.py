"""Limits of a container, before its first process begins and while it runs."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from triarch.errors import Failed, InUse, Unsupported
from triarch.host.freeze import loop_devices_of
from triarch.host.grow import grow_mounted
from triarch.host.limits import Limits, set_limits
from triarch.model.driver import MachineSpec
from triarch.model.resources import Resources


def limit_at_start(spec: MachineSpec) -> None:
    """Set what is asked for on new groups, which have no limits. Raises as `host.limits.set_limits`."""
    resources = spec.machine.resources
    if limits_of(resources) != Limits():
        _set(spec, limits_of(resources, _device_of(spec) if has_rates(resources) else None))


async def resize(spec: MachineSpec) -> None:
    """Make the machine's limits, and no others, hold now. Raises as `host.limits.set_limits`, naming the machine."""
    await asyncio.to_thread(lambda: _set(spec, limits_of(spec.machine.resources, _device_of(spec))))


async def grow_disk(spec: MachineSpec) -> None:
    """Let the mounted delta fill its file. Raises `Unsupported` where that takes a restart."""
    await asyncio.to_thread(_grow, spec)


def _grow(spec: MachineSpec) -> None:
    devices = loop_devices_of((Path(spec.delta_path),))
    if not devices:
        raise Failed(f"no loop device shows the delta of machine '{spec.machine.name}'")
    try:
        grow_mounted(devices[0])
    except Unsupported as error:
        raise Unsupported(
            f"cannot grow the disk of machine '{spec.machine.name}' while it runs: {error.message}",
            hint=f"triarch restart {spec.machine.name}",
            machine=spec.machine.name,
        ) from error


def _set(spec: MachineSpec, limits: Limits) -> None:
    try:
        set_limits(spec.cgroup, limits)
    except (InUse, Unsupported, Failed) as error:
        raise type(error)(f"machine '{spec.machine.name}': {error.message}", machine=spec.machine.name) from error


def has_rates(resources: Resources) -> bool:
    return resources.io_read_bytes_per_second is not None or resources.io_write_bytes_per_second is not None


def limits_of(resources: Resources, device: str | None = None) -> Limits:
    """The machine's limits for its control group; network rates are the network's business."""
    return Limits(
        memory_bytes=resources.memory_bytes,
        swap_bytes=resources.swap_bytes,
        cpus=resources.cpus,
        cpu_weight=resources.cpu_weight,
        cpu_set=resources.cpu_set,
        pids=resources.pids,
        io_weight=resources.io_weight,
        io_read_bytes_per_second=resources.io_read_bytes_per_second,
        io_write_bytes_per_second=resources.io_write_bytes_per_second,
        device=device,
    )


def _device_of(spec: MachineSpec) -> str | None:
    """The block device that holds the delta, as `MAJOR:MINOR`."""
    for device in loop_devices_of((Path(spec.delta_path),)):
        number = os.stat(device).st_rdev  # noqa: PTH116
        return f"{os.major(number)}:{os.minor(number)}"
    return None
