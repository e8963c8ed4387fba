"""Limits and size of a VM while it runs: what QEMU, its control group and the guest each do their part of."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
from qemu.qmp import ExecuteError, QMPClient

from triarch.drivers.qemu.cmdline import MEMORY_SLOTS, memory_bytes, processors
from triarch.drivers.qemu.control import open_control
from triarch.drivers.qemu.devices import has_shared_memory
from triarch.drivers.qemu.launch import limits_of
from triarch.drivers.qemu.monitor import monitor
from triarch.drivers.qemu.run import Run
from triarch.errors import Failed, InUse, TimedOut, Unavailable, Unsupported, WrongState
from triarch.guest.protocol import Adapt, Adapted
from triarch.host.limits import Limits, group_exists, set_limits
from triarch.host.pidfd import ProcessId
from triarch.host.spawn import allow_longer_files
from triarch.model.driver import MachineSpec
from triarch.model.resources import Resources, format_size

# What Linux takes and gives at a time (memory_block_size_bytes of x86).
_BLOCK_BYTES = 128 << 20
# A guest in translated code takes its time.
_GUEST_SECONDS = 60.0
_POLL_SECONDS = 0.1
_DISK_NODE = "delta"


class _Present(msgspec.Struct, frozen=True, kw_only=True):
    """What the guest has now. `balloon_bytes` is None without a balloon: nobody can take memory from such a guest."""

    processors: int
    most_processors: int
    memory_bytes: int
    slots_used: int
    balloon_bytes: int | None


async def resize(spec: MachineSpec, run: Run, *, attached: bool) -> None:
    """Make the limits hold now: processors and memory grow first for QEMU, then for the guest, and shrink in reverse.

    Raises `Unsupported` for what takes a restart, changing nothing; `InUse` when the guest does not give back in time;
    what was changed before is then changed back.
    """
    limits = limits_of(spec.machine)
    async with monitor(run.monitor, spec.machine.name, _GUEST_SECONDS * 2) as client:
        present = await _look(client)
        memory, count = memory_bytes(spec.machine.resources), processors(spec.machine.resources)
        _check(spec, present, memory, count, attached=attached)
        runs = (await _answer(client, "query-status"))["status"] == "running"
        if not runs and (memory != present.balloon_bytes or count != present.processors):
            raise _paused(spec)
        have = present.memory_bytes if present.balloon_bytes is None else present.balloon_bytes
        if memory >= have:
            _limit(spec, limits)
        else:
            # QEMU gives back only once the guest has.
            _limit(spec, msgspec.structs.replace(limits, memory_bytes=limits_of(spec.machine, have).memory_bytes))
        if runs and not attached:
            await _set_processors(client, spec, run, present, count)
        await _set_memory(client, spec, run, present, memory)
        if memory < have:
            _limit(spec, limits)
        await throttle(client, spec.machine.resources)


async def grow_disk(spec: MachineSpec, run: Run, process: ProcessId, user_id: int | None) -> None:
    """Tell QEMU and the guest of the file's new length; the guest grows its filesystem while it uses it.

    `user_id` is whom QEMU runs as, None for the caller. Raises `Failed`, `TimedOut`.
    """
    size_bytes = Path(spec.delta_path).stat().st_size
    allow_longer_files(process, user_id, size_bytes)
    async with monitor(run.monitor, spec.machine.name) as client:
        if (await _answer(client, "query-status"))["status"] != "running":
            raise _paused(spec)
        await client.execute("block_resize", {"node-name": _DISK_NODE, "size": size_bytes})
    await _adapt(spec, run, lambda has: has.delta_bytes >= size_bytes and not has.error, "grow its filesystem")


async def throttle_from_start(spec: MachineSpec, run: Run) -> None:
    """Bound the rates of a machine that has just begun."""
    resources = spec.machine.resources
    if resources.io_read_bytes_per_second or resources.io_write_bytes_per_second:
        async with monitor(run.monitor, spec.machine.name) as client:
            await throttle(client, resources)


async def throttle(client: QMPClient, resources: Resources) -> None:
    """Bound what the guest reads and writes on its delta a second (`block_set_io_throttle`; 0 is no bound)."""
    rates = {
        "bps_rd": resources.io_read_bytes_per_second or 0,
        "bps_wr": resources.io_write_bytes_per_second or 0,
    }
    await client.execute(
        "block_set_io_throttle",
        {"id": await _disk_path(client), **rates, "bps": 0, "iops": 0, "iops_rd": 0, "iops_wr": 0},
    )


async def _disk_path(client: QMPClient) -> str:
    """Where QEMU's own tree has the device that the delta is plugged into, whichever kind it is."""
    for block in await _answer(client, "query-block"):
        inserted = block.get("inserted") or {}
        if inserted.get("node-name") == _DISK_NODE and block.get("qdev"):
            return str(block["qdev"])
    raise Failed("QEMU knows of no device with the delta")


