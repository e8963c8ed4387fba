"""Commands about profiles."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from triarch.cli.arguments import NounGroup, completes, examples
from triarch.cli.dry_run import dry_run_option, would
from triarch.cli.listing import Listing, list_options
from triarch.cli.output import FORMATS, Column, plain, print_record, print_value
from triarch.cli.progress import each, finish
from triarch.cli.session import Session
from triarch.cli.settings import split_words
from triarch.errors import Error
from triarch.model.setting_text import read_settings, write_settings
from triarch.model.settings import Profile, ProfileView, SetProfile

if TYPE_CHECKING:
    from triarch.client import Client
    from triarch.model.operation import Operation

_profile_argument = click.argument("name", metavar="PROFILE", shell_complete=completes("profiles"))
_words_argument = click.argument("words", metavar="[KEY=VALUE]...", nargs=-1, shell_complete=completes("settings"))


@click.group(
    "profile",
    cls=NounGroup,
    epilog=examples(
        "triarch profile create small memory=512M cpus=1",
        "triarch launch bookworm web --profile small",
        "triarch profile set small memory=1G",
    ),
)
def profile_command() -> None:
    """Settings under a name, for many machines."""


def _settings_line(profile: ProfileView) -> str:
    return " ".join(f"{setting.key}={setting.text}" for setting in write_settings(profile.settings))


COLUMNS = (
    Column[ProfileView]("NAME", lambda profile: profile.name),
    Column[ProfileView]("SETTINGS", lambda profile: _settings_line(profile) or "-", machine_value=_settings_line),
    Column[ProfileView]("USED", lambda profile: str(len(profile.used_by)), right=True),
)
MORE_COLUMNS = (
    Column[ProfileView]("DESCRIPTION", lambda profile: profile.description or "-"),
    Column[ProfileView]("MACHINES", lambda profile: ",".join(profile.used_by) or "-"),
)


@profile_command.command("list", epilog=examples("triarch profile list", "triarch profile ls -q"))
@list_options(COLUMNS, MORE_COLUMNS, complete=completes("profiles"))
@click.pass_obj
def profile_list(session: Session, listing: Listing[ProfileView]) -> None:
    """List profiles."""
    client = session.running_client()
    listing.print(() if client is None and session.never_used else (client or session.client).profiles.list())


@profile_command.command("show", epilog=examples("triarch profile show small", "triarch profile show small -o json"))
@_profile_argument
@click.option("-o", "--output", "output_format", type=click.Choice(FORMATS), default="yaml", help="How to print it.")
@click.pass_obj
def profile_show(session: Session, name: str, output_format: str) -> None:
    """Show a profile, as `edit` and site files have it."""
    profile = session.client.profiles.get(name)
    if output_format == "yaml":
        print(profile_yaml(profile), end="")
    elif output_format == "json":
        print_value(profile, output_format)
    else:
        print_record(profile, (*COLUMNS, *MORE_COLUMNS), output_format)


@profile_command.command(
    "create",
    epilog=examples("triarch profile create small memory=512M cpus=1", "triarch profile create front ports=8080:80"),
)
@click.argument("name", metavar="PROFILE")
@_words_argument
@click.option("--description", default="", help="What it is for.")
@click.pass_obj
def profile_create(session: Session, name: str, words: tuple[str, ...], description: str) -> None:
    """Make a profile."""
    settings = read_settings(split_words(words).items())
    client = session.client
    finish(client, client.profiles.create(Profile(name=name, description=description, settings=settings)))


@profile_command.command(
    "set",
    short_help="Change settings of a profile and its machines.",
    epilog=examples("triarch profile set small memory=1G label.size=small"),
)
@_profile_argument
@_words_argument
@click.option("--description", help="What it is for.")
@click.pass_obj
def profile_set(session: Session, name: str, words: tuple[str, ...], description: str | None) -> None:
    """Change settings of a profile and of all machines that have it, at once where that can be."""
    client = session.client
    request = SetProfile(values=split_words(words), description=description)
    _tell(client, client.profiles.set(name, request))


@profile_command.command("unset", epilog=examples("triarch profile unset small memory label.size"))
@_profile_argument
@click.argument("keys", metavar="KEY...", nargs=-1, required=True, shell_complete=completes("settings"))
@click.pass_obj
def profile_unset(session: Session, name: str, keys: tuple[str, ...]) -> None:
    """Forget settings of a profile."""
    client = session.client
    _tell(client, client.profiles.set(name, SetProfile(unset=keys)))


def _tell(client: Client, operation: Operation) -> None:
    """What became of each machine. Raises `Error` when one could not follow."""
    operation = finish(client, operation)
    lines = (operation.result or "").splitlines()
    told = [line for line in lines if ": " in line]
    for line in told:
        print(f"machine {plain(line)}")


@profile_command.command(
    "edit",
    short_help="Edit a profile in an editor.",
    epilog=examples("triarch profile edit small", "EDITOR=nano triarch profile edit small"),
)
@_profile_argument
@click.pass_obj
def profile_edit(session: Session, name: str) -> None:
    """Edit a profile in an editor; what is wrong is shown there until it is right."""
    client = session.client
    profile = client.profiles.get(name)
    text, complaint = profile_yaml(profile), ""
    while True:
        edited = click.edit(complaint + text, extension=".yaml")
        if edited is None:
            print("nothing changed")
            return
        text = _without_complaint(edited)
        try:
            after = read_profile(name, text)
            if after == _profile_of(profile):
                print("nothing changed")
                return
            _tell(client, client.profiles.replace(after, profile.etag))
            return
        except Error as error:
            if error.code == "stale" or not _is_interactive():
                raise
            complaint = f"{COMPLAINT} {error.message}\n"


COMPLAINT = "#!"


def _without_complaint(text: str) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith(COMPLAINT))


def _is_interactive() -> bool:
    import sys

    return sys.stdin.isatty()


def _profile_of(view: ProfileView) -> Profile:
    return Profile(name=view.name, description=view.description, settings=view.settings)


@profile_command.command(
    "delete", epilog=examples("triarch profile delete small", "triarch profile rm small --dry-run")
)
@click.argument("names", metavar="PROFILE...", nargs=-1, required=True, shell_complete=completes("profiles"))
@dry_run_option
@click.pass_obj
def profile_delete(session: Session, names: tuple[str, ...], dry_run: bool) -> int:
    """Delete profiles that no machine has."""
    client = session.client
    if dry_run:
        for name in names:
            client.profiles.get(name)
            would("delete", f"profile {name}")
        return 0
    return each(names, lambda name: finish(client, client.profiles.delete(name)))


def profile_yaml(profile: Profile) -> str:
    """As site files have it. The settings' own `description` is that of machines."""
    from triarch.model.site import profile_tree
    from triarch.model.yaml_tree import write_yaml

    return write_yaml(profile_tree(profile)) if profile_tree(profile) else "# nothing is set yet\n"


def read_profile(name: str, text: str) -> Profile:
    """Raises `Invalid` that names the line."""
    from triarch.model.site import profile_at
    from triarch.model.yaml_tree import read_file

    return profile_at(read_file(name, text.encode()), name)
