"""Commands about the daemon and the host."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import click
import msgspec

import triarch
from triarch.cli.arguments import examples
from triarch.cli.dry_run import dry_run_option, would
from triarch.cli.output import Column, output_option, print_rows, print_value
from triarch.cli.progress import finish
from triarch.cli.session import Session
from triarch.errors import Denied, Error, Failed
from triarch.model.instance import Instance
from triarch.model.request import Check, CheckStatus
from triarch.model.server import ServerInfo
from triarch.model.state import State

_CHECK_COLORS = {CheckStatus.PASS: "green", CheckStatus.WARN: "yellow", CheckStatus.FAIL: "red"}

COLUMNS = (
    Column[Check]("STATUS", lambda check: check.status.value, color=lambda check: _CHECK_COLORS[check.status]),
    Column[Check]("CHECK", lambda check: check.name),
    Column[Check]("NEEDED FOR", lambda check: check.needed_for or "-", machine_value=lambda check: check.needed_for),
    Column[Check]("DETAIL", lambda check: check.detail),
)
CSV_COLUMNS = (*COLUMNS, Column[Check]("FIX", lambda check: check.fix or ""))


@click.command(
    "doctor", short_help="Check what this host can do.", epilog=examples("triarch doctor", "triarch doctor -o json")
)
@output_option
@click.pass_obj
def doctor_command(session: Session, output_format: str) -> int:
    """Check what this host can do; fails when something is missing that cannot be done without."""
    checks = _checks(session)
    print_rows(checks, CSV_COLUMNS if output_format == "csv" else COLUMNS, output_format)
    fixes = [check for check in checks if check.fix and check.status is not CheckStatus.PASS]
    if fixes and output_format == "table":
        print("\nTo mend:")
        width = max(len(check.name) for check in fixes)
        for check in fixes:
            print(f"  {check.name.ljust(width)}  {check.fix}")
    return 1 if any(check.status is CheckStatus.FAIL for check in checks) else 0


def _checks(session: Session) -> tuple[Check, ...]:
    """From the daemon if one runs; else looked at with the caller's own rights, and no daemon is started for it."""
    try:
        client = session.running_client()
    except Denied:
        client = None
    if client is not None:
        return client.doctor()
    from triarch.cli.start import daemon_argv

    done = subprocess.run(
        daemon_argv(session.root, "--doctor"), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False
    )
    if done.returncode:
        raise Failed("the checks broke off", hint="triarchd --doctor")
    return msgspec.json.decode(done.stdout, type=tuple[Check, ...])


@click.command(
    "down",
    short_help="Stop every machine, clear the host, end the daemon.",
    epilog=examples("triarch down", "triarch down --dry-run", "triarch down --until-boot"),
)
@click.option("--until-boot", is_flag=True, help="Start the machines again when the host has booted.")
@dry_run_option
@click.pass_obj
def down_command(session: Session, until_boot: bool, dry_run: bool) -> None:
    """Stop every machine, clear the host of everything that is not a file of a machine, and end the daemon."""
    client = session.running_client()
    if client is None and session.never_used:
        return
    client = client or session.client
    if dry_run:
        for view in client.machines():
            if view.state in (State.RUNNING, State.PAUSED):
                would("stop", f"machine {view.name}")
        would("clear", f"the host of instance {session.instance.tag} and end its daemon")
        return
    finish(client, client.down(until_boot=until_boot))
    client.wait_closed()
    _wait_ended(session.instance)


def _wait_ended(instance: Instance) -> None:
    """Return when the daemon's process has ended: it holds a lock on its pid file for as long as it lives."""
    try:
        descriptor = os.open(Path(instance.run_dir) / "triarchd.pid", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    os.close(descriptor)


class Versions(msgspec.Struct, frozen=True, omit_defaults=True):
    """What `triarch version` says: of the command, and of the daemon where one runs."""

    client: str
    server: ServerInfo | None = None


@click.command(
    "version", short_help="Show the versions of command and daemon.", epilog=examples("triarch version -o json")
)
@output_option
@click.pass_obj
def version_command(session: Session, output_format: str) -> None:
    """Show the version of the command and, where one runs, of the daemon."""
    try:
        client = session.running_client()
        server = client.server() if client is not None else None
    except Error:
        server = None
    if output_format in ("json", "yaml"):
        print_value(Versions(triarch.__version__, server), output_format)
        return
    rows = [("client", triarch.__version__), ("server", server.version if server is not None else "")]
    if output_format == "csv":
        print_rows(rows, (Column("PART", lambda row: row[0]), Column("VERSION", lambda row: row[1])), "csv")
        return
    print(f"Client: {triarch.__version__}")
    print(f"Server: {f'{server.version} (pid {server.pid}, {server.state_dir})' if server else 'does not run'}")


@click.command(
    "completion",
    short_help="Print the completion script for a shell.",
    epilog=examples(
        'eval "$(triarch completion bash)"',
        "triarch completion zsh > ~/.zfunc/_triarch",
        "triarch completion fish > ~/.config/fish/completions/triarch.fish",
    ),
)
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
@click.pass_context
def completion_command(ctx: click.Context, shell: str) -> None:
    """Print the completion script for a shell."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    sys.stdout.write(kind(ctx.find_root().command, {}, "triarch", "_TRIARCH_COMPLETE").source())
