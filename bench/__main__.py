"""`python -m bench [--rounds N] [--root DIR] [SECTION …]`."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

from bench.ground import Ground
from bench.report import Row, document
from triarch.errors import Error
from triarch.host.syscalls import CLONE_NEWNS, MNT_DETACH, MS_REC, MS_SLAVE, mount, unmount, unshare

SECTIONS = ("containers", "cli", "many", "vms", "switch", "files", "terminals", "snapshots")
RESULTS = Path(__file__).parent / "RESULTS.md"
UNIFIED = Path("/sys/fs/cgroup/unified")

Measure = Callable[[Ground], Iterator[Row]]


def main() -> int:
    """The exit code: 0, or 1 when something could not be measured or was left over."""
    options = _parse()
    # A command is measured as it is installed: compiled.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    # Whoever ends it wants the machines gone too; started in the background, it would ignore SIGINT.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    started = time.monotonic()
    rows: list[Row] = []
    skipped: list[str] = []
    try:
        with Ground(options.rounds, options.root) as ground:
            # For peers: the daemon has seen the host as it is.
            _leave_hybrid_groups()
            for section in options.sections or SECTIONS:
                for measure in import_module(f"bench.{section}").SECTION:
                    _collect(measure, ground, rows, skipped)
            command = f".venv/bin/python -m bench --rounds {options.rounds} {' '.join(options.sections)}".strip()
            text = document(rows, skipped, command, time.monotonic() - started)
            print(text)
            if not options.sections:
                RESULTS.write_text(text)
    except Error as error:
        print(f"bench: error: {error.message}", file=sys.stderr)
        return 1
    return 1 if skipped else 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure Triarch beside its peers.")
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"only these of: {', '.join(SECTIONS)}")
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="samples of each figure (a third for VMs)")
    parser.add_argument("--root", type=Path, metavar="DIR", help="use the instance in DIR and the template that it has")
    options = parser.parse_args()
    for section in options.sections:
        if section not in SECTIONS:
            parser.error(f"there is no section '{section}': it needs one of {', '.join(SECTIONS)}")
    if options.rounds < 1:
        parser.error(f"illegal number of rounds {options.rounds}: it needs at least 1")
    return options


def _collect(measure: Measure, ground: Ground, rows: list[Row], skipped: list[str]) -> None:
    """Rows are shown as they come: the whole takes minutes. What fails is told, and keeps nothing else from running."""
    try:
        for row in measure(ground):
            rows.append(row)
            print(row.line(), file=sys.stderr, flush=True)
    except (Error, subprocess.CalledProcessError) as error:
        skipped.append(f"{measure.__module__.removeprefix('bench.')}, {measure.__name__.strip('_')}: {error}")
        print(f"bench: not measured: {skipped[-1]}\n{ground.log_tail()}", file=sys.stderr, flush=True)


def _leave_hybrid_groups() -> None:
    """Enter a mount namespace where crun sees a host that is not hybrid: it refuses those.

    It then takes the directory of that mount for one more version 1 tree, and makes groups in it that nobody removes.
    """
    unshare(CLONE_NEWNS)
    mount(None, "/", None, MS_REC | MS_SLAVE)
    if UNIFIED.is_mount():
        unmount(str(UNIFIED), MNT_DETACH)
        mount("tmpfs", str(UNIFIED), "tmpfs")


if __name__ == "__main__":
    sys.exit(main())
