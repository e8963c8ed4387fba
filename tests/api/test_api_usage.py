"""What machines use, over the API and on the command line."""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import select
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from triarch.cli.figures import BARS, percent, rate, sparkline
from triarch.cli.top import lines_of
from triarch.client import Client
from triarch.errors import Invalid, NotFound
from triarch.model.driver import Usage
from triarch.model.state import State
from triarch.model.usage import MachineUsage
from triarch.testing.daemon_rig import DaemonRig, triarch_argv

MACHINES = 200


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonRig]:
    with DaemonRig(Path(tmp_path_factory.mktemp("many")), machines=MACHINES) as rig:
        yield rig


def test_one_request_tells_of_all(many: DaemonRig) -> None:
    with many.client() as client:
        client.usages.all()
        began = time.perf_counter()
        rows = client.usages.all()
        seconds = time.perf_counter() - began
    assert len(rows) == MACHINES
    assert [row.name for row in rows] == sorted(row.name for row in rows)
    assert seconds < 2


def test_figures_for_prometheus_where_it_looks_for_them(client: Client) -> None:
    page = client.usages.metrics()
    assert 'triarch_info{version="' in page
    assert client.request_raw("/1/metrics").decode().splitlines()[:4] == page.splitlines()[:4]


def test_what_is_wrong_is_refused(client: Client) -> None:
    with pytest.raises(NotFound):
        client.usages.history("nobody")
    with pytest.raises(Invalid, match="illegal grouping"):
        client.usages.account(by="moon")


def test_top_without_a_terminal_prints_once(many: DaemonRig) -> None:
    done = many.run("top", "--once", "--all", "--sort", "name", "-o", "csv")
    rows = list(csv.DictReader(io.StringIO(done.stdout.decode())))
    assert len(rows) == MACHINES
    assert done.returncode == 0
    assert {"name", "cpu%", "memory", "limit", "disk", "pids"} <= rows[0].keys()


def test_usage_on_the_command_line(many: DaemonRig) -> None:
    done = many.run("usage", "--from", "24h", "-o", "json")
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout), list)
    refused = many.run("usage", "--from", "yesterday")
    assert refused.returncode != 0
    assert b"illegal time" in refused.stderr


def test_top_on_a_terminal_stays_until_q_and_leaves_it_as_it_was(many: DaemonRig) -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ.update(many.environment)
        argv = triarch_argv("top", "--interval", "0.3", "--all")
        os.execv(argv[0], argv)
    said, deadline, asked = b"", time.monotonic() + 60, False
    while time.monotonic() < deadline:
        if select.select([terminal], [], [], 0.5)[0]:
            try:
                said += os.read(terminal, 65536)
            except OSError:
                break
        if said.count(b"q quits") >= 2 and not asked:
            os.write(terminal, b"q")
            asked = True
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert said.startswith(b"\x1b[?1049h")
    assert said.rstrip().endswith(b"\x1b[?1049l")


def row(name: str, cpus: float | None = 0.5) -> MachineUsage:
    usage = Usage(cpu_seconds=1.0, memory_bytes=1 << 30)
    return MachineUsage(name=name, uuid="u", state=State.RUNNING, architecture="hosted", usage=usage, cpus=cpus)


def test_a_screen_is_never_overfull() -> None:
    lines = lines_of([row(f"machine-{number}", None) for number in range(500)], 60, 24)
    assert len(lines) <= 24
    assert all(len(line) <= 60 for line in lines)
    assert lines[-1] == "… 480 more"


def test_sparklines() -> None:
    assert sparkline([]) == ""
    assert sparkline([0, 0]) == BARS[0] * 2
    assert sparkline([0, 50, 100]) == f"{BARS[0]}{BARS[4]}{BARS[7]}"
    assert len(sparkline(range(100), 30)) == 30
    assert sparkline([5], top=1) == BARS[-1]
    assert (percent(None), percent(1.25), rate(None), rate(1 << 20)) == ("-", "125.0", "-", "1.0 MiB/s")
