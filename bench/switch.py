"""Switching a running machine from one architecture to another and back."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from bench.ground import OBEDIENT, Ground, duration_seconds
from bench.measure import Samples
from bench.report import Row
from triarch.errors import Error, Failed
from triarch.model.machine import SwitchMachine
from triarch.model.operation import Operation

NAME = "bench-switch"
AT_MOST_MS = 100
_PATIENCE_SECONDS = 120.0


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One switch, and what its two halves take as operations of their own, all in the daemon's time."""

    switch_seconds: float
    stop_seconds: float
    start_seconds: float


def switch(ground: Ground) -> Iterator[Row]:
    """What it copies, and what it takes beyond the guest's own end and start."""
    there: list[Change] = []
    back: list[Change] = []
    copied: list[float] = []
    with ground.machine(NAME, OBEDIENT):
        _start(ground)
        for _ in range(ground.few_rounds):
            before = _pool_files(ground)
            there.append(_switch(ground, "hosted"))
            back.append(_switch(ground, "container"))
            copied.append(float(sum(size for inode, size in _pool_files(ground).items() if inode not in before)))
    yield Row(what="switch there and back: bytes in new files", unit="bytes", ours=Samples(tuple(copied)), at_most=0)
    yield from _rows("container → hosted", there)
    yield from _rows("hosted → container", back)


def _rows(which: str, changes: Sequence[Change]) -> Iterator[Row]:
    yield Row(
        what=f"switch {which} of a running machine",
        unit="ms",
        peer="its stop, then its start",
        theirs=Samples(tuple(change.stop_seconds + change.start_seconds for change in changes)),
        ours=Samples(tuple(change.switch_seconds for change in changes)),
    )
    yield Row(
        what=f"switch {which}, beyond that stop and start",
        unit="ms",
        ours=Samples(tuple(change.switch_seconds - change.stop_seconds - change.start_seconds for change in changes)),
        at_most=AT_MOST_MS,
    )


def _switch(ground: Ground, architecture: str) -> Change:
    """Stop and start where it is, switch, and stop and start there: of either the half that the switch consists of."""
    client = ground.client
    _wait_up(ground)
    stop = client.finish(client.stop(NAME))
    _start(ground)
    operation = client.switch(NAME, SwitchMachine(architecture=architecture))
    assert operation is not None
    switched = client.finish(operation)
    _wait_up(ground)
    client.finish(client.stop(NAME))
    start = _start(ground)
    return Change(
        switch_seconds=duration_seconds(switched),
        stop_seconds=duration_seconds(stop),
        start_seconds=duration_seconds(start),
    )


def _start(ground: Ground) -> Operation:
    """Start it; the operation that did. It is up when this returns: who is asked to stop while booting takes longer."""
    operation = ground.client.finish(ground.client.start(NAME))
    _wait_up(ground)
    return operation


def _wait_up(ground: Ground) -> None:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            if ground.client.execute(NAME, "true").exit.code == 0:
                return
        except Error:
            if time.monotonic() > deadline:
                raise
        if time.monotonic() > deadline:
            raise Failed(f"machine '{NAME}' takes no commands after {_PATIENCE_SECONDS:g} s")
        time.sleep(0.05)


def _pool_files(ground: Ground) -> dict[tuple[int, int], int]:
    """Sizes of the pool's files by device and inode."""
    files = (path.stat() for path in (Path(ground.instance.state_dir) / "pool").rglob("*") if path.is_file())
    return {(file.st_dev, file.st_ino): file.st_size for file in files}


SECTION = (switch,)
