"""The published suite of stores on sqlite."""

from __future__ import annotations

from pathlib import Path

import pytest

from triarch.store.sqlite import SqliteStore
from triarch.testing.check_store import CheckStore, MakeStore


class TestSqliteStore(CheckStore):
    @pytest.fixture
    def make_store(self, tmp_path: Path) -> MakeStore:
        return lambda: SqliteStore(tmp_path / "state" / "triarch.db")
