"""`set` and `unset`: what is said of a machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click
import msgspec

from triarch.cli.arguments import completes, examples, machine_argument
from triarch.cli.output import Column, plain, print_rows
from triarch.cli.progress import finish
from triarch.cli.session import Session
from triarch.cli.settings import split_words
from triarch.errors import Invalid
from triarch.model.machine import MachineView, SetMachine, SettingChange

if TYPE_CHECKING:
    from triarch.client import Client

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


class SettingRow(msgspec.Struct, frozen=True):
    """A setting that a machine has, and where it comes from."""

    key: str
    value: str
    source: str


_SETTING_COLUMNS = (
    Column[SettingRow]("SETTING", lambda row: row.key),
    Column[SettingRow]("VALUE", lambda row: row.value),
    Column[SettingRow]("FROM", lambda row: row.source),
)


def print_settings(client: Client, view: MachineView, output_format: str) -> None:
    """Everything that is said of a machine: by itself (`machine`) or by a profile of its."""
    from triarch.model.setting_text import find_key, write_settings
    from triarch.model.settings import add_up

    profiles = {profile.name: profile.settings for profile in client.profiles.list()} if view.profiles else {}
    whole = add_up((*(profiles[name] for name in view.profiles if name in profiles), view.own))
    sources = {origin.key: origin.source for origin in view.origins}
    rows = []
    for setting in write_settings(whole):
        named = find_key(setting.key)
        field = f"{named.top}.{named.part}" if named.part else named.top
        rows.append(SettingRow(setting.key, setting.text, sources.get(field, "")))
    print_rows(rows, _SETTING_COLUMNS, output_format)


def print_changes(changes: Sequence[SettingChange]) -> None:
    """One line each, as a difference is written."""
    if not changes:
        print("nothing would change")
    for change in changes:
        old, new = change.old or "not set", change.new or "not set"
        print(plain(f"{change.key}: {old} → {new}" + ("" if change.live else " at the next start")))
