"""Commands about templates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from triarch.cli.arguments import NounGroup, completes, examples, template_argument
from triarch.cli.dry_run import dry_run_option, would
from triarch.cli.listing import Listing, list_options
from triarch.cli.output import Column, age, join, output_option, plain, print_record
from triarch.cli.progress import each, finish
from triarch.cli.session import Session
from triarch.errors import InUse
from triarch.model.request import BuildTemplate
from triarch.model.resources import format_size
from triarch.model.template import Init, Template

if TYPE_CHECKING:
    from triarch.client import Client


@click.group(
    "template",
    cls=NounGroup,
    epilog=examples("triarch template build bookworm", "triarch template list"),
)
def template_command() -> None:
    """Build, import, list and delete templates."""


COLUMNS = (
    Column[Template]("NAME", lambda template: template.ref),
    Column[Template]("OS", lambda template: template.os_name or "-", machine_value=lambda template: template.os_name),
    Column[Template]("INIT", lambda template: template.init.value),
    Column[Template](
        "SIZE",
        lambda template: format_size(template.size_bytes),
        right=True,
        machine_value=lambda template: str(template.size_bytes),
    ),
    Column[Template](
        "CREATED",
        lambda template: age(template.created_at),
        machine_value=lambda template: template.created_at.isoformat(),
    ),
)

INFO_COLUMNS = (
    Column[Template]("Name", lambda template: template.name),
    Column[Template]("Level", lambda template: str(template.level)),
    Column[Template]("Digest", lambda template: template.digest),
    Column[Template]("OS", lambda template: template.os_name or "-"),
    Column[Template]("Init", lambda template: template.init.value),
    Column[Template]("Command", lambda template: join(template.command) or "-"),
    Column[Template]("Size", lambda template: format_size(template.size_bytes)),
    Column[Template]("Layers", lambda template: " ".join(layer.digest[:12] for layer in template.layers)),
    Column[Template]("Source", lambda template: template.source or "-"),
    Column[Template]("Created", lambda template: age(template.created_at)),
)


MORE_COLUMNS = (
    Column[Template]("LEVEL", lambda template: str(template.level)),
    Column[Template]("DIGEST", lambda template: template.digest),
    Column[Template]("LAYERS", lambda template: str(len(template.layers)), right=True),
    Column[Template]("SOURCE", lambda template: template.source or "-", machine_value=lambda t: t.source),
)


@template_command.command(
    "list", epilog=examples("triarch template list", "triarch template list 'book*' -o json", "triarch template ls -q")
)
@list_options(COLUMNS, MORE_COLUMNS, complete=completes("templates"))
@click.pass_obj
def template_list(session: Session, listing: Listing[Template]) -> None:
    """List templates and their levels."""
    client = session.running_client()
    templates = () if client is None and session.never_used else (client or session.client).templates()
    listing.print(templates)


@template_command.command(
    "info", epilog=examples("triarch template info bookworm", "triarch template info bookworm@2 -o yaml")
)
@template_argument()
@output_option
@click.pass_obj
def template_info(session: Session, template: str, output_format: str) -> None:
    """Show all about one template."""
    print_record(session.client.template(template), INFO_COLUMNS, output_format)


@template_command.command(
    "build",
    epilog=examples(
        "triarch template build bookworm",
        "triarch template build web --suite bookworm --packages nginx,curl",
    ),
)
@click.argument("name")
@click.option("--suite", default="bookworm", show_default=True, help="Debian suite.")
@click.option("--packages", metavar="A,B", multiple=True, help="Packages besides what a system machine needs.")
@click.option("--mirror", metavar="URL", help="Where to get the packages.")
@click.option(
    "--init",
    type=click.Choice([init.value for init in Init]),
    default="system",
    show_default=True,
    help="What its machines run first.",
)
@click.pass_obj
def template_build(
    session: Session, name: str, suite: str, packages: tuple[str, ...], mirror: str | None, init: str
) -> None:
    """Build a Debian tree with mmdebstrap."""
    names = tuple(word for text in packages for word in text.replace(",", " ").split())
    request = BuildTemplate(name=name, suite=suite, packages=names, mirror=mirror, init=Init(init))
    finish(session.client, session.client.build_template(request))
    _print_made(session, name)


@template_command.command(
    "import",
    short_help="Make a template from a root file system archive.",
    epilog=examples("triarch template import alpine alpine-rootfs.tar.gz"),
)
@click.argument("name")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.pass_obj
def template_import(session: Session, name: str, file: Path) -> None:
    """Make a template from a root file system archive (tar, also .gz, .xz, .zst)."""
    finish(session.client, session.client.import_template(name, file))
    _print_made(session, name)


def _print_made(session: Session, name: str) -> None:
    template = session.client.template(name)
    print(f"template {template.ref}  {plain(template.os_name) or 'unknown system'}  {format_size(template.size_bytes)}")


@template_command.command(
    "delete", epilog=examples("triarch template delete old", "triarch template delete bookworm@1 --dry-run")
)
@click.argument("templates", metavar="TEMPLATE...", nargs=-1, required=True, shell_complete=completes("templates"))
@dry_run_option
@click.pass_obj
def template_delete(session: Session, templates: tuple[str, ...], dry_run: bool) -> int:
    """Delete templates, or single levels of them."""
    client = session.client

    def delete(ref: str) -> None:
        if dry_run:
            would("delete", _loss(client, ref))
        else:
            finish(client, client.delete_template(ref))

    return each(templates, delete)


def _loss(client: Client, ref: str) -> str:
    """What goes with a template. Raises `InUse` as its deletion would."""
    chosen = client.template(ref)
    levels = [t for t in client.templates() if t.name == chosen.name and ("@" not in ref or t.level == chosen.level)]
    numbers = {template.level for template in levels}
    users = [v.name for v in client.machines() if v.template.name == chosen.name and v.template.level in numbers]
    if users:
        raise InUse(f"template '{ref}' is in use by '{users[0]}'", hint=f"triarch delete {users[0]}", template=ref)
    size = format_size(sum(template.size_bytes for template in levels))
    return f"template {ref} ({len(levels)} level{'' if len(levels) == 1 else 's'}, {size})"
