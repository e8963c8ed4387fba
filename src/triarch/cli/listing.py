"""What every command that lists has: filters, chosen columns, an order, names only, and the formats of `output`."""

from __future__ import annotations

import fnmatch
import functools
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

import click

from triarch.cli.arguments import Completer, apply_all
from triarch.cli.output import Column, output_option, plain, print_rows, print_value
from triarch.model.nearest import did_you_mean, nearest

T = TypeVar("T")

_FILTER = re.compile(r"([a-z][\w.-]*(?:/[\w.-]+)?)(!?=)(.*)", re.DOTALL)
_LABEL = "label."


class Listing(Generic[T]):
    """How the caller wants a list. `columns` are those that are shown unless others are chosen, `more` the others."""

    def __init__(
        self,
        columns: Sequence[Column[T]],
        more: Sequence[Column[T]],
        *,
        output_format: str,
        chosen: str | None,
        order: str | None,
        quiet: bool,
        filters: Sequence[str],
    ) -> None:
        """Raises `click.UsageError` for a column that there is not, and lists those that there are."""
        self._known = {column.key: column for column in (*columns, *more)}
        self._format = output_format
        self._quiet = quiet
        self._chosen = None if chosen is None else [self._column(word) for word in _words(chosen)]
        self._columns = self._chosen or columns
        self._name = self._known.get("name", columns[0])
        descending = (order or "").startswith("-")
        self._order = None if not order else (self._column(order.lstrip("-")), descending)
        self._filters = [self._filter(text) for text in filters]

    def _column(self, word: str) -> Column[T]:
        if word in self._known:
            return self._known[word]
        if word.startswith(_LABEL):
            key = word.removeprefix(_LABEL)
            return Column[T](word.upper(), lambda row: _labels(row).get(key, ""))
        meant = did_you_mean(nearest(word, self._known, 0.5))
        raise click.UsageError(f"there is no column '{word}'{meant} There are: {', '.join(self._known)}")

    def _filter(self, text: str) -> Callable[[T], bool]:
        """`state=running,paused`, `arch!=hosted`, `label.role=web*`, or a pattern of the name."""
        match = _FILTER.fullmatch(text)
        column = self._column(match[1]) if match else self._name
        patterns = (match[3] if match else text).split(",")
        wanted = match is None or match[2] == "="

        def holds(row: T) -> bool:
            value = column.machine_value(row)
            return any(fnmatch.fnmatchcase(value, pattern) for pattern in patterns) is wanted

        return holds

    def select(self, rows: Sequence[T]) -> list[T]:
        """The rows that pass all filters, in the order asked for."""
        found = [row for row in rows if all(holds(row) for holds in self._filters)]
        if self._order is not None:
            column, descending = self._order
            found.sort(key=lambda row: _sort_key(column.machine_value(row)), reverse=descending)
        return found

    def print(self, rows: Sequence[T]) -> None:
        selected = self.select(rows)
        if self._quiet:
            sys.stdout.write("".join(f"{plain(self._name.machine_value(row))}\n" for row in selected))
        elif self._chosen is not None and self._format in ("json", "yaml"):
            values = [{column.key: column.machine_value(row) for column in self._columns} for row in selected]
            print_value(values, self._format)
        else:
            print_rows(selected, self._columns, self._format)


def _words(text: str) -> list[str]:
    return [word for word in text.lower().replace(",", " ").split() if word]


def _labels(row: object) -> Mapping[str, str]:
    labels = getattr(row, "labels", None)
    return labels if isinstance(labels, dict) else {}


def _sort_key(value: str) -> tuple[int, float, str]:
    """Numbers by their value and before words."""
    try:
        return (0, float(value), "")
    except ValueError:
        return (1, 0.0, value)


def list_options(
    columns: Sequence[Column[T]], more: Sequence[Column[T]] = (), *, complete: Completer | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a command that lists its options; it is called with a `Listing` as `listing`.

    `complete` completes the names that filters may be.
    """
    keys = ", ".join(column.key for column in (*columns, *more))

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(command)
        def wrapped(
            *args: Any,
            output_format: str,
            chosen: str | None,
            order: str | None,
            quiet: bool,
            filters: tuple[str, ...],
            **values: Any,
        ) -> Any:
            how = Listing(
                columns,
                more,
                output_format=output_format,
                chosen=chosen,
                order=order,
                quiet=quiet,
                filters=filters,
            )
            return command(*args, listing=how, **values)

        def complete_columns(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
            done, comma, last = incomplete.rpartition(",")
            return [f"{done}{comma}{c.key}" for c in (*columns, *more) if c.key.startswith(last)]

        decorated: Callable[..., Any] = apply_all(
            wrapped,
            click.argument("filters", metavar="[FILTER]...", nargs=-1, shell_complete=complete),
            output_option,
            click.option(
                "--columns",
                "chosen",
                metavar="A,B,…",
                help=f"Show these columns: {keys}.",
                shell_complete=complete_columns,
            ),
            click.option("--sort", "order", metavar="COLUMN", help="Order by a column; -COLUMN the other way round."),
            click.option("-q", "--quiet", is_flag=True, help="Print only names."),
        )
        return decorated

    return decorate
