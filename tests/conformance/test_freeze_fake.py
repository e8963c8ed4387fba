"""Fake machines stand still and go on from their memory as real ones do."""

from __future__ import annotations

import pytest
from test_driver_fake import FakeHarness

from triarch.testing.driver.checkpoint import CheckCheckpoint
from triarch.testing.driver.freeze import CheckFreeze


class TestFakeSnapshots(CheckCheckpoint, CheckFreeze):
    @pytest.fixture(scope="class")
    @classmethod
    def harness(cls, tmp_path_factory: pytest.TempPathFactory) -> FakeHarness:
        return FakeHarness(tmp_path_factory.mktemp("fake"))
