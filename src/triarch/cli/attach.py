"""Commands that connect this terminal to a machine."""

from __future__ import annotations

import os
import sys
from typing import Any

import click
import msgspec

from triarch.cli import terminal
from triarch.cli.arguments import (
    CommandAfterName,
    Number,
    OwnExitCode,
    SizeType,
    architecture_option,
    examples,
    machine_argument,
    template_argument,
    without_dashes,
)
from triarch.cli.session import Session
from triarch.cli.settings import parse_environment, setting_options, settings_of
from triarch.errors import Failed
from triarch.model.command import MAX_TIMEOUT_SECONDS
from triarch.model.driver import TIMED_OUT_CODE, ExecRequest, Resize
from triarch.model.machine import CreateMachine, Exit
from triarch.model.settings import Settings
from triarch.model.stream import HISTORY_BYTES, MAX_HISTORY_BYTES, ConsoleRequest, RunRequest

_terminal_option = click.option(
    "-t/-T",
    "--tty/--no-tty",
    "with_terminal",
    default=None,
    help="Give it a terminal, or not (default: when a person sits at both ends).",
)
_input_options = (
    click.option("-i", "--interactive", is_flag=True, help="Pass standard input on (always so, unless -n)."),
    click.option("-n", "--no-input", is_flag=True, help="Give it an empty standard input."),
)


def _code(end: Exit | None) -> int:
    """The guest's exit code. Raises `Failed` where nobody knows it."""
    if end is None or end.code is None:
        reason = f": {end.reason}" if end is not None and end.reason else ""
        raise Failed(f"the command ended without an exit code{reason}")
    return end.code


_user_option = click.option(
    "-u", "--user", metavar="USER", default="0", help="Whom it runs as: NAME|UID[:GROUP|GID], looked up in the machine."
)
_directory_option = click.option("-w", "--cwd", "directory", metavar="DIR", help="Run it in this directory.")
_environment_option = click.option(
    "-e", "--env", "environment", metavar="K=V", multiple=True, help="Environment variable."
)


@click.command(
    "exec",
    cls=CommandAfterName,
    epilog=examples(
        "triarch exec web -- uname -a",
        "triarch exec -t web top",
        "triarch exec --user www-data --cwd /srv web -- sh -c 'ls | wc -l'",
        "triarch exec --timeout 30 web -- make",
    ),
)
@_terminal_option
@_input_options[0]
@_input_options[1]
@_user_option
@_directory_option
@_environment_option
@click.option(
    "--timeout",
    "timeout_seconds",
    metavar="SECONDS",
    type=Number(min=0, min_open=True, max=MAX_TIMEOUT_SECONDS),
    help="End it after so long (SIGTERM, 5 s later SIGKILL) and exit with 124.",
)
@machine_argument()
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def exec_command(
    session: Session, /, with_terminal: bool | None, interactive: bool, no_input: bool, **values: Any
) -> int:
    """Run COMMAND in a running machine and exit with its code."""
    name, command = values["name"], without_dashes(values["command"])
    if not command:
        raise click.UsageError(f"no command for machine '{name}': triarch exec {name} -- COMMAND")
    request = ExecRequest(command=command, timeout_seconds=values["timeout_seconds"])
    return _converse(session, request, values, with_terminal, interactive=not no_input)


@click.command(
    "shell",
    cls=OwnExitCode,
    short_help="A login shell in a running machine.",
    epilog=examples("triarch shell web", "triarch shell --user postgres db"),
)
@_terminal_option
@_user_option
@_directory_option
@_environment_option
@machine_argument()
@click.pass_obj
def shell_command(session: Session, /, with_terminal: bool | None, **values: Any) -> int:
    """Begin the login shell of a user of the machine, at home, and exit with its code."""
    return _converse(session, ExecRequest(login=True), values, with_terminal, interactive=True)


