"""A machine's memory in a file: it goes on from there, and what is no state of it is refused."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from triarch.drivers.base import Checkpointing, CheckpointProbe, Freezable
from triarch.errors import Damaged, Unsupported
from triarch.model.driver import MachineSpec
from triarch.model.state import Status
from triarch.testing.driver.fixtures import DriverFixtures, request
from triarch.testing.driver_rig import IDLE, DriverRig, FarEnd

MARK = "/tmp/mark"


class CheckCheckpoint(DriverFixtures):
    """`/tmp` and processes are memory: they are there again after `load`, and not after `start`."""

    async def _checkpointing(self, rig: DriverRig, spec: MachineSpec) -> Checkpointing:
        driver = rig.driver
        if isinstance(driver, CheckpointProbe) and not isinstance(driver, Checkpointing):
            with pytest.raises(Unsupported) as caught:
                await driver.check_checkpoint(spec)
            pytest.skip(caught.value.message)
        if not isinstance(driver, Checkpointing):
            pytest.skip(f"driver '{driver.name}' lacks the capability 'checkpoint'")
        return driver

    async def test_a_machine_goes_on_from_its_memory(self, rig: DriverRig, tmp_path: Path) -> None:
        spec = await rig.ready()
        driver = await self._checkpointing(rig, spec)
        await driver.check_checkpoint(spec)
        running = await _sleeper(rig, spec) if rig.harness.real else None
        state = tmp_path / "memory"
        await driver.save(spec, str(state))
        assert isinstance(driver, Freezable)
        assert await driver.thaw(spec) is not None
        assert await rig.status(spec) is Status.RUNNING
        # The disks as the state knows them: nothing that counts was written since.
        await rig.driver.kill(spec)
        await rig.driver.delete(spec)
        Path(spec.run_dir).mkdir(mode=0o700, exist_ok=True)
        await driver.load(spec, str(state))
        assert await rig.status(spec) is Status.RUNNING
        if running is not None:
            assert await _say(rig, spec, f"readlink /proc/{running}/exe && cat /proc/{running}/comm") != ""

    async def test_what_is_no_state_is_refused_and_leaves_nothing(self, rig: DriverRig, tmp_path: Path) -> None:
        spec = await rig.machine(IDLE)
        driver = await self._checkpointing(rig, spec)
        nonsense = tmp_path / "memory"
        nonsense.write_bytes(b"nonsense" * 100)
        with pytest.raises(Damaged):
            await driver.load(spec, str(nonsense))
        assert await rig.status(spec) in (Status.ABSENT, Status.STOPPED)


async def _sleeper(rig: DriverRig, spec: MachineSpec) -> int:
    """The id of a process that outlives its command."""
    pid = await _say(rig, spec, "setsid sleep 1000 </dev/null >/dev/null 2>&1 & echo $!")
    await asyncio.sleep(0.1)
    return int(pid)


async def _say(rig: DriverRig, spec: MachineSpec, script: str) -> str:
    far_end = FarEnd()
    done = await rig.can_exec.exec(spec, request(script), far_end)
    assert done.code == 0, (done, far_end.stderr)
    return far_end.stdout.decode().strip()
