"""`python -m bench [--rounds N] [--root DIR] [SECTION …]`."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

from bench.ground import Ground
from bench.report import Row, document
from triarch.errors import Error, MissingProgram
from triarch.host.syscalls import CLONE_NEWNS, MNT_DETACH, MS_REC, MS_SLAVE, mount, unmount, unshare

SECTIONS = ("containers", "cli", "many", "vms", "switch")
RESULTS = Path(__file__).parent / "RESULTS.md"
UNIFIED = Path("/sys/fs/cgroup/unified")

Measure = Callable[[Ground], Iterator[Row]]


def main() -> int:
    """The exit code: 0, or 1 when something could not be measured."""
    options = _parse()
    started = time.monotonic()
    rows: list[Row] = []
    skipped: list[str] = []
    # A command is measured as it is installed: compiled.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    try:
        with Ground(options.rounds, options.root) as ground:
            # For peers: the daemon has seen the host as it is.
            _leave_hybrid_groups()
            for section in options.sections or SECTIONS:
                for measure in import_module(f"bench.{section}").SECTION:
                    _collect(measure, ground, rows, skipped)
    except (Error, subprocess.CalledProcessError) as error:
        print(f"bench: error: {error}", file=sys.stderr)
        return 1
    command = shlex.join(["python", "-m", "bench", *sys.argv[1:]])
    text = document(rows, skipped, command, time.monotonic() - started)
    print(text)
    if not options.sections:
        RESULTS.write_text(text)
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure Triarch beside its peers.")
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--rounds", type=int, default=15, metavar="N", help="samples of each figure (a fifth for VMs)")
    parser.add_argument("--root", type=Path, metavar="DIR", help="use the instance in DIR and the template that it has")
    return parser.parse_args()


def _collect(measure: Measure, ground: Ground, rows: list[Row], skipped: list[str]) -> None:
    """Rows are shown as they come: the whole takes minutes."""
    try:
        for row in measure(ground):
            rows.append(row)
            print(row.line(), file=sys.stderr, flush=True)
    except MissingProgram as error:
        skipped.append(f"{(measure.__doc__ or measure.__name__).splitlines()[0]} {error.message}")


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
