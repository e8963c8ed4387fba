"""Arguments and options that several commands share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import click

from triarch.errors import Invalid
from triarch.model.resources import format_size, parse_size

Decorator = Callable[[Any], Any]


class CommandAfterDashes(click.Command):
    """`triarch launch TEMPLATE [NAME] [OPTIONS] -- COMMAND…`: what follows `--` is kept apart in `ctx.meta[KEY]`."""

    KEY: ClassVar[str] = "triarch.command"

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--" in args:
            at = args.index("--")
            ctx.meta[self.KEY] = tuple(args[at + 1 :])
            args = args[:at]
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[-- COMMAND...]"]


class CommandAfterName(click.Command):
    """`triarch exec [OPTIONS] NAME COMMAND…` as podman has it, and `triarch exec NAME [OPTIONS] -- COMMAND…` as incus.

    A `--` that belongs to the command itself is left to it.
    """

    allow_interspersed_args = False

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if "--" in args:
            head = args[: args.index("--")]
            ctx.allow_interspersed_args = True
            try:
                values, _, _ = self.make_parser(ctx).parse_args(list(head))
                # Nothing but options and the name stands before the dashes, so they begin the command.
                ctx.allow_interspersed_args = not isinstance(values.get("command"), tuple) or not values["command"]
            except click.UsageError:
                ctx.allow_interspersed_args = False
        return super().parse_args(ctx, args)


def apply_all(command: Any, *decorators: Decorator) -> Any:
    """Decorate with all of them; the first is the first on the help page."""
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def without_dashes(command: Sequence[str]) -> tuple[str, ...]:
    """The command itself, when the parser left the `--` before it."""
    return tuple(command[1:] if command and command[0] == "--" else command)


def _complete_machines(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    """Names for the shell's completion; none when no daemon runs."""
    from triarch.cli.session import Session

    client = Session(ctx.find_root().params.get("root")).running_client()
    names = [view.name for view in client.machines()] if client is not None else []
    return [name for name in names if name.startswith(incomplete)]


def machine_argument(*, many: bool = False) -> Decorator:
    """NAME, or with `many` at least one of them as `names`."""
    if many:
        return click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=_complete_machines)
    return click.argument("name", shell_complete=_complete_machines)


class Number(click.FloatRange):
    """A number in a range; `nan`, which no range keeps out, is none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        if math.isnan(number):
            self.fail(f"{value!r} is not a number", param, ctx)
        return number


class SizeType(click.ParamType[int]):
    """`512M`, `2G`: bytes, at least `minimum_bytes`."""

    name = "size"

    def __init__(self, minimum_bytes: int) -> None:
        self._minimum_bytes = minimum_bytes

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            size_bytes = parse_size(value)
        except Invalid as error:
            self.fail(error.message, param, ctx)
        if size_bytes < self._minimum_bytes:
            self.fail(f"'{value}' is too little: it needs at least {format_size(self._minimum_bytes)}", param, ctx)
        return size_bytes
