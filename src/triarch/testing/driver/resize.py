"""Limits and disks that change while a machine runs (`Resizable`), as the machine itself sees them."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import msgspec
import pytest

from triarch.drivers.base import Resizable
from triarch.errors import InUse, Unsupported, WrongState
from triarch.host.ext4 import check_filesystem
from triarch.model.driver import ExecRequest, MachineSpec
from triarch.model.resources import Resources
from triarch.model.state import Status
from triarch.testing.driver.fixtures import DriverFixtures, request
from triarch.testing.driver_rig import IDLE, DriverRig, FarEnd, shell

MIB = 1 << 20
# Version 2, version 1, or a kernel of its own: whichever the machine has, in bytes.
MEMORY = """
cat /sys/fs/cgroup/memory.max 2>/dev/null || cat /sys/fs/cgroup/memory/memory.limit_in_bytes 2>/dev/null ||
while read -r name size unit; do [ "$name" = MemTotal: ] && echo $((size * 1024)); done </proc/meminfo
"""
# As a quota in hundredths of a processor, or as processors of a kernel of its own.
PROCESSORS = """
if [ -e /sys/fs/cgroup/cpu.max ]; then read -r quota period </sys/fs/cgroup/cpu.max; echo $((quota * 100 / period))
elif [ -e /sys/fs/cgroup/cpu/cpu.cfs_quota_us ]; then echo $(($(cat /sys/fs/cgroup/cpu/cpu.cfs_quota_us) / 1000))
else echo $(($(grep -c '^processor' /proc/cpuinfo) * 100)); fi
"""
SIZE = "stat -f -c '%b %S' /"
# Writes without end, and tells of the first write that fails.
WRITING = shell("""
trap 'exit 7' TERM
echo ready
while :; do dd if=/dev/zero of=/growing bs=65536 count=64 2>/dev/null && sync || echo failed; done
""")


class CheckResize(DriverFixtures):
    @pytest.fixture
    def driver(self, rig: DriverRig) -> Resizable:
        if not isinstance(rig.driver, Resizable):
            pytest.skip(f"driver '{rig.driver.name}' lacks the capability 'resize'")
        if not rig.harness.real:
            pytest.skip("what a fake's machines see of their limits says nothing")
        return rig.driver

    async def test_memory_goes_down_and_up(self, rig: DriverRig, driver: Resizable) -> None:
        """Below and above what it was started with. A kernel of its own keeps some for itself."""
        spec = with_limits(await rig.ready(), memory_bytes=160 * MIB)
        await driver.resize(spec)
        seen = await number(rig, spec, MEMORY)
        assert 80 * MIB < seen <= 160 * MIB
        for memory_bytes in (144 * MIB, 320 * MIB, 200 * MIB):
            spec = with_limits(spec, memory_bytes=memory_bytes)
            before, seen = seen, await self._resized(rig, driver, spec)
            assert seen <= memory_bytes
            assert (seen > before) is (memory_bytes == 320 * MIB)

    async def _resized(self, rig: DriverRig, driver: Resizable, spec: MachineSpec) -> int:
        await driver.resize(spec)
        return await number(rig, spec, MEMORY)

    async def test_processors_go_up_and_down(self, rig: DriverRig, driver: Resizable) -> None:
        if (os.cpu_count() or 1) < 2:
            pytest.skip("this host has one processor only")
        spec = await rig.ready()
        for cpus in (1.0, 2.0, 1.0, 2.0):
            spec = with_limits(spec, cpus=cpus)
            await driver.resize(spec)
            assert await number(rig, spec, PROCESSORS) == round(cpus * 100)

    async def test_a_limit_that_is_set_once_more_changes_nothing(self, rig: DriverRig, driver: Resizable) -> None:
        spec = with_limits(await rig.ready(), cpus=1.0, cpu_weight=50, pids=500)
        for _ in range(2):
            await driver.resize(spec)
        assert await rig.status(spec) is Status.RUNNING

    async def test_a_new_driver_knows_what_there_is(self, rig: DriverRig, driver: Resizable) -> None:
        spec = with_limits(await rig.ready(), memory_bytes=256 * MIB)
        await driver.resize(spec)
        await rig.restart()
        assert isinstance(rig.driver, Resizable)
        smaller = with_limits(spec, memory_bytes=160 * MIB)
        before = await number(rig, spec, MEMORY)
        await rig.driver.resize(smaller)
        assert await number(rig, smaller, MEMORY) < before

    async def test_rates_of_the_disk_hold(self, rig: DriverRig, driver: Resizable) -> None:
        spec = await rig.ready()
        await driver.resize(with_limits(spec, io_write_bytes_per_second=MIB))
        loop = asyncio.get_running_loop()
        began = loop.time()
        exit_code, _ = await run(rig, spec, "dd if=/dev/zero of=/slow bs=4096 count=768 oflag=direct 2>/dev/null")
        if exit_code != 0:
            pytest.skip("this tree's dd knows no direct I/O")
        assert loop.time() - began > 1.5, "3 MiB at 1 MiB a second"
        await driver.resize(with_limits(spec))
        began = loop.time()
        await run(rig, spec, "dd if=/dev/zero of=/fast bs=65536 count=48 oflag=direct 2>/dev/null")
        assert loop.time() - began < 1.5 * rig.harness.patience

    async def test_a_disk_grows_while_it_is_written_to(self, rig: DriverRig, driver: Resizable) -> None:
        spec = await rig.ready(WRITING)
        before = await blocks(rig, spec)
        grown = Path(spec.delta_path).stat().st_size * 3
        os.truncate(spec.delta_path, grown)
        try:
            await driver.grow_disk(spec)
        except Unsupported as refusal:
            assert "CAP_SYS_RESOURCE" in refusal.message
            assert await blocks(rig, spec) == before
            pytest.skip(f"this host does not let it grow live: {refusal.message}")
        after = await blocks(rig, spec)
        assert grown * 0.85 < after <= grown
        await driver.grow_disk(spec)
        assert await blocks(rig, spec) == after
        assert "failed" not in rig.log(spec)
        await rig.driver.kill(spec)
        await asyncio.to_thread(check_filesystem, Path(spec.delta_path))

    async def test_memory_that_is_in_use_is_not_taken(self, rig: DriverRig, driver: Resizable) -> None:
        """The limit stays, and nothing is ended for it."""
        if rig.driver.needs_guest_pack:
            pytest.skip("a guest is asked for a minute before the change is taken back")
        spec = with_limits(await rig.ready(), memory_bytes=256 * MIB, swap_bytes=0)
        await driver.resize(spec)
        _, said = await run(rig, spec, "head -c 60000000 /dev/zero >/dev/shm/held; stat -c %s /dev/shm/held")
        assert said.strip() == "60000000"
        before = await number(rig, spec, MEMORY)
        with pytest.raises(InUse):
            await driver.resize(with_limits(spec, memory_bytes=32 * MIB))
        assert await number(rig, spec, MEMORY) == before
        assert await rig.status(spec) is Status.RUNNING

    async def test_only_a_machine_that_runs_is_resized(self, rig: DriverRig, driver: Resizable) -> None:
        spec = await rig.machine(IDLE)
        with pytest.raises(WrongState):
            await driver.resize(spec)
        with pytest.raises(WrongState):
            await driver.grow_disk(spec)


def with_limits(spec: MachineSpec, **limits: object) -> MachineSpec:
    """The same machine with these limits and those that it had."""
    resources = msgspec.structs.replace(spec.machine.resources or Resources(), **limits)
    return msgspec.structs.replace(spec, machine=msgspec.structs.replace(spec.machine, resources=resources))


async def run(rig: DriverRig, spec: MachineSpec, script: str) -> tuple[int | None, str]:
    far_end = FarEnd()
    what: ExecRequest = request(script)
    async with asyncio.timeout(rig.seconds(30)):
        exit_ = await rig.can_exec.exec(spec, what, far_end)
    return exit_.code, far_end.stdout.decode()


async def number(rig: DriverRig, spec: MachineSpec, script: str) -> int:
    _, said = await run(rig, spec, script)
    return int(said)


async def blocks(rig: DriverRig, spec: MachineSpec) -> int:
    """The size of the machine's filesystem, in bytes."""
    _, said = await run(rig, spec, SIZE)
    count, size = said.split()
    return int(count) * int(size)
