"""`apply`: make what there is what the files want."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from triarch.cli.arguments import examples
from triarch.cli.output import plain, style
from triarch.cli.session import Session
from triarch.errors import Error, Invalid
from triarch.model.site import read_site
from triarch.model.site_plan import Action, Change, Field, Noun, Present, plan
from triarch.model.yaml_tree import MAX_BYTES, File, read_file

if TYPE_CHECKING:
    from triarch.cli.site_changes import SiteChanges
    from triarch.client import Client

_SIGNS = {Action.CREATE: ("+", "green"), Action.UPDATE: ("~", "yellow"), Action.DELETE: ("-", "red")}
_DONE = {Action.CREATE: "created", Action.UPDATE: "updated", Action.DELETE: "deleted"}
STANDARD_INPUT = "-"
POOL = "default"


@click.command(
    "apply",
    short_help="Make what there is what a site file wants.",
    epilog=examples(
        "triarch apply -f site.yaml --dry-run",
        "triarch apply -f site.yaml -f more.yaml",
        "triarch apply -f site.yaml --prune -y",
        "triarch site export | triarch apply -f -",
    ),
)
@click.option(
    "-f", "--file", "paths", metavar="FILE", multiple=True, required=True, help="A site file; - is standard input."
)
@click.option("--dry-run", is_flag=True, help="Only show the difference; change nothing.")
@click.option("--prune", is_flag=True, help="Delete what this site made and wants no more; never protected machines.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask before anything is deleted.")
@click.pass_obj
def apply_command(session: Session, paths: tuple[str, ...], dry_run: bool, prune: bool, yes: bool) -> int:
    """Show the difference between site files and what there is, and make it none.

    What is as it should be is left alone. One object that fails does not keep others from it, but those that need it.
    """
    site = read_site([_read(path) for path in paths])
    if prune and not site.name:
        raise Invalid("--prune needs to know what is the site's own: the files name no site", hint="site: NAME")
    client = session.client
    present = look(client)
    changes = plan(site, present, prune=prune)
    _show(changes)
    if dry_run:
        return 1 if any(change.refusal for change in changes) else 0
    if not any(change.changes for change in changes):
        return 0
    if any(change.action is Action.DELETE for change in changes) and not yes:
        _ask(changes)
    from triarch.cli.site_changes import SiteChanges

    base = Path(paths[0]).parent if paths[0] != STANDARD_INPUT else Path()
    return carry_out(SiteChanges(client, site, present, base), changes)


def _read(path: str) -> File:
    if path == STANDARD_INPUT:
        return read_file("standard input", sys.stdin.buffer.read(MAX_BYTES + 1))
    with Path(path).open("rb") as file:
        return read_file(path, file.read(MAX_BYTES + 1))


def look(client: Client) -> Present:
    """All that there is: one call a noun, whatever their number."""
    return Present(
        templates=client.templates(),
        networks=client.networks.list(),
        profiles=client.profiles.list(),
        machines=client.machines(),
        pools=(POOL,),
    )


def _ask(changes: tuple[Change, ...]) -> None:
    names = [f"{change.noun.value} {change.name}" for change in changes if change.action is Action.DELETE]
    if not sys.stdin.isatty():
        raise Invalid(f"{', '.join(names)} would be deleted: that needs --yes where nobody can be asked")
    click.confirm(f"Delete {', '.join(names)}?", abort=True, err=True)


# -- showing


def _show(changes: tuple[Change, ...]) -> None:
    for change in changes:
        if change.changes:
            print("\n".join(_lines(change)))
    counts = {action: sum(change.action is action for change in changes) for action in Action}
    words = [f"{counts[action]} to {action.value}" for action in _SIGNS if counts[action]]
    print(", ".join([*words, f"{counts[Action.UNCHANGED]} unchanged"]), flush=True)


def _lines(change: Change) -> list[str]:
    sign, color = _SIGNS.get(change.action, ("!", "red"))
    lines = [style(plain(f"{sign} {change.noun.value} {change.name}"), color, sys.stdout)]
    lines += [f"    {plain(_field(change, field))}" for field in change.fields]
    if change.refusal is not None:
        lines.append(style(plain(f"    cannot be: {change.refusal}"), "red", sys.stdout))
    return lines


def _field(change: Change, field: Field) -> str:
    if change.action is Action.CREATE:
        return f"{field.key}: {field.new}"
    if field.new is None:
        return f"{field.key}: {field.old} → not set" if change.action is Action.UPDATE else f"{field.key}: {field.old}"
    return f"{field.key}: {field.old or 'not set'} → {field.new}"


# -- doing


def carry_out(doing: SiteChanges, changes: tuple[Change, ...]) -> int:
    """The exit code."""
    from triarch.cli import exit_codes
    from triarch.cli.app import complain

    failed: set[tuple[Noun, str]] = set()
    for change in changes:
        if not change.changes:
            continue
        what = f"{change.noun.value} {change.name}"
        missing = [need for need in change.needs if need in failed]
        try:
            if change.refusal is not None:
                raise Invalid(change.refusal)
            if missing:
                noun, name = missing[0]
                raise Invalid(f"it needs {noun.value} {name}, which failed")
            note = doing.carry_out(change)
            print(plain(f"{_DONE[change.action]} {what}" + (f": {note}" if note else "")), flush=True)
        except Error as error:
            failed.add((change.noun, change.name))
            complain(f"{what}: {error.message}", error.hint)
    for line in doing.moved():
        print(plain(line), file=sys.stderr)
    return exit_codes.ERROR if failed else 0
