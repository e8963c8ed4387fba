"""`triarch top`: what all machines use, as a table that stays."""

from __future__ import annotations

import os
import select
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import click

from triarch.cli.arguments import Number, examples
from triarch.cli.figures import number, percent, rate, size
from triarch.cli.output import Column, output_option, plain, print_rows, style
from triarch.cli.session import Session
from triarch.model.driver import Usage
from triarch.model.state import State
from triarch.model.usage import MachineUsage

_ALTERNATE, _MAIN = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _CLEAR_LINE, _CLEAR_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"
_QUIT_KEYS = b"qQ\x03\x1b"
_SORTS: dict[str, Callable[[MachineUsage], float]] = {
    "cpu": lambda row: -(row.cpus or 0.0),
    "memory": lambda row: -(row.usage.memory_bytes if row.usage else 0),
    "disk": lambda row: -((row.usage.disk_bytes or 0) if row.usage else 0),
    "net": lambda row: -((row.network_receive_rate or 0.0) + (row.network_send_rate or 0.0)),
}


def _of(show: Callable[[Usage], str], none: str = "-") -> Callable[[MachineUsage], str]:
    """A figure of a machine that runs."""
    return lambda row: none if row.usage is None else show(row.usage)


COLUMNS = (
    Column[MachineUsage]("NAME", lambda row: row.name),
    Column[MachineUsage]("ARCH", lambda row: row.architecture),
    Column[MachineUsage]("CPU%", lambda row: percent(row.cpus), right=True),
    Column[MachineUsage](
        "MEMORY",
        _of(lambda usage: size(usage.memory_bytes)),
        right=True,
        machine_value=_of(lambda usage: number(usage.memory_bytes), ""),
    ),
    Column[MachineUsage](
        "LIMIT",
        _of(lambda usage: size(usage.memory_limit_bytes)),
        right=True,
        machine_value=_of(lambda usage: number(usage.memory_limit_bytes), ""),
    ),
    Column[MachineUsage](
        "DISK",
        _of(lambda usage: size(usage.disk_bytes)),
        right=True,
        machine_value=_of(lambda usage: number(usage.disk_bytes), ""),
    ),
    Column[MachineUsage]("READ", lambda row: rate(row.disk_read_rate), right=True),
    Column[MachineUsage]("WRITE", lambda row: rate(row.disk_write_rate), right=True),
    Column[MachineUsage]("RECEIVE", lambda row: rate(row.network_receive_rate), right=True),
    Column[MachineUsage]("SEND", lambda row: rate(row.network_send_rate), right=True),
    Column[MachineUsage]("PIDS", _of(lambda usage: number(usage.processes) or "-"), right=True),
)


@click.command(
    "top",
    short_help="Show what machines use, again and again.",
    epilog=examples("triarch top", "triarch top --sort memory", "triarch top --once", "triarch top --once -o csv"),
)
@click.option("--once", is_flag=True, help="Print one table and end, as without a terminal.")
@click.option("--interval", type=Number(0.2, 3600), default=2.0, metavar="SECONDS", help="Between two looks (2).")
@click.option("--sort", type=click.Choice(("name", *_SORTS)), default="cpu", help="What comes first.")
@click.option("-a", "--all", "all_machines", is_flag=True, help="Those that do not run, too.")
@output_option
@click.pass_obj
def top_command(
    session: Session, once: bool, interval: float, sort: str, all_machines: bool, output_format: str
) -> None:
    """Show what machines use, and go on showing it until q is pressed."""

    def look() -> list[MachineUsage]:
        if session.running_client() is None and session.never_used:
            return []
        return _chosen(session.client.usages.all(), sort, all_machines)

    if once or output_format != "table" or not (sys.stdin.isatty() and sys.stdout.isatty()):
        if look() and interval > 0:
            # Rates need two looks; the daemon may have had one just now.
            select.select([], [], [], min(interval, 1.1))
        print_rows(look(), COLUMNS, output_format)
        return
    with _screen() as terminal:
        _draw(look())
        while not _key_within(terminal, interval):
            _draw(look())


def _chosen(rows: Sequence[MachineUsage], sort: str, all_machines: bool) -> list[MachineUsage]:
    shown = [row for row in rows if all_machines or row.state in (State.RUNNING, State.PAUSED)]
    return sorted(shown, key=_SORTS[sort]) if sort in _SORTS else shown


def lines_of(rows: Sequence[MachineUsage], columns: int, height: int) -> list[str]:
    """What fits on a screen: a summary, the titles, and the first machines."""
    running = sum(1 for row in rows if row.usage is not None)
    memory_bytes = sum(row.usage.memory_bytes for row in rows if row.usage is not None)
    cpus = sum(row.cpus or 0.0 for row in rows)
    cells = [[plain(column.show(row)) for column in COLUMNS] for row in rows[: max(0, height - 4)]]
    widths = [max([len(c.title), *(len(line[i]) for line in cells)]) for i, c in enumerate(COLUMNS)]

    def line(texts: Sequence[str]) -> str:
        padded = (t.rjust(w) if c.right else t.ljust(w) for c, t, w in zip(COLUMNS, texts, widths, strict=True))
        return "  ".join(padded)[:columns].rstrip()

    summary = f"{running} running, {percent(cpus)} % of a processor, {size(memory_bytes)} of memory; q quits"
    left = len(rows) - len(cells)
    more = [f"… {left} more"] if left else []
    return [summary[:columns], "", line([c.title for c in COLUMNS]), *map(line, cells), *more]


def _draw(rows: Sequence[MachineUsage]) -> None:
    columns, height = shutil.get_terminal_size()
    lines = lines_of(rows, columns, height)
    lines[2] = style(lines[2], "bold", sys.stdout)
    sys.stdout.write(_HOME + f"{_CLEAR_LINE}\n".join(lines) + _CLEAR_LINE + _CLEAR_BELOW)
    sys.stdout.flush()


def _key_within(terminal: int, seconds: float) -> bool:
    """Whether a key that quits was pressed in that time; any other key looks again at once."""
    ready, _, _ = select.select([terminal], [], [], seconds)
    if not ready:
        return False
    pressed = os.read(terminal, 64)
    return not pressed or any(key in _QUIT_KEYS for key in pressed)


@contextmanager
def _screen() -> Iterator[int]:
    """The other screen of the terminal, keys unbuffered; whatever happens, the terminal is as it was afterwards."""
    import termios
    import tty

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    try:
        tty.setcbreak(terminal)
        sys.stdout.write(_ALTERNATE)
        yield terminal
    finally:
        sys.stdout.write(_MAIN)
        sys.stdout.flush()
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
