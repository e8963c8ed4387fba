"""Containers stand still for a clone, and say why their memory cannot be kept."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from container_rig import ContainerHarness, skip_without_busybox

from triarch.testing.driver.checkpoint import CheckCheckpoint
from triarch.testing.driver.freeze import CheckFreeze


class TestContainerSnapshots(CheckCheckpoint, CheckFreeze):
    @pytest.fixture(scope="class")
    @classmethod
    def harness(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ContainerHarness]:
        skip_without_busybox()
        harness = ContainerHarness(tmp_path_factory.mktemp("snapshots"))
        yield harness
        harness.close()
