"""Limits of real containers, changed while they run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from container_rig import ContainerHarness

from triarch.testing.driver.resize import CheckResize


class TestContainerResize(CheckResize):
    @pytest.fixture(scope="class")
    @classmethod
    def harness(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ContainerHarness]:
        harness = ContainerHarness(tmp_path_factory.mktemp("container"))
        yield harness
        harness.close()
