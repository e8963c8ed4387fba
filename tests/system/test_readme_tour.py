"""The README's quick tour, run line by line as it stands there, in an instance of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from container_rig import skip_without_busybox

from triarch.model.instance import instance_at
from triarch.testing.daemon_rig import triarch_argv
from triarch.testing.leaks import leaks

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
# They go on until somebody ends them: a person by a key, the test by Ctrl-C.
ENDLESS = ("console",)
# `doctor` fails where the host lacks something that it names.
MAY_FAIL = ("doctor",)


def tour() -> list[str]:
    """The commands, without their comments."""
    text = (ROOT / "README.md").read_text()
    block = re.search(r"^## A quick tour$.*?^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert block is not None, "README.md has no quick tour"
    return [re.sub(r"\s+#.*$", "", line) for line in block[1].splitlines()]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    skip_without_busybox()
    if os.geteuid() != 0:
        pytest.skip("the tour has networks and containers, which need root")
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    yield tmp_path
    subprocess.run(
        triarch_argv("--root", str(tmp_path / "root"), "down"), capture_output=True, timeout=120, check=False
    )
    assert leaks(instance_at(tmp_path / "root")) == ()


@pytest.mark.timeout(900)
def test_every_line_of_the_quick_tour_works(place: Path) -> None:
    lines = tour()
    assert len(lines) > 25 and lines[-1] == "triarch down"
    triarch = " ".join(triarch_argv("--root", str(place / "root")))
    for line in lines:
        words = line.split()
        assert words[0] == "triarch"
        endless = words[1] in ENDLESS
        script = f"{'timeout -s INT 5 ' if endless else ''}{triarch} {line.removeprefix('triarch ')}"
        done = subprocess.run(
            ["sh", "-c", script],
            cwd=place,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=400,
            check=False,
        )
        assert done.returncode == 0 or endless or words[1] in MAY_FAIL, f"{line}: {done.returncode}\n{done.stdout}"
        assert "Traceback" not in done.stdout and "internal error" not in done.stdout, f"{line}: {done.stdout}"
