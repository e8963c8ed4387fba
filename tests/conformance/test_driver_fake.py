"""The published suite of drivers on the fake, and what only the fake can do."""

from __future__ import annotations

import itertools
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import pytest

from triarch.drivers import driver_factory
from triarch.drivers.base import Driver
from triarch.drivers.fake.host import FakeHost
from triarch.errors import Invalid, MachineFailed, TimedOut
from triarch.model.driver import LayerFile, MachineSpec
from triarch.model.instance import instance_at
from triarch.model.state import Status
from triarch.model.template import Init
from triarch.testing.check_driver import CheckDriver
from triarch.testing.driver_rig import IDLE, DriverHarness, DriverRig, machine_spec, shell


class FakeHarness(DriverHarness):
    real = False

    def __init__(self, root: Path) -> None:
        self.root = root
        self.instance = msgspec.structs.replace(instance_at(root / "state"), run_dir=str(root / "run"))
        layer = root / "layer.erofs"
        layer.write_bytes(b"no tree in here")
        self.layers = (LayerFile(digest="0" * 64, path=str(layer), size_bytes=layer.stat().st_size),)
        self._indexes = itertools.count(1)

    def make_driver(self) -> Driver:
        return driver_factory("fake")(self.instance)

    async def app_machine(self, command: tuple[str, ...], environment: Mapping[str, str]) -> MachineSpec:
        return self.spec(Init.APP, command, environment)

    async def system_machine(self) -> MachineSpec:
        return self.spec(Init.SYSTEM)

    def spec(
        self, init: Init, command: tuple[str, ...] = (), environment: Mapping[str, str] | None = None
    ) -> MachineSpec:
        index = next(self._indexes)
        delta = self.root / f"delta-{index}.raw"
        delta.touch()
        return machine_spec(
            self.instance,
            index=index,
            layers=self.layers,
            delta_path=delta,
            architecture="fake",
            init=init,
            command=command,
            environment=environment,
        )

    def leaks(self) -> Sequence[str]:
        host = FakeHost(self.instance)
        return [*(machine.uuid for machine in host.machines()), *host.held_deltas()]


class TestFakeDriver(CheckDriver):
    @pytest.fixture(scope="class")
    @classmethod
    def harness(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DriverHarness]:
        """In memory where that can be had, as a run directory always is."""
        memory = Path("/dev/shm")
        root = Path(tempfile.mkdtemp(dir=memory)) if memory.is_dir() else tmp_path_factory.mktemp("fake")
        yield FakeHarness(root)
        shutil.rmtree(root)

    async def test_a_start_fails_on_demand(self, rig: DriverRig) -> None:
        spec = await rig.machine(IDLE, {"fake.fail-start": "the moon is full"})
        with pytest.raises(MachineFailed, match="the moon is full"):
            await rig.driver.start(spec)
        assert await rig.status(spec) is Status.STOPPED

    async def test_a_stop_is_ignored_on_demand(self, rig: DriverRig) -> None:
        spec = await rig.machine(IDLE, {"fake.ignore-stop": "1"})
        await rig.driver.start(spec)
        with pytest.raises(TimedOut):
            await rig.driver.stop(spec, 0.05)
        assert await rig.status(spec) is Status.RUNNING

    async def test_a_start_takes_time_on_demand(self, rig: DriverRig) -> None:
        spec = await rig.machine(IDLE, {"fake.start-seconds": "0.1"})
        began = time.monotonic()
        await rig.driver.start(spec)
        assert time.monotonic() - began >= 0.1

    async def test_an_illegal_option_is_refused(self, rig: DriverRig) -> None:
        spec = await rig.harness.app_machine(IDLE, {"fake.start-seconds": "soon"})
        with pytest.raises(Invalid, match="soon"):
            rig.driver.validate(rig.remember(spec).machine)

    async def test_a_crash_is_a_failure(self, rig: DriverRig, harness: FakeHarness) -> None:
        spec = await rig.ready()
        async with rig.watching() as watcher:
            await watcher.until(spec, Status.RUNNING, 5)
            FakeHost(harness.instance).crash(spec)
            assert (await watcher.until(spec, Status.STOPPED, 5)).failed
        assert (await rig.driver.observe(spec)).failed

    @pytest.mark.parametrize("script", ["echo 'never closed", "while :; do sleep 1", "exit soon", "sleep a-while"])
    async def test_what_its_shell_does_not_understand_ends_with_2(self, rig: DriverRig, script: str) -> None:
        spec = await rig.started(shell(script))
        assert (await rig.exit_of(spec)).code == 2

    async def test_a_thousand_are_cheap(self, rig: DriverRig) -> None:
        """In processor time of this process, which a busy host does not stretch much."""
        began = time.process_time()
        for _ in range(1000):
            await rig.started(shell("sleep 1000"))
        async with rig.watching() as watcher:
            while len({seen.uuid for seen in watcher.seen}) < 1000:
                await watcher.changed()
        assert time.process_time() - began < 10
