"""Commands about site files."""

from __future__ import annotations

import copy

import click

from triarch.cli.apply import apply_command, look
from triarch.cli.arguments import NounGroup, completes, examples
from triarch.cli.output import print_value
from triarch.cli.session import Session
from triarch.model.site import site_tree
from triarch.model.site_plan import site_of


@click.group(
    "site",
    cls=NounGroup,
    epilog=examples("triarch site export > site.yaml", "triarch site apply -f site.yaml --dry-run"),
)
def site_command() -> None:
    """What there is as a file, and what a file wants (see apply)."""


@site_command.command(
    "export",
    short_help="Print what there is as a site file.",
    epilog=examples("triarch site export > site.yaml", "triarch site export web db", "triarch site export -o json"),
)
@click.argument("names", metavar="[NAME]...", nargs=-1, shell_complete=completes("machines"))
@click.option(
    "-o", "--output", "output_format", type=click.Choice(["yaml", "json"]), default="yaml", help="How to print it."
)
@click.pass_obj
def site_export(session: Session, names: tuple[str, ...], output_format: str) -> None:
    """Print machines and what they stand on, all without NAMEs, as a site file that applies to no change."""
    print_site(session, names, output_format)


def print_site(session: Session, names: tuple[str, ...], output_format: str) -> None:
    """Raises `NotFound` for a machine that there is not."""
    client = session.client
    for name in names:
        client.machine(name)
    tree = site_tree(site_of(look(client), names))
    if output_format == "json":
        print_value(tree, "json")
        return
    from triarch.model.yaml_tree import write_yaml

    print(write_yaml(tree), end="")


_apply = copy.copy(apply_command)
_apply.epilog = examples("triarch site apply -f site.yaml --dry-run", "triarch site apply -f site.yaml --prune -y")
site_command.add_command(_apply, "apply")
