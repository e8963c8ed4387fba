"""What every part of `check_driver` stands on."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from triarch.errors import Unavailable
from triarch.model.driver import ExecRequest
from triarch.testing.driver_rig import DriverHarness, DriverRig, shell


def request(script: str, *, terminal: bool = False) -> ExecRequest:
    return ExecRequest(command=shell(script), terminal=terminal)


class DriverFixtures:
    """The harness comes from the subclass; the rest follows from it."""

    pytestmark = pytest.mark.asyncio(loop_scope="class")

    @pytest.fixture(scope="class")
    @classmethod
    def harness(cls) -> DriverHarness:
        raise NotImplementedError("a subclass of CheckDriver supplies the fixture 'harness'")

    @pytest_asyncio.fixture(scope="class", loop_scope="class")
    @classmethod
    async def rig(cls, harness: DriverHarness) -> AsyncIterator[DriverRig]:
        rig = DriverRig(harness)
        try:
            await rig.driver.probe()
        except Unavailable as error:
            await rig.driver.close()
            pytest.skip(f"driver '{rig.driver.name}' cannot run here: {error}")
        yield rig
        await rig.end()
        assert not list(harness.leaks())

    @pytest_asyncio.fixture(autouse=True, loop_scope="class")
    async def _tidy(self, rig: DriverRig) -> AsyncIterator[None]:
        yield
        await rig.tidy()
