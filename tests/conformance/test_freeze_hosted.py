"""VMs stand still for a clone, and go on from their memory."""

from __future__ import annotations

import pytest
from qemu_rig import HostedHarness, guest_pack

from triarch.testing.driver.checkpoint import CheckCheckpoint
from triarch.testing.driver.freeze import CheckFreeze

pytestmark = pytest.mark.slow


class TestHostedSnapshots(CheckCheckpoint, CheckFreeze):
    @pytest.fixture(scope="class")
    @classmethod
    def harness(cls, tmp_path_factory: pytest.TempPathFactory) -> HostedHarness:
        return HostedHarness(tmp_path_factory.mktemp("hosted"), guest_pack())
