"""The directory pool meets the contract of pools."""

from __future__ import annotations

from pathlib import Path

import pytest

from triarch.storage.directory import DirectoryPool
from triarch.testing.check_pool import CheckPool


class TestDirectoryPool(CheckPool):
    @pytest.fixture
    def pool(self, tmp_path: Path) -> DirectoryPool:
        return DirectoryPool("test", tmp_path / "pool")
