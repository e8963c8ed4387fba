"""Arguments and options that several commands share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import click

from triarch.errors import Error, Invalid
from triarch.model.resources import format_size, parse_size

Decorator = Callable[[Any], Any]
Completer = Callable[[click.Context, click.Parameter, str], list[str]]

EXAMPLES = "Examples:"


def examples(*lines: str) -> str:
    """The epilog of a command: its examples, one a line."""
    # click lays out anew whatever does not begin with \b.
    return "\b\n" + "\n".join((EXAMPLES, *(f"  {line}" for line in lines)))


def examples_of(command: click.Command) -> tuple[str, ...]:
    """The lines of `examples`, or what stands between semicolons after the word."""
    head, word, text = (command.epilog or "").partition(EXAMPLES)
    lines = text.splitlines() if head.startswith("\b") else text.replace("\n", " ").split(";")
    return tuple(line.strip() for line in lines if line.strip()) if word else ()


class NounGroup(click.Group):
    """The commands of one noun, with short names for some and a suggestion for those that there are not."""

    aliases: ClassVar[dict[str, str]] = {"ls": "list", "rm": "delete"}

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return laid_out(super().get_command(ctx, self.aliases.get(cmd_name, cmd_name)))

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            from triarch.cli.app import unknown_command

            known = (*self.commands, *(short for short, name in self.aliases.items() if name in self.commands))
            raise unknown_command(args[0], self.name or "", known)
        return super().resolve_command(ctx, args)


def laid_out(command: click.Command | None) -> click.Command | None:
    """The command with each of its examples on a line of its own."""
    if command is not None and command.epilog and not command.epilog.startswith("\b"):
        lines = examples_of(command)
        command.epilog = examples(*lines) if lines else command.epilog
    return command


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


class OwnExitCode(click.Command):
    """A command that exits with the code of what it runs, so that Triarch's own failures have a code of their own."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except Error as error:
            from triarch.cli.exit_codes import OwnFailure

            raise OwnFailure(error) from error
        except KeyboardInterrupt:
            click.echo("interrupted; what it ran in the machine is ended", err=True)
            raise


class CommandAfterName(OwnExitCode):
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


def completes(kind: str) -> Completer:
    """The completer of that name in `triarch.cli.complete`, which is imported only when a shell asks."""

    def complete(ctx: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
        from triarch.cli import complete as completers

        completer: Completer = getattr(completers, kind)
        return completer(ctx, parameter, incomplete)

    return complete


def machine_argument(*, many: bool = False) -> Decorator:
    """NAME, or with `many` at least one of them as `names`."""
    if many:
        return click.argument("names", metavar="NAME...", nargs=-1, required=True, shell_complete=completes("machines"))
    return click.argument("name", shell_complete=completes("machines"))


def template_argument(name: str = "template") -> Decorator:
    return click.argument(name, shell_complete=completes("templates"))


def architecture_option(*flags: str, required: bool = False, help: str) -> Decorator:
    return click.option(
        *flags,
        "architecture",
        metavar="ARCH",
        required=required,
        help=help,
        shell_complete=completes("architectures"),
    )


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
