"""`triarch help`: the help page of a command, and topics that belong to no single one."""

from __future__ import annotations

import click

from triarch.cli import exit_codes
from triarch.cli.arguments import examples

FILTERS = """\
Commands that list take filters; a row is shown when all of them hold.

  COLUMN=PATTERN      the column's value matches; PATTERN may hold * ? [abc]
  COLUMN=A,B          it matches one of them
  COLUMN!=PATTERN     it does not match
  label.KEY=PATTERN   the same of a label
  PATTERN             the name matches

--columns chooses what is shown and --sort by which column (-COLUMN: the other way round);
--help of the command names its columns. In csv, and in json with --columns, sizes are
bytes and times are ISO 8601.
"""


def exit_codes_text() -> str:
    lines = [f"{code:>3}  {meaning}" for code, meaning in exit_codes.MEANINGS.items()]
    return (
        "\n".join((*lines, "", "exec, run and shell otherwise exit with the code of the command that they ran.")) + "\n"
    )


def settings_text() -> str:
    from triarch.model.setting_text import KEYS

    names = [f"{key.name}.NAME" if key.has_parts else key.name for key in KEYS]
    lines = [f"  {name:<17}{key.about}" for name, key in zip(names, KEYS, strict=True)]
    shown = [f"{line:<60}{key.example}".rstrip() for line, key in zip(lines, KEYS, strict=True)]
    return (
        "Settings of machines, for set, --set, profiles and site files. 'none' takes a limit or a check away.\n\n"
        + "\n".join(shown)
        + "\n"
    )


def topics() -> dict[str, str]:
    """Every topic and its text."""
    return {"exit-codes": exit_codes_text(), "filters": FILTERS, "settings": settings_text()}


def _complete(ctx: click.Context, _: click.Parameter, incomplete: str) -> list[str]:
    group = ctx.find_root().command
    known = (*topics(), *(group.list_commands(ctx) if isinstance(group, click.Group) else ()))
    return [word for word in known if word.startswith(incomplete)]


@click.command(
    "help",
    short_help="Show the help of a command or a topic.",
    epilog=examples("triarch help launch", "triarch help template build", "triarch help exit-codes"),
)
@click.argument("words", metavar="[COMMAND|TOPIC]...", nargs=-1, shell_complete=_complete)
@click.pass_context
def help_command(ctx: click.Context, words: tuple[str, ...]) -> None:
    """Show the help of a command, or of a topic: exit-codes, filters, settings."""
    if len(words) == 1 and words[0] in topics():
        click.echo(topics()[words[0]], nl=False)
        return
    context = ctx.find_root()
    for word in words:
        group = context.command
        if not isinstance(group, click.Group):
            raise click.UsageError(f"'{context.command_path}' has no command '{word}'")
        name, command, _ = group.resolve_command(context, [word])
        assert command is not None
        context = click.Context(command, info_name=name, parent=context)
    click.echo(context.get_help())
