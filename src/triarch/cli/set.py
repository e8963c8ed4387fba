"""`set` and `unset`: what is said of a machine."""

from __future__ import annotations

from collections.abc import Sequence

import click

from triarch.cli.arguments import completes, examples, machine_argument
from triarch.cli.output import plain
from triarch.cli.progress import finish
from triarch.cli.session import Session
from triarch.cli.settings import split_words
from triarch.errors import Invalid
from triarch.model.machine import SetMachine, SettingChange

PROFILES = "profiles"

_check_option = click.option(
    "--dry-run", "--check", "check", is_flag=True, help="Only say what would change; change nothing."
)


@click.command(
    "set",
    short_help="Change settings of a machine.",
    epilog=examples(
        "triarch set web memory=2G cpus=1.5",
        "triarch set web label.role=front env.LANG=C.UTF-8 restart=on-failure",
        "triarch set web health.http=80/ready health.interval=10s --dry-run",
        "triarch set web profiles=base,front",
        "triarch help settings",
    ),
)
@machine_argument()
@click.argument("words", metavar="KEY=VALUE...", nargs=-1, required=True, shell_complete=completes("settings"))
@_check_option
@click.pass_obj
def set_command(session: Session, name: str, words: tuple[str, ...], check: bool) -> None:
    """Change settings of a machine: at once where that can be, else from its next start on.

    If one change cannot be made, none is.
    """
    values = split_words(words)
    profiles = values.pop(PROFILES, None)
    request = SetMachine(
        values=values, profiles=None if profiles is None else tuple(word for word in profiles.split(",") if word)
    )
    _set(session, name, request, check=check)


@click.command(
    "unset",
    short_help="Forget settings of a machine.",
    epilog=examples("triarch unset web memory", "triarch unset web label.role env.LANG", "triarch unset web health"),
)
@machine_argument()
@click.argument("keys", metavar="KEY...", nargs=-1, required=True, shell_complete=completes("settings"))
@_check_option
@click.pass_obj
def unset_command(session: Session, name: str, keys: tuple[str, ...], check: bool) -> None:
    """Forget what was said of a machine, so that its profiles count, or what it has by itself."""
    if any("=" in key for key in keys):
        raise Invalid("unset takes keys without a value", hint=f"triarch unset {name} {keys[0].partition('=')[0]}")
    profiles = () if PROFILES in keys else None
    request = SetMachine(unset=tuple(key for key in keys if key != PROFILES), profiles=profiles)
    _set(session, name, request, check=check)


def _set(session: Session, name: str, request: SetMachine, *, check: bool) -> None:
    client = session.client
    if check:
        print_changes(client.check_set(name, request))
        return
    operation = finish(client, client.set(name, request))
    for line in (operation.result or "").split("; "):
        print(plain(line))


def print_changes(changes: Sequence[SettingChange]) -> None:
    """One line each, as a difference is written."""
    if not changes:
        print("nothing would change")
    for change in changes:
        old, new = change.old or "not set", change.new or "not set"
        print(plain(f"{change.key}: {old} → {new}" + ("" if change.live else " at the next start")))
