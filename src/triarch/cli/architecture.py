"""Commands about architectures."""

from __future__ import annotations

import click

from triarch.cli.arguments import NounGroup, completes, examples
from triarch.cli.listing import Listing, list_options
from triarch.cli.output import Column
from triarch.cli.session import Session
from triarch.model.driver import Architecture

COLUMNS = (
    Column[Architecture]("NAME", lambda each: each.name),
    Column[Architecture](
        "AVAILABLE",
        lambda each: "yes" if each.available else "no",
        color=lambda each: "green" if each.available else "yellow",
    ),
    Column[Architecture]("KIND", lambda each: each.kind.value),
    Column[Architecture]("VERSION", lambda each: each.version or "-", machine_value=lambda each: each.version),
    Column[Architecture]("REASON", lambda each: each.reason or "-", machine_value=lambda each: each.reason),
)
MORE_COLUMNS = (
    Column[Architecture]("CAPABILITIES", lambda each: " ".join(each.capabilities)),
    Column[Architecture]("HINT", lambda each: each.hint or ""),
)


@click.group(
    "architecture",
    cls=NounGroup,
    epilog=examples("triarch architecture list", "triarch architecture list --refresh"),
)
def architecture_command() -> None:
    """Show what machines can run as on this host."""


@architecture_command.command(
    "list",
    epilog=examples(
        "triarch architecture list",
        "triarch architecture list --columns name,capabilities",
        "triarch architecture list available=yes -q",
    ),
)
@list_options(COLUMNS, MORE_COLUMNS, complete=completes("architectures"))
@click.option("--refresh", is_flag=True, help="Try them again instead of remembering.")
@click.pass_obj
def architecture_list(session: Session, listing: Listing[Architecture], refresh: bool) -> None:
    """List architectures, whether they can be had here, and why not."""
    listing.print(session.client.architectures(refresh=refresh))
