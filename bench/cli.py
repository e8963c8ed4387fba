"""The command line itself, and lists."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack

from bench.ground import Ground
from bench.measure import Samples, by_turns, repeat, seconds
from bench.podman import Podman
from bench.report import Row, compared
from triarch.errors import Failed
from triarch.testing.daemon_rig import DaemonRig

MACHINES = 100
FAKE_MACHINES = 1000
SITE_MACHINES = 200


def version(ground: Ground) -> Iterator[Row]:
    """What any command costs at least, beside the interpreter alone."""
    python = str(getattr(sys, "_base_executable", sys.executable))
    pair = by_turns(
        ground.rounds,
        lambda: subprocess.run([python, "-c", "pass"], check=True),
        lambda: ground.command_line("--version"),
    )
    yield compared("`triarch --version`", "python3 -c pass", pair, at_most_times=2.5)


def lists(ground: Ground) -> Iterator[Row]:
    """As a whole process beside podman, and over the API."""
    podman = Podman(ground)
    with ExitStack() as stack:
        stack.callback(podman.clear)
        for number in range(MACHINES):
            stack.enter_context(ground.machine(f"bench-list-{number}"))
            podman.create(f"bench-list-{number}")
        pair = by_turns(ground.rounds, podman.list, lambda: ground.command_line("list"))
        yield compared(f"`triarch list` of {MACHINES} machines, whole process", "podman ps -a", pair, at_most_times=1.0)
        yield _api_list(MACHINES, repeat(ground.rounds, lambda: seconds(ground.client.machines)), 5.0)


def list_fake(ground: Ground) -> Iterator[Row]:
    """A thousand machines of the architecture that is in memory only, in an instance of its own."""
    rig = DaemonRig(ground.directory / "fake", machines=FAKE_MACHINES)
    with rig, rig.client() as client:
        samples = repeat(ground.rounds, lambda: seconds(client.machines))
    yield _api_list(FAKE_MACHINES, samples, 20.0)


def _api_list(machines: int, samples: Samples, at_most_ms: float) -> Row:
    return Row(what=f"API list of {machines:,} machines, whole request", unit="ms", ours=samples, at_most=at_most_ms)


def apply_unchanged(ground: Ground) -> Iterator[Row]:
    """A site file of many machines that are as it wants them, as a whole process; in memory only, as above."""
    path = ground.directory / "site.yaml"
    path.write_text(_site())
    with DaemonRig(ground.directory / "site", machines=SITE_MACHINES) as rig:
        rig.run("apply", "-f", str(path))

        def apply() -> None:
            done = rig.run("apply", "-f", str(path))
            if done.stdout != f"{SITE_MACHINES + 1} unchanged\n".encode():
                raise Failed(f"the site is not as it was applied: {done.stdout.decode()}{done.stderr.decode()}")

        samples = repeat(ground.rounds, lambda: seconds(apply))
    yield Row(
        what=f"`triarch apply` of {SITE_MACHINES} unchanged machines, whole process",
        unit="ms",
        ours=samples,
        at_most=500,
    )


def _site() -> str:
    """A dozen settings for each."""
    machines = "".join(
        f"""  m{number:04}:
    template: tiny
    network: none
    profiles: [base]
    memory: {64 + number}M
    cpus: 0.5
    env: {{LANG: C.UTF-8, NUMBER: '{number}'}}
    label: {{role: web, zone: a}}
    health: {{command: [test, -e, /run/ready], interval: 10s}}
    snapshots: {{every: 1h, keep: 7}}
    stop-timeout: 30s
"""
        for number in range(1, SITE_MACHINES + 1)
    )
    return f"site: bench\nprofiles:\n  base:\n    restart: on-failure\nmachines:\n{machines}"


SECTION = (version, lists, list_fake, apply_unchanged)
