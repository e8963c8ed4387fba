"""What the command line prints, character for character. `TRIARCH_GOLDEN=write` writes the files anew."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from triarch.testing.daemon_rig import DaemonRig

GOLDEN = Path(__file__).parent / "cli"
CASES: dict[str, str] = {
    "list": "list",
    "list-quiet": "ps -q",
    "list-json": "ls -o json",
    "list-yaml": "list -o yaml",
    "list-csv": "list -o csv",
    "info": "info m0001",
    "info-csv": "info m0001 -o csv",
    "template-list": "template list",
    "template-list-csv": "template list -o csv",
    "template-info": "template info tiny",
    "create-exists": "create tiny m0001",
    "create-bad-name": "create tiny Bad_Name",
    "create-no-template": "launch tony x",
    "create-bad-size": "launch tiny x --memory lots",
    "create-stray-word": "launch tiny x ls",
    "exec-stopped": "exec m0001 -- true",
    "exec-no-command": "exec m0001",
    "info-typo": "info m0003x",
    "command-typo": "lanch tiny",
    "template-typo": "template biuld x",
    "option-typo": "list --outptu json",
    "switch-unknown": "switch m0001 --to vax --check",
    "delete-two-one-wrong": "delete nobody nothing",
    "help": "--help",
    "launch-help": "launch --help",
    "exec-help": "exec --help",
}


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonRig]:
    with DaemonRig(tmp_path_factory.mktemp("instance"), machines=3) as rig:
        yield rig


@pytest.mark.parametrize("name", CASES)
def test_output(rig: DaemonRig, name: str) -> None:
    done = rig.run(*CASES[name].split(), extra={"COLUMNS": "100"})
    text = f"exit {done.returncode}\n-- stdout\n{done.stdout.decode()}-- stderr\n{done.stderr.decode()}"
    text = re.sub(r"\d+ (year|day)s? ago", "N days ago", text)
    path = GOLDEN / f"{name}.txt"
    if os.environ.get("TRIARCH_GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


def test_streams_and_exit_codes_pass_through(rig: DaemonRig) -> None:
    assert rig.run("launch", "tiny", "g1", "--network", "none").stdout == b"machine g1 runs as fake\n"
    done = rig.run("exec", "g1", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err\n")
    assert b"Usage:         " in rig.run("info", "g1").stdout
    assert json.loads(rig.run("info", "g1", "-o", "json").stdout)["usage"]["processes"] == 1
    assert rig.run("exec", "g1", "cat", input_bytes=b"in\n").stdout == b"in\n"
    assert rig.run("run", "--network", "none", "tiny", "--", "sh", "-c", "exit 5").returncode == 5
    assert rig.run("wait", "g1").returncode == 0
    assert rig.run("rm", "-f", "g1").returncode == 0


def test_no_color_and_no_bars_without_a_terminal(rig: DaemonRig) -> None:
    assert b"\x1b" not in rig.run("list", extra={"NO_COLOR": ""}).stdout
