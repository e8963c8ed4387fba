"""Devices of real containers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from container_rig import ContainerHarness

from triarch.testing.driver.devices import CheckDevices, CheckHardware


class TestContainerDevices(CheckHardware, CheckDevices):
    @pytest.fixture(scope="class")
    @classmethod
    def harness(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ContainerHarness]:
        harness = ContainerHarness(tmp_path_factory.mktemp("devices"))
        yield harness
        harness.close()
