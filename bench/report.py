"""The results as a table, with what a reader must know of the host they are from."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import msgspec

from bench.measure import Pair, Samples

Unit = Literal["ms", "s", "KiB", "MiB", "bytes"]

# Samples are in seconds and bytes.
_FACTORS: dict[Unit, float] = {"ms": 1e3, "s": 1.0, "KiB": 2**-10, "MiB": 2**-20, "bytes": 1.0}
_PROGRAMS = (
    ("crun", ("crun", "--version")),
    ("conmon", ("conmon", "--version")),
    ("podman", ("podman", "--version")),
    ("QEMU", ("qemu-system-x86_64", "--version")),
)
_HEADER = "| what | peer | peer's median | Triarch's median | ratio | target | met? |\n|---|---|---|---|---|---|---|"


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One figure. Samples are in seconds or bytes and shown in `unit`.

    `at_most_times` is a target for the ratio to the peer, `at_most` one for the figure itself, in `unit`; a row with
    neither is there for the reader's information.
    """

    what: str
    unit: Unit
    ours: Samples
    peer: str = ""
    theirs: Samples | None = None
    at_most_times: float | None = None
    at_most: float | None = None

    @property
    def ratio(self) -> float | None:
        if self.theirs is None or not self.theirs.median:
            return None
        return self.ours.median / self.theirs.median

    @property
    def met(self) -> bool | None:
        """None when there is no target."""
        if self.at_most is not None:
            return self.ours.median * _FACTORS[self.unit] <= self.at_most
        if self.at_most_times is not None and self.ratio is not None:
            return self.ratio <= self.at_most_times
        return None

    @property
    def target(self) -> str:
        if self.at_most is not None:
            return f"≤ {self.at_most:g} {self.unit}"
        return "–" if self.at_most_times is None else f"≤ {self.at_most_times:g} ×"

    def line(self) -> str:
        """The row in Markdown."""
        theirs = "–" if self.theirs is None else _figure(self.theirs, self.unit)
        ratio = "–" if self.ratio is None else f"{self.ratio:.2f}"
        met = {True: "yes", False: "**no**", None: "–"}[self.met]
        cells = (self.what, self.peer or "–", theirs, _figure(self.ours, self.unit), ratio, self.target, met)
        return f"| {' | '.join(cells)} |"


def compared(what: str, peer: str, pair: Pair, unit: Unit = "ms", at_most_times: float | None = None) -> Row:
    """The row of two that were measured by turns."""
    return Row(what=what, unit=unit, ours=pair.ours, peer=peer, theirs=pair.theirs, at_most_times=at_most_times)


def document(rows: Sequence[Row], skipped: Sequence[str], command: str, took_seconds: float) -> str:
    """All of RESULTS.md."""
    missed = [row.what for row in rows if row.met is False]
    lines = [
        "# Results",
        "",
        f"Made by `{command}` on {datetime.now(UTC):%Y-%m-%d} in {took_seconds / 60:.1f} minutes. What is compared was"
        " measured by turns in this one run; a figure is the median, with the least and the greatest behind it.",
        "",
        *(f"- {line}" for line in machine_description()),
        "",
        _HEADER,
        *(row.line() for row in rows),
        "",
        f"Targets missed: {'; '.join(missed)}." if missed else "Every target is met.",
        *(["", "Not measured:", "", *(f"- {line}" for line in skipped)] if skipped else []),
    ]
    return "\n".join(lines) + "\n"


def machine_description() -> tuple[str, ...]:
    """Processors, memory, kernel and the versions of the peers."""
    model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    version = re.search(r'^PRETTY_NAME="(.+)"$', Path("/etc/os-release").read_text(), re.MULTILINE)
    return (
        f"{os.cpu_count()} processors ({model[1] if model else platform.machine()}), {memory_gib:.0f} GiB of memory",
        f"Linux {platform.release().partition('-')[0]}, {version[1] if version else 'unknown distribution'}, "
        f"Python {platform.python_version()}",
        ", ".join(f"{name} {_version(argv)}" for name, argv in _PROGRAMS),
    )


def _version(argv: Sequence[str]) -> str:
    try:
        said = subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "absent"
    found = re.search(r"\d+(\.\d+)+", said)
    return found[0] if found else "unknown"


def _figure(samples: Samples, unit: Unit) -> str:
    scaled = samples.scaled(_FACTORS[unit])
    text = f"{_number(scaled.median)} {unit}"
    if len(scaled.values) > 1:
        text += f" ({_number(min(scaled.values))}–{_number(max(scaled.values))})"
    return text


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
