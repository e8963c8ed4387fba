"""Data on standard output: aligned columns for people, JSON, YAML and CSV for programs."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, Generic, TextIO, TypeVar

import click
import msgspec

T = TypeVar("T")

FORMATS = ("table", "json", "yaml", "csv")
GAP = "   "
_CODES = {"bold": 1, "red": 31, "green": 32, "yellow": 33, "cyan": 36, "grey": 90}


def output_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a reading command `-o`."""
    return click.option(
        "-o",
        "--output",
        "output_format",
        type=click.Choice(FORMATS),
        default="table",
        help="How to print the data.",
    )(command)


def colored(stream: TextIO) -> bool:
    """Whether to color: on terminals, unless NO_COLOR is set (no-color.org) or the terminal is dumb."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def plain(text: str, keep: str = "") -> str:
    """`text` with everything that would move a terminal's cursor or change how it looks as escapes.

    Some of what is printed was chosen by strangers: a template's system name, a word of a command, what a tool said.
    `keep` are control characters that may stay.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character in keep else character.encode("unicode_escape").decode()
        for character in text
    )


def style(text: str, color: str, stream: TextIO) -> str:
    return f"\x1b[{_CODES[color]}m{text}\x1b[0m" if colored(stream) else text


class Column(Generic[T]):
    """One column: its title, what it shows of a row, and, for some, in which color."""

    def __init__(
        self,
        title: str,
        show: Callable[[T], str],
        *,
        color: Callable[[T], str | None] | None = None,
        right: bool = False,
        machine_value: Callable[[T], str] | None = None,
    ) -> None:
        """`machine_value` replaces `show` in CSV: a plain number or time where people get a rounded one."""
        self.title = title
        self.key = title.lower().replace(" ", "-")
        self.show = show
        self.color = color
        self.right = right
        self.machine_value = machine_value or show


def print_rows(rows: Sequence[T], columns: Sequence[Column[T]], output_format: str) -> None:
    """Print a list: `columns` as table and CSV, the whole values as JSON and YAML."""
    if output_format == "table":
        _print_table(rows, columns)
    elif output_format == "csv":
        import csv

        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(column.title.lower() for column in columns)
        writer.writerows([plain(column.machine_value(row), keep="\n\t") for column in columns] for row in rows)
    else:
        print_value(rows, output_format)


def print_value(value: object, output_format: str) -> None:
    """Print one value whole, as JSON or YAML."""
    if output_format == "yaml":
        text = msgspec.yaml.encode(value).decode()
    else:
        text = msgspec.json.format(msgspec.json.encode(value), indent=2).decode() + "\n"
    sys.stdout.write(text)


def print_record(value: T, columns: Sequence[Column[T]], output_format: str) -> None:
    """Print one value: a line per column for people, else as `print_rows` prints a list of one."""
    if output_format == "table":
        width = max(len(column.title) for column in columns) + 1
        for column in columns:
            title = style(f"{column.title}:".ljust(width), "bold", sys.stdout)
            print(f"{title}  {_paint(column, value, plain(column.show(value)))}".rstrip())
    elif output_format == "csv":
        print_rows((value,), columns, "csv")
    else:
        print_value(value, output_format)


def _print_table(rows: Sequence[T], columns: Sequence[Column[T]]) -> None:
    cells = [[plain(column.show(row)) for column in columns] for row in rows]
    widths = [max([len(column.title), *(len(line[i]) for line in cells)]) for i, column in enumerate(columns)]
    header = GAP.join(_align(column, column.title, width) for column, width in zip(columns, widths, strict=True))
    lines = [style(header.rstrip(), "bold", sys.stdout)]
    for row, line in zip(rows, cells, strict=True):
        padded = (_align(column, text, width) for column, text, width in zip(columns, line, widths, strict=True))
        lines.append(GAP.join(_paint(column, row, text) for column, text in zip(columns, padded, strict=True)).rstrip())
    sys.stdout.write("\n".join(lines) + "\n")


def _align(column: Column[Any], text: str, width: int) -> str:
    return text.rjust(width) if column.right else text.ljust(width)


def _paint(column: Column[T], row: T, text: str) -> str:
    color = column.color(row) if column.color is not None else None
    return style(text, color, sys.stdout) if color else text


def age(moment: datetime | None, now: datetime | None = None) -> str:
    """`3 minutes ago`: in the largest unit of which there is at least one."""
    if moment is None:
        return "-"
    seconds = max(0, int(((now or datetime.now(UTC)) - moment).total_seconds()))
    for unit, length in (("year", 31_536_000), ("day", 86_400), ("hour", 3600), ("minute", 60), ("second", 1)):
        count = seconds // length
        if count:
            return f"{count} {unit}{'' if count == 1 else 's'} ago"
    return "just now"


def join(words: Iterable[str]) -> str:
    """A command line that a shell would read back."""
    import shlex

    return shlex.join(words)
