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


def test_many_deltas_of_a_new_size_at_once(tmp_path: Path) -> None:
    """They share one ready-made delta, which the first of them makes."""
    from concurrent.futures import ThreadPoolExecutor
    from uuid import uuid4

    pool = DirectoryPool("default", tmp_path / "pool")
    pool.prepare()
    uuids = [str(uuid4()) for _ in range(16)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda uuid: pool.create_delta(uuid, 128 << 20), uuids))
    assert sorted(pool.deltas()) == sorted(uuids)
