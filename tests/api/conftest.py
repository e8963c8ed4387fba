"""One real daemon for the tests of this folder, and clients of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from triarch.client import Client
from triarch.testing.daemon_rig import DaemonRig


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonRig]:
    with DaemonRig(Path(tmp_path_factory.mktemp("instance"))) as rig:
        yield rig


@pytest.fixture
def client(rig: DaemonRig) -> Iterator[Client]:
    with rig.client() as client:
        yield client