async def _answer(client: QMPClient, command: str) -> Any:
    return await client.execute(command)


async def _look(client: QMPClient) -> _Present:
    slots = await _answer(client, "query-hotpluggable-cpus")
    memory = await _answer(client, "query-memory-size-summary")
    dimms = [device["data"] for device in await _answer(client, "query-memory-devices") if device["type"] == "dimm"]
    try:
        balloon = (await _answer(client, "query-balloon"))["actual"]
    except ExecuteError:
        balloon = None
    return _Present(
        processors=sum(1 for slot in slots if "qom-path" in slot),
        most_processors=len(slots),
        # The summary's plugged memory has the template's layers in it.
        memory_bytes=memory["base-memory"] + sum(dimm["size"] for dimm in dimms),
        slots_used=len(dimms),
        balloon_bytes=balloon,
    )


def _check(spec: MachineSpec, present: _Present, memory: int, count: int, *, attached: bool) -> None:
    """Refuse what takes a restart."""
    have = present.memory_bytes if present.balloon_bytes is None else present.balloon_bytes
    if (attached or present.balloon_bytes is None) and (memory != have or count != present.processors):
        raise _takes_restart(spec, "its memory and processors cannot change while its command is attached to")
    if count > present.most_processors:
        raise _takes_restart(spec, f"it was started with room for {present.most_processors} processors, not {count}")
    if memory > present.memory_bytes and present.slots_used >= MEMORY_SLOTS:
        raise _takes_restart(spec, f"its {MEMORY_SLOTS} slots for memory are all used")


def _takes_restart(spec: MachineSpec, reason: str) -> Unsupported:
    name = spec.machine.name
    return Unsupported(f"machine '{name}' takes a restart: {reason}", hint=f"triarch restart {name}", machine=name)


def _paused(spec: MachineSpec) -> WrongState:
    name = spec.machine.name
    return WrongState(f"machine '{name}' is paused: its guest cannot take up a change", hint=f"triarch resume {name}")


def _limit(spec: MachineSpec, limits: Limits) -> None:
    """Where the host let us make no group, QEMU alone keeps the machine in bounds."""
    if group_exists(spec.cgroup):
        set_limits(spec.cgroup, limits, leave_out_missing=True)
        return
    resources = spec.machine.resources
    if resources.cpus is not None and resources.cpus != int(resources.cpus):
        raise Unsupported(
            f"cannot give machine '{spec.machine.name}' {resources.cpus} processors: it has no control group; "
            "without one a VM needs a whole number"
        )


async def _set_processors(client: QMPClient, spec: MachineSpec, run: Run, present: _Present, count: int) -> None:
    """Plugged in by QEMU, used by the guest. What it is not to use stays plugged in; a control group bounds it anyhow.

    Under TCG a processor that was taken out could not come back (`tcg_register_thread` of QEMU 7.2 aborts).
    """
    if count > present.processors:
        slots = await _answer(client, "query-hotpluggable-cpus")
        free = [slot for slot in reversed(slots) if "qom-path" not in slot]
        for number, slot in enumerate(free[: count - present.processors], present.processors):
            await client.execute("device_add", {"driver": slot["type"], "id": f"cpu{number}", **slot["props"]})
    await _adapt(spec, run, lambda has: has.processors == count, f"use {count} processors", count)


