"""Copying files into a container and out of it, beside what does the same from inside its namespaces."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from bench.ground import Ground
from bench.measure import Samples, seconds
from bench.report import Row
from triarch.host.cgroup import pids_in

NAME = "bench-files"
BIG_BYTES = 1 << 30
FOLDERS, FILES_EACH, MAX_SMALL_BYTES = 100, 100, 8000
# DESIGN wants at least 0.7 times the speed of cp(1), and half that of two tar(1).
PUSH_AT_MOST_TIMES = 1 / 0.7
TREE_AT_MOST_TIMES = 2.0


class Inside:
    """The machine's own programs with files of the host's as their input and output: no daemon, no protocol."""

    def __init__(self, ground: Ground) -> None:
        uuid = ground.client.machine(NAME).uuid
        pid = min(pids_in(ground.instance.cgroup(uuid)))
        self._enter = ("nsenter", f"--target={pid}", "-U", "-m", "-p", "-S", "0", "-G", "0")

    def run(self, *command: str, stdin: Path | None = None) -> None:
        with open(stdin or os.devnull, "rb") as source:  # noqa: PTH123
            subprocess.run((*self._enter, *command), stdin=source, check=True)

    def pipe_in(self, source: tuple[str, ...], command: tuple[str, ...]) -> None:
        _pipe(source, (*self._enter, *command))

    def pipe_out(self, command: tuple[str, ...], target: tuple[str, ...]) -> None:
        _pipe((*self._enter, *command), target)

    def settle(self, *paths: str) -> None:
        """What the last turn left is neither in the way nor in the queue of the disk."""
        self.run("rm", "-rf", *paths)
        os.sync()


def big(ground: Ground) -> Iterator[Row]:
    """One file of a gibibyte, which the page cache has."""
    source = ground.directory / "big"
    with source.open("wb") as file:
        for _ in range(BIG_BYTES >> 20):
            file.write(random.randbytes(1 << 20))
    theirs, ours = [], []
    try:
        with ground.machine(NAME, network="none", start=True):
            inside = Inside(ground)
            for _ in range(ground.few_rounds):
                inside.settle("/root/big")
                theirs.append(seconds(lambda: inside.run("cp", "/dev/stdin", "/root/big", stdin=source)))
                inside.settle("/root/big")
                ours.append(seconds(lambda: ground.command_line("file", "push", str(source), f"{NAME}/root/big")))
    finally:
        source.unlink()
    yield Row(
        what="file push of 1 GiB, the whole command",
        unit="ms",
        peer="cp inside",
        theirs=Samples(tuple(theirs)),
        ours=Samples(tuple(ours)),
        at_most_times=PUSH_AT_MOST_TIMES,
    )


def small(ground: Ground) -> Iterator[Row]:
    """Ten thousand small files, in and out."""
    tree = ground.directory / "many"
    for folder in range(FOLDERS):
        (tree / str(folder)).mkdir(parents=True)
        for number in range(FILES_EACH):
            (tree / str(folder) / str(number)).write_bytes(bytes(random.randrange(MAX_SMALL_BYTES)))
    here, there = str(tree.parent), f"{NAME}/root/many"
    pushes: tuple[list[float], list[float]] = ([], [])
    pulls: tuple[list[float], list[float]] = ([], [])
    pack, unpack = ("tar", "-c", "-f", "-", "many"), ("tar", "-x", "-C", "/root", "-f", "-")
    try:
        with ground.machine(NAME, network="none", start=True):
            inside = Inside(ground)
            for _ in range(ground.few_rounds):
                inside.settle("/root/many")
                pushes[0].append(seconds(lambda: inside.pipe_in(("tar", "-C", here, *pack[1:]), unpack)))
                inside.settle("/root/many")
                pushes[1].append(seconds(lambda: ground.command_line("file", "push", "-r", str(tree), there)))
                out = _empty(ground.directory / "out")
                target = ("tar", "-x", "-C", str(out), "-f", "-")
                pulls[0].append(seconds(partial(inside.pipe_out, ("tar", "-C", "/root", *pack[1:]), target)))
                out = _empty(out)
                pull = ("file", "pull", "-r", there, str(out / "many"))
                pulls[1].append(seconds(partial(ground.command_line, *pull)))
    finally:
        shutil.rmtree(ground.directory / "out", ignore_errors=True)
        shutil.rmtree(tree)
    for what, (theirs, ours) in (("push", pushes), ("pull", pulls)):
        yield Row(
            what=f"file {what} -r of 10,000 small files, the whole command",
            unit="ms",
            peer="tar \\| tar",
            theirs=Samples(tuple(theirs)),
            ours=Samples(tuple(ours)),
            at_most_times=TREE_AT_MOST_TIMES,
        )


def _empty(directory: Path) -> Path:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    os.sync()
    return directory


def _pipe(source: tuple[str, ...], target: tuple[str, ...]) -> None:
    with subprocess.Popen(source, stdout=subprocess.PIPE) as sending:
        subprocess.run(target, stdin=sending.stdout, check=True)
    if sending.returncode:
        raise subprocess.CalledProcessError(sending.returncode, source)


SECTION = (big, small)
