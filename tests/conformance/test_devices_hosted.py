"""Devices of real VMs."""

from __future__ import annotations

import pytest
from qemu_rig import HostedHarness, guest_pack

from triarch.testing.driver.devices import CheckDevices, CheckHardware

pytestmark = pytest.mark.slow


class TestHostedDevices(CheckHardware, CheckDevices):
    @pytest.fixture(scope="class")
    @classmethod
    def harness(cls, tmp_path_factory: pytest.TempPathFactory) -> HostedHarness:
        return HostedHarness(tmp_path_factory.mktemp("devices"), guest_pack())
