"""Memory, processors and disks of real VMs, changed while they run."""

from __future__ import annotations

import pytest
from qemu_rig import HostedHarness, guest_pack

from triarch.testing.driver.resize import CheckResize

pytestmark = pytest.mark.slow


class TestHostedResize(CheckResize):
    @pytest.fixture(scope="class")
    @classmethod
    def harness(cls, tmp_path_factory: pytest.TempPathFactory) -> HostedHarness:
        return HostedHarness(tmp_path_factory.mktemp("hosted"), guest_pack())
