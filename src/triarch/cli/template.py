"""Commands about templates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from triarch.cli.app import unknown_command
from triarch.cli.output import Column, age, join, output_option, plain, print_record, print_rows
from triarch.cli.progress import each, finish
from triarch.cli.session import Session
from triarch.model.request import BuildTemplate
from triarch.model.resources import format_size
from triarch.model.template import Init, Template

ALIASES = {"ls": "list", "rm": "delete"}


class TemplateGroup(click.Group):
    """With the short names and the suggestions of the commands above it."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, ALIASES.get(cmd_name, cmd_name))

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            raise unknown_command(args[0], "template", (*self.commands, *ALIASES))
        return super().resolve_command(ctx, args)


@click.group("template", cls=TemplateGroup)
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


@template_command.command("list")
@output_option
@click.pass_obj
def template_list(session: Session, output_format: str) -> None:
    """List templates and their levels."""
    client = session.running_client()
    templates = () if client is None and session.never_used else (client or session.client).templates()
    print_rows(templates, COLUMNS, output_format)


@template_command.command("info")
@click.argument("template")
@output_option
@click.pass_obj
def template_info(session: Session, template: str, output_format: str) -> None:
    """Show all about one template."""
    print_record(session.client.template(template), INFO_COLUMNS, output_format)


@template_command.command("build")
@click.argument("name")
@click.option("--suite", default="bookworm", show_default=True, help="Debian suite.")
@click.option("--packages", metavar="A,B", multiple=True, help="Packages besides what a system machine needs.")
@click.option("--mirror", metavar="URL", help="Where to get the packages.")
@click.option("--init", type=click.Choice([init.value for init in Init]), default="system", show_default=True)
@click.pass_obj
def template_build(
    session: Session, name: str, suite: str, packages: tuple[str, ...], mirror: str | None, init: str
) -> None:
    """Build a Debian tree with mmdebstrap."""
    names = tuple(word for text in packages for word in text.replace(",", " ").split())
    request = BuildTemplate(name=name, suite=suite, packages=names, mirror=mirror, init=Init(init))
    finish(session.client, session.client.build_template(request))
    _print_made(session, name)


@template_command.command("import")
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


@template_command.command("delete")
@click.argument("templates", metavar="TEMPLATE...", nargs=-1, required=True)
@click.pass_obj
def template_delete(session: Session, templates: tuple[str, ...]) -> int:
    """Delete templates, or single levels of them."""
    client = session.client
    return each(templates, lambda template: finish(client, client.delete_template(template)))
