"""For all tests: whatever instance a test made, nothing of it is left when the session ends."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from triarch.model.instance import instance_at
from triarch.testing.leaks import leaks


def pytest_configure() -> None:
    """A run that is told to end (a time limit) tidies up as after Ctrl-C: its machines would outlive it.

    Nor does one in the background hand on that it ignores Ctrl-C, which tests send to what they start.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Instances of tests have their state below the session's temporary directory, at most two levels deep."""
    yield
    base = tmp_path_factory.getbasetemp()
    left = []
    for root in [path for depth in ("*", "*/*") for path in base.glob(depth) if path.is_dir()]:
        instance = instance_at(root)
        left += leaks(instance)
        if Path(instance.run_dir).exists():
            left.append(f"run directory: {instance.run_dir} of {root}")
    assert not left, "left behind by these tests:\n" + "\n".join(left)
