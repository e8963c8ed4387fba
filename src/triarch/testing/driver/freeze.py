"""Holding a machine's filesystems still: nothing is written meanwhile, what was written is there, and it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from triarch.drivers.base import Freezable
from triarch.errors import TimedOut
from triarch.host.ext4_files import read_file
from triarch.host.files import copy_sparse
from triarch.model.driver import MachineSpec
from triarch.model.snapshot import Consistency
from triarch.model.state import Status
from triarch.testing.driver.fixtures import DriverFixtures, request
from triarch.testing.driver_rig import DriverRig, FarEnd

STILL_SECONDS = 0.4


class CheckFreeze(DriverFixtures):
    """A writer in the machine waits for as long as it is frozen, and a clone made then is whole."""

    @pytest_asyncio.fixture(loop_scope="class")
    async def frozen(self, rig: DriverRig) -> AsyncIterator[tuple[Freezable, MachineSpec]]:
        if not isinstance(rig.driver, Freezable):
            pytest.skip(f"driver '{rig.driver.name}' lacks the capability 'freeze'")
        spec = await rig.ready()
        await _run(rig, spec, "echo before > /note")
        assert await rig.driver.freeze(spec) is Consistency.FROZEN
        yield rig.driver, spec
        try:
            await rig.driver.thaw(spec)
        except TimedOut:
            assert await rig.driver.thaw(spec) is None

    async def test_a_writer_waits_until_the_thaw(
        self, rig: DriverRig, frozen: tuple[Freezable, MachineSpec], tmp_path: Path
    ) -> None:
        driver, spec = frozen
        writing = asyncio.create_task(_run(rig, spec, "echo after > /note"))
        await asyncio.sleep(STILL_SECONDS)
        assert not writing.done()
        if rig.harness.real:
            clone = tmp_path / "clone.raw"
            with Path(spec.delta_path).open("rb") as source, clone.open("xb") as target:
                copy_sparse(source.fileno(), target.fileno())
            assert read_file(clone, "upper/note") == b"before\n"
        seconds = await driver.thaw(spec)
        assert seconds is not None and seconds >= STILL_SECONDS * 0.5
        await asyncio.wait_for(writing, rig.seconds(10))
        assert await rig.status(spec) is Status.RUNNING

    async def test_freezing_again_makes_it_last_and_thawing_again_is_success(
        self, rig: DriverRig, frozen: tuple[Freezable, MachineSpec]
    ) -> None:
        driver, spec = frozen
        assert await driver.freeze(spec) is Consistency.FROZEN
        assert await driver.thaw(spec) is not None
        assert await driver.thaw(spec) is None
        await _run(rig, spec, "echo on > /note")

    async def test_a_freeze_ends_with_the_daemon(self, rig: DriverRig, frozen: tuple[Freezable, MachineSpec]) -> None:
        _, spec = frozen
        driver = await rig.die()
        assert isinstance(driver, Freezable)
        await driver.thaw(spec)
        await _run(rig, spec, "echo on > /note")
        assert await rig.status(spec) is Status.RUNNING


async def _run(rig: DriverRig, spec: MachineSpec, script: str) -> None:
    done = await rig.can_exec.exec(spec, request(script), FarEnd())
    assert done.code == 0, done
