"""The published suite of stores on the one in memory."""

from __future__ import annotations

from typing import ClassVar

import pytest

from triarch.store.memory import MemoryStore
from triarch.testing.check_store import CheckStore, MakeStore


class TestMemoryStore(CheckStore):
    durable: ClassVar[bool] = False

    @pytest.fixture
    def make_store(self) -> MakeStore:
        return MemoryStore
