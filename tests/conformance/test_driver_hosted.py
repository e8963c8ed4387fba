"""The QEMU driver keeps the contract of drivers: every test boots real machines."""

from __future__ import annotations

import pytest
from qemu_rig import HostedHarness, guest_pack

from triarch.testing.check_driver import CheckDriver

pytestmark = pytest.mark.slow


class TestHostedDriver(CheckDriver):
    @pytest.fixture(scope="class")
    @classmethod
    def harness(cls, tmp_path_factory: pytest.TempPathFactory) -> HostedHarness:
        pack = guest_pack()
        return HostedHarness(tmp_path_factory.mktemp("hosted"), pack)
