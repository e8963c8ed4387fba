"""The manual, made from the commands themselves: `python -m triarch.cli.manual` for man pages and docs/CLI.md."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import click

import triarch
from triarch.cli.app import PROGRAM, cli
from triarch.cli.arguments import examples_of
from triarch.cli.help import topics


def pages() -> Iterator[click.Context]:
    """The context of every command, `triarch` first."""
    yield from _pages(click.Context(cli, info_name=PROGRAM))


def _pages(context: click.Context) -> Iterator[click.Context]:
    yield context
    group = context.command
    if isinstance(group, click.Group):
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            assert command is not None
            yield from _pages(click.Context(command, info_name=name, parent=context))


def _usage(context: click.Context) -> str:
    return " ".join((context.command_path, *context.command.collect_usage_pieces(context)))


def _paragraphs(context: click.Context) -> list[str]:
    text = (context.command.help or "").strip()
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n") if paragraph.strip()]


def _options(context: click.Context) -> list[tuple[str, str]]:
    records = (parameter.get_help_record(context) for parameter in context.command.get_params(context))
    return [record for record in records if record is not None and record[1]]


def _subcommands(context: click.Context) -> list[tuple[str, str]]:
    group = context.command
    if not isinstance(group, click.Group):
        return []
    found = ((name, group.get_command(context, name)) for name in group.list_commands(context))
    return [(name, command.get_short_help_str(limit=200)) for name, command in found if command is not None]


# -- Markdown


def markdown() -> str:
    """All commands as one page."""
    parts = [
        "# Command reference",
        "Made by `python -m triarch.cli.manual --markdown` from the commands' own help; do not edit it.",
        "## Exit codes",
        f"```\n{topics()['exit-codes']}```",
        "## Filters of lists",
        f"```\n{topics()['filters']}```",
    ]
    for context in pages():
        parts += _section(context)
    return "\n\n".join(parts) + "\n"


def _section(context: click.Context) -> list[str]:
    parts = [f"## {context.command_path}", f"```\n{_usage(context)}\n```", *map(_escape, _paragraphs(context))]
    if subcommands := _subcommands(context):
        parts.append("\n".join(f"- `{name}`: {_escape(text)}" for name, text in subcommands))
    if options := _options(context):
        parts.append("\n".join(f"- `{form}`: {_escape(text)}" for form, text in options))
    if examples := examples_of(context.command):
        parts.append("```sh\n" + "\n".join(examples) + "\n```")
    return parts


def _escape(text: str) -> str:
    return text.replace("<", "\\<").replace("*", "\\*")


# -- man(7)


def man_page(context: click.Context) -> str:
    """One command as a man page of section 1."""
    name = page_name(context)
    summary = context.command.get_short_help_str(limit=200).rstrip(".")
    lines = [
        f'.TH "{name.upper()}" "1" "" "Triarch {triarch.__version__}" "Triarch"',
        ".SH NAME",
        f"{_roff(name)} \\- {_roff(summary)}",
        ".SH SYNOPSIS",
        f".B {_roff(context.command_path)}",
        _roff(" ".join(context.command.collect_usage_pieces(context))),
        ".SH DESCRIPTION",
    ]
    for paragraph in _paragraphs(context):
        lines += [".PP", _roff(paragraph)]
    for title, records in (("COMMANDS", _subcommands(context)), ("OPTIONS", _options(context))):
        lines += [f".SH {title}"] if records else []
        for form, text in records:
            lines += [".TP", f"\\fB{_roff(form)}\\fR", _roff(text)]
    if found := examples_of(context.command):
        lines += [".SH EXAMPLES", ".nf", *map(_roff, found), ".fi"]
    if context.parent is None:
        lines += [".SH EXIT STATUS", ".nf", *map(_roff, topics()["exit-codes"].rstrip().splitlines()), ".fi"]
    lines += [".SH SEE ALSO", *_see_also(context)]
    return "\n".join(lines) + "\n"


def page_name(context: click.Context) -> str:
    """`triarch-template-build`."""
    return context.command_path.replace(" ", "-")


def _see_also(context: click.Context) -> list[str]:
    if context.parent is not None:
        return [f".BR {_roff(page_name(context.parent))} (1)"]
    names = [f"{PROGRAM}-{name}" for name, _ in _subcommands(context)]
    return [f".BR {_roff(name)} (1){',' if name is not names[-1] else ''}" for name in names]


def _roff(text: str) -> str:
    """Text of which nothing is an escape or a request (groff_man(7))."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("\n", " ")
    text = "".join(letter if letter.isascii() else f"\\[u{ord(letter):04X}]" for letter in text)
    return f"\\&{text}" if text.startswith((".", "'")) else text


def write_man_pages(directory: Path) -> int:
    """Write `NAME.1` for every command into `directory`; how many."""
    directory.mkdir(parents=True, exist_ok=True)
    count = 0
    for context in pages():
        (directory / f"{page_name(context)}.1").write_text(man_page(context))
        count += 1
    return count


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m triarch.cli.manual", description="Make the manual.")
    parser.add_argument("--markdown", action="store_true", help="print docs/CLI.md")
    parser.add_argument("--man", metavar="DIR", type=Path, help="write a man page for each command into DIR")
    options = parser.parse_args(argv)
    if options.markdown:
        sys.stdout.write(markdown())
    if options.man:
        print(f"{write_man_pages(options.man)} man pages in {options.man}")
    if not options.markdown and not options.man:
        parser.error("one of --markdown and --man is needed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
