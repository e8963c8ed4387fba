"""Limits as a container sees them in /proc, where lxcfs runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from triarch.host.lxcfs import own_view

SCRIPT = Path(__file__).parents[1] / "container_lxcfs.py"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_container_sees_its_own_limits(tmp_path: Path) -> None:
    if shutil.which("lxcfs") is None:
        pytest.skip("lxcfs is not installed (apt-get install lxcfs)")
    if own_view():
        pytest.skip("this host's own lxcfs is in use: the test would hide it")
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", sys.executable, SCRIPT, tmp_path],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == "seen\n", done.stdout + done.stderr


def test_no_lxcfs_is_no_view(tmp_path: Path) -> None:
    assert own_view(root=str(tmp_path / "absent")) == {}
    (tmp_path / "bare/proc").mkdir(parents=True)
    (tmp_path / "bare/proc/meminfo").touch()
    assert own_view(root=str(tmp_path / "bare")) == {}
