"""Containers where control groups are version 2, in a mount namespace that hides version 1."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "container_v2.py"
HIDE = "umount -R /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_life_under_version_2(tmp_path: Path) -> None:
    def run(script: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", script],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    if run(HIDE).returncode:
        pytest.skip("no control groups v2 can be mounted here")
    done = run(f"{HIDE} && exec {sys.executable} {SCRIPT} {tmp_path}")
    assert done.stdout == "lived\n", done.stdout + done.stderr
