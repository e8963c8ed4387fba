"""Containers: start, a whole run, and commands in a running one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

from bench.crun import Crun
from bench.ground import TEMPLATE, Ground, duration_seconds
from bench.measure import Samples, alternate, by_turns, seconds
from bench.podman import Podman
from bench.report import Row, compared


def start(ground: Ground) -> Iterator[Row]:
    """`app` machine with network and user namespace; the daemon's own time, and that of the request's caller."""
    client = ground.client
    whole: list[float] = []

    def theirs() -> float:
        name = crun.bundle()
        took = seconds(lambda: crun.start(name))
        crun.delete(name)
        return took

    with Crun(ground) as crun, ground.machine("bench-start") as view:

        def ours() -> float:
            operations = []
            whole.append(seconds(lambda: operations.append(client.finish(client.start(view.name)))))
            client.finish(client.kill(view.name))
            return duration_seconds(operations[0])

        pair = alternate(ground.rounds, theirs, ours)
    yield compared("start of an app container, in the daemon", "overlay + crun run", pair, at_most_times=2.0)
    yield Row(
        what="start of an app container, over the API",
        unit="ms",
        peer="overlay + crun run",
        theirs=pair.theirs,
        ours=Samples(tuple(whole[1:])),
    )


def run(ground: Ground) -> Iterator[Row]:
    """A command in a throw-away machine, as a whole process."""
    podman = Podman(ground)
    pair = by_turns(
        ground.rounds,
        lambda: podman.run("true"),
        lambda: ground.command_line("run", TEMPLATE, "--", "true"),
    )
    yield compared(
        f"`triarch run {TEMPLATE} -- true`, whole process", "podman run --rm --network none", pair, at_most_times=1.0
    )


def exec_(ground: Ground) -> Iterator[Row]:
    """`true` in a running machine: as a whole process, and over an open API."""
    with ExitStack() as stack:
        view = stack.enter_context(ground.machine("bench-exec", start=True))
        crun = stack.enter_context(Crun(ground))
        name = crun.bundle()
        crun.start(name)
        yield compared(
            "exec, over the API",
            "crun exec",
            by_turns(
                ground.rounds,
                lambda: crun.exec(name, "true"),
                lambda: ground.client.execute(view.name, "true"),
            ),
            at_most_times=2.0,
        )
        podman = Podman(ground)
        stack.callback(podman.clear)
        podman.start("bench-exec")
        yield compared(
            "`triarch exec NAME -- true`, whole process",
            "podman exec",
            by_turns(
                ground.rounds,
                lambda: podman.exec("bench-exec", "true"),
                lambda: ground.command_line("exec", view.name, "--", "true"),
            ),
            at_most_times=1.0,
        )


SECTION = (start, run, exec_)