def _converse(
    session: Session, request: ExecRequest, values: dict[str, Any], with_terminal: bool | None, *, interactive: bool
) -> int:
    use_terminal = terminal.is_terminal() if with_terminal is None else with_terminal
    size = terminal.size()
    request = msgspec.structs.replace(
        request,
        terminal=use_terminal,
        columns=size.columns,
        rows=size.lines,
        user=values["user"],
        directory=values["directory"],
        environment=_with_term(parse_environment(values["environment"]), use_terminal),
    )
    with session.client.exec(values["name"], request) as stream:
        end = terminal.Attachment(stream, terminal=use_terminal, interactive=interactive).run()
    if end is not None and end.code == TIMED_OUT_CODE and end.reason:
        print(f"triarch: {end.reason}", file=sys.stderr)
    return _code(end)


def _with_term(environment: dict[str, str], use_terminal: bool) -> dict[str, str]:
    """A program on this terminal must know which kind it is."""
    if use_terminal and "TERM" in os.environ:
        environment.setdefault("TERM", os.environ["TERM"])
    return environment


def _settings(values: dict[str, Any], use_terminal: bool) -> Settings:
    settings = settings_of(values)
    environment = _with_term(dict(settings.environment or {}), use_terminal)
    return msgspec.structs.replace(settings, environment=environment) if environment else settings


@click.command(
    "run",
    cls=CommandAfterName,
    short_help="Run COMMAND in a throw-away machine.",
    epilog=examples(
        "triarch run bookworm -- cat /etc/os-release",
        "triarch run -t bookworm bash",
        "triarch run --as hosted --memory 512M bookworm -- uname -a",
    ),
)
@_terminal_option
@_input_options[0]
@_input_options[1]
@architecture_option("--as", help="Architecture: container, hosted, kvm, …")
@click.option("--name", metavar="NAME", help="Its name while it lives.")
@setting_options
@template_argument()
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
@click.pass_obj
def run_command(
    session: Session, /, with_terminal: bool | None, interactive: bool, no_input: bool, **values: Any
) -> int:
    """Run COMMAND in a throw-away machine, exit with its code, and leave nothing behind."""
    use_terminal = terminal.is_terminal() if with_terminal is None else with_terminal
    size = terminal.size()
    machine = CreateMachine(
        template=values["template"],
        name=values["name"],
        architecture=values["architecture"],
        command=without_dashes(values["command"]),
        profiles=values["profiles"],
        settings=_settings(values, use_terminal),
        ephemeral=True,
    )
    request = RunRequest(
        machine=machine, terminal=Resize(columns=size.columns, rows=size.lines) if use_terminal else None
    )
    with session.client.run(request) as stream:
        return _code(terminal.Attachment(stream, terminal=use_terminal, interactive=not no_input).run())


@click.command(
    "console", epilog=examples("triarch console web", "triarch console --read-only --history 1M --detach-keys none web")
)
@click.option(
    "--detach-keys",
    metavar="KEYS",
    default="ctrl-]",
    show_default=True,
    help="Keys that leave: one, or several after another as ctrl-p,ctrl-q; none for none.",
)
@click.option(
    "--history",
    "history_bytes",
    metavar="SIZE",
    type=SizeType(0),
    default=f"{HISTORY_BYTES >> 10}K",
    show_default=True,
    help="How much of what it said before to show.",
)
@click.option("-r", "--read-only", is_flag=True, help="Only look: what is typed is not passed on.")
@machine_argument()
@click.pass_obj
def console_command(session: Session, name: str, detach_keys: str, history_bytes: int, read_only: bool) -> None:
    """Attach to a machine's console, beside whoever is. Its end is the machine's, or the detach keys."""
    on_terminal = terminal.is_terminal()
    keys = terminal.parse_keys(detach_keys) if on_terminal else b""
    request = ConsoleRequest(history_bytes=min(history_bytes, MAX_HISTORY_BYTES), read_only=read_only)
    with session.client.console(name, request) as stream:
        if on_terminal:
            print(f"console of {name}" + (f", {detach_keys} detaches" if keys else ""), file=sys.stderr)
        if on_terminal and not read_only:
            stream.resize(*terminal.size())
        terminal.Attachment(stream, terminal=on_terminal, detach_keys=keys).run()
    if on_terminal:
        print(file=sys.stderr)
