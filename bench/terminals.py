"""Much output of a command in a running container."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

from bench.ground import Ground
from bench.measure import by_turns
from bench.podman import Podman
from bench.report import Row

_SIZE_MB = 500
# 200 MB/s.
_AT_MOST_SECONDS = _SIZE_MB / 200


def output(ground: Ground) -> Iterator[Row]:
    """As a whole process, whose output nobody keeps."""
    command = ("dd", "if=/dev/zero", "bs=1000000", f"count={_SIZE_MB}")
    podman = Podman(ground)
    with ExitStack() as stack:
        view = stack.enter_context(ground.machine("bench-output", start=True))
        stack.callback(podman.clear)
        podman.start("bench-output")
        pair = by_turns(
            ground.few_rounds,
            lambda: podman.exec("bench-output", *command),
            lambda: ground.command_line("exec", view.name, "--", *command),
        )
    yield Row(
        what=f"{_SIZE_MB} MB of output of `triarch exec`",
        unit="s",
        peer="podman exec",
        theirs=pair.theirs,
        ours=pair.ours,
        at_most=_AT_MOST_SECONDS,
    )


SECTION = (output,)