async def _set_memory(client: QMPClient, spec: MachineSpec, run: Run, present: _Present, memory: int) -> None:
    if present.balloon_bytes is None or memory == present.balloon_bytes:
        return
    if memory > present.memory_bytes:
        await _plug_memory(client, spec, run, present, memory - present.memory_bytes)
    before = present.balloon_bytes
    await client.execute("balloon", {"value": memory})

    async def there() -> bool:
        return bool((await _answer(client, "query-balloon"))["actual"] == memory)

    if not await _until(there):
        await client.execute("balloon", {"value": before})
        raise InUse(
            f"machine '{spec.machine.name}' does not give memory back: it uses more than {format_size(memory)}",
            machine=spec.machine.name,
        )


async def _plug_memory(client: QMPClient, spec: MachineSpec, run: Run, present: _Present, missing_bytes: int) -> None:
    """One more module of whole blocks; the balloon takes what is too much, but not before the guest uses the module."""
    size_bytes = -(-missing_bytes // _BLOCK_BYTES) * _BLOCK_BYTES
    backend, module = f"memory{present.slots_used}", f"dimm{present.slots_used}"
    before = (await _adapt(spec, run, lambda _: True, "answer")).memory_bytes
    # Of a guest whose memory virtiofsd shares, it has to have all.
    shared = await has_shared_memory(client)
    kind = {"qom-type": "memory-backend-memfd", "share": True} if shared else {"qom-type": "memory-backend-ram"}
    await client.execute("object-add", {**kind, "id": backend, "size": size_bytes})
    try:
        place = {"addr": await _free_address(client)}
        await client.execute("device_add", {"driver": "pc-dimm", "id": module, "memdev": backend, **place})
    except BaseException:
        await client.execute("object-del", {"id": backend})
        raise
    # The kernel keeps some of it for tables.
    least = before + size_bytes // 2
    await _adapt(spec, run, lambda has: has.memory_bytes > least, "use its new memory")


async def _free_address(client: QMPClient) -> int:
    """Behind all memory devices, at the start of a block: a layer ends anywhere, and Linux takes nothing else."""
    devices = [device["data"] for device in await _answer(client, "query-memory-devices")]
    end = max(device.get("memaddr", device.get("addr")) + device["size"] for device in devices)
    return int(-(-end // _BLOCK_BYTES) * _BLOCK_BYTES)


async def _until(condition: Callable[[], Awaitable[bool]]) -> bool:
    """Whether it came true in the time that a guest has."""
    deadline = asyncio.get_running_loop().time() + _GUEST_SECONDS
    while not await condition():
        if asyncio.get_running_loop().time() > deadline:
            return False
        await asyncio.sleep(_POLL_SECONDS)
    return True


async def _adapt(spec: MachineSpec, run: Run, done: Callable[[Adapted], bool], what: str, count: int = 0) -> Adapted:
    """Have the guest take up what was plugged in, until it says so: its kernel hears of it a little later."""
    name = spec.machine.name
    has: Adapted | None = None
    try:
        async with asyncio.timeout(_GUEST_SECONDS), open_control(run.control) as control:
            while has is None or not done(has):
                await control.send(Adapt(count))
                has = await control.wait_for(Adapted)
                await asyncio.sleep(0 if done(has) else _POLL_SECONDS)
            return has
    except TimeoutError as error:
        detail = f" (error {has.error})" if has is not None and has.error else ""
        raise TimedOut(f"machine '{name}' did not {what} within {_GUEST_SECONDS:.0f} s{detail}") from error
    except Unavailable as error:
        raise WrongState(f"machine '{name}' ended meanwhile", machine=name) from error
