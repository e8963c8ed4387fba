"""The command line as a whole: which module has which command, and how errors look and exit."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import click

import triarch
from triarch.cli import exit_codes
from triarch.cli.arguments import examples, laid_out
from triarch.cli.exit_codes import OwnFailure
from triarch.cli.session import Session
from triarch.errors import Error, Invalid
from triarch.model.nearest import did_you_mean, nearest

PROGRAM = "triarch"
NEW_LINE = "\n"

# In the order of the help page: command, module of `triarch.cli`.
COMMANDS: dict[str, str] = {
    "launch": "machines",
    "create": "machines",
    "run": "attach",
    "list": "look",
    "info": "look",
    "top": "top",
    "usage": "usage",
    "exec": "attach",
    "shell": "attach",
    "console": "attach",
    "logs": "watch",
    "start": "machines",
    "stop": "machines",
    "restart": "machines",
    "kill": "machines",
    "pause": "machines",
    "resume": "machines",
    "delete": "machines",
    "rename": "machines",
    "switch": "machines",
    "snapshot": "snapshot",
    "restore": "snapshot",
    "copy": "backup",
    "export": "backup",
    "import": "backup",
    "device": "device",
    "mount": "device",
    "unmount": "device",
    "file": "file",
    "set": "set",
    "unset": "set",
    "network": "network",
    "profile": "profile",
    "apply": "apply",
    "site": "site",
    "template": "template",
    "architecture": "architecture",
    "events": "watch",
    "wait": "watch",
    "doctor": "host",
    "down": "host",
    "version": "host",
    "completion": "host",
    "help": "help",
}
ALIASES = {"ls": "list", "ps": "list", "rm": "delete"}


class LazyGroup(click.Group):
    """Imports the module of the command in use and no other."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        name = ALIASES.get(cmd_name, cmd_name)
        if name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"triarch.cli.{COMMANDS[name]}"), f"{name}_command")
        return laid_out(command)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and args[0] not in COMMANDS and args[0] not in ALIASES:
            raise unknown_command(args[0], "", (*COMMANDS, *ALIASES))
        return super().resolve_command(ctx, args)


def unknown_command(word: str, group: str, known: Sequence[str]) -> Invalid:
    """The error for a mistyped command, with the nearest one as its hint."""
    near = nearest(word, known, 0.5)
    prefix = f"{PROGRAM} {group}".strip()
    return Invalid(
        f"there is no command '{prefix} {word}'{did_you_mean(near)}",
        hint=f"{prefix} {near}" if near else f"{prefix} --help",
    )


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples(
        "triarch template build bookworm",
        "triarch launch bookworm web",
        "triarch exec web -- bash",
        "triarch help exit-codes",
    ),
)
@click.option("--root", metavar="DIR", help="Use the separate instance in DIR (or TRIARCH_ROOT).")
@click.version_option(triarch.__version__, message="triarch %(version)s")
@click.pass_context
def cli(ctx: click.Context, root: str | None) -> None:
    """One machine, any virtualization architecture: containers and VMs from the same two files."""
    ctx.obj = Session(root)


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code; everything that people should read is printed."""
    try:
        code = cli.main(arguments, prog_name=PROGRAM, standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except OwnFailure as failure:
        return _complain(failure.error.message, failure.error.hint, exit_codes.OWN_FAILURE)
    except Error as error:
        return _complain(error.message, error.hint, exit_codes.of(error))
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        return exit_codes.USAGE
    except click.ClickException as error:
        return _complain(*_usage_message(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return exit_codes.INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has gone; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return exit_codes.BROKEN_PIPE
    except UnicodeEncodeError as error:
        return _complain(f"not valid UTF-8: {error.object!r}", None, exit_codes.USAGE)
    except OSError as error:
        return _complain(f"{error.filename or 'system'}: {error.strerror or error}", None, exit_codes.ERROR)
    except Exception as error:
        if os.environ.get("TRIARCH_DEBUG"):
            raise
        return _complain(
            f"internal error: {type(error).__name__}: {error}", "TRIARCH_DEBUG=1 shows more", exit_codes.ERROR
        )


def _usage_message(error: click.ClickException) -> tuple[str, str | None]:
    message = error.format_message().rstrip(".")
    hint = None
    if isinstance(error, click.UsageError) and error.ctx is not None:
        hint = f"{error.ctx.command_path} --help"
    return message[:1].lower() + message[1:], hint


def _complain(message: str, hint: str | None, code: int) -> int:
    complain(message, hint)
    return code


def complain(message: str, hint: str | None) -> None:
    """An error as people read it, on standard error."""
    from triarch.cli.output import plain, style

    sys.stdout.flush()
    print(f"{style('error:', 'red', sys.stderr)} {plain(message.rstrip(), keep=NEW_LINE)}", file=sys.stderr)
    if hint:
        print(f"{style('hint:', 'cyan', sys.stderr)} {plain(hint)}", file=sys.stderr)
