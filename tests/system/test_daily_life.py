"""One scripted day of a machine, the same script under both architectures, and what it printed compared."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from site_rig import Site

from triarch.testing.daemon_rig import triarch_argv

pytestmark = pytest.mark.slow

DAY = Path(__file__).with_name("day.sh")
# What a day that went well has said; the rest of its words are compared between the architectures.
MILESTONES = (
    "first boot",
    "exit 124",
    "from a login shell of ann",
    "same tree",
    "another identity",
    "a damaged backup is refused",
    "grown",
    "on the volume",
    "from the machine",
    "a page",
    "healthy",
)


def spend_a_day(site: Site, architecture: str, path: Path) -> str:
    environment = {**os.environ, "TRIARCH_ROOT": str(site.root), "PATH": f"{path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["sh", "-x", str(DAY), architecture],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-5000:]}"
    return done.stdout


@pytest.mark.timeout(1800)
def test_a_day_is_the_same_under_both_architectures(site: Site, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("the day has containers and networks, which need root")
    program = tmp_path / "triarch"
    program.write_text(f'#!/bin/sh\nexec {" ".join(triarch_argv())} "$@"\n')
    program.chmod(0o755)
    assert shutil.which("triarch", path=str(tmp_path))
    as_container = spend_a_day(site, "container", tmp_path)
    for milestone in MILESTONES:
        assert milestone in as_container.splitlines()
    assert spend_a_day(site, "hosted", tmp_path) == as_container
    assert site.run("list", "-q") == ""
