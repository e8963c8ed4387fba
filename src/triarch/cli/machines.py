"""Commands that make and change machines."""

from __future__ import annotations

from typing import Any

import click

from triarch.cli.arguments import (
    CommandAfterDashes,
    Number,
    apply_all,
    machine_argument,
)
from triarch.cli.output import output_option, print_record, print_value
from triarch.cli.progress import each, finish
from triarch.cli.session import Session
from triarch.cli.settings import setting_options, settings_of
from triarch.model.machine import CreateMachine, MachineView, StopMachine, SwitchMachine
from triarch.model.template import Init


def _creation(ctx: click.Context, values: dict[str, Any], *, start: bool) -> CreateMachine:
    command: tuple[str, ...] = ctx.meta.get(CommandAfterDashes.KEY, ())
    init = Init.APP if values["app"] else Init(values["init"]) if values["init"] else None
    return CreateMachine(
        template=values["template"],
        name=values["name"],
        architecture=values["architecture"],
        init=init,
        command=command,
        settings=settings_of(values),
        start=start,
    )


def _creating(command: Any) -> Any:
    """The options of `launch` and `create`."""
    return apply_all(
        command,
        click.argument("template"),
        click.argument("name", required=False),
        click.option("--as", "architecture", metavar="ARCH", help="Architecture: container, hosted, kvm, …"),
        setting_options,
        click.option("--app", is_flag=True, help="Run one command (after --, or the template's own) and no init."),
        click.option("--init", type=click.Choice([init.value for init in Init]), help="What runs first."),
    )


@click.command("launch", cls=CommandAfterDashes, options_metavar="[OPTIONS]")
@_creating
@output_option
@click.pass_context
def launch_command(ctx: click.Context, /, output_format: str, **values: Any) -> None:
    """Create a machine from TEMPLATE and start it."""
    view = _create(ctx, values, start=True)
    if output_format == "table":
        where = f" at {view.address}" if view.address else ""
        print(f"machine {view.name} runs as {view.architecture}{where}")
    else:
        _print_machine(view, output_format)


@click.command("create", cls=CommandAfterDashes, options_metavar="[OPTIONS]")
@_creating
@output_option
@click.pass_context
def create_command(ctx: click.Context, /, output_format: str, **values: Any) -> None:
    """Create a machine from TEMPLATE and leave it stopped."""
    view = _create(ctx, values, start=False)
    if output_format == "table":
        print(f"machine {view.name} is created as {view.architecture}")
    else:
        _print_machine(view, output_format)


def _print_machine(view: MachineView, output_format: str) -> None:
    from triarch.cli.look import LIST_COLUMNS

    if output_format == "csv":
        print_record(view, LIST_COLUMNS, "csv")
    else:
        print_value(view, output_format)


def _create(ctx: click.Context, values: dict[str, Any], *, start: bool) -> MachineView:
    session: Session = ctx.obj
    request = _creation(ctx, values, start=start)
    operation = finish(session.client, session.client.create(request))
    return session.client.machine(operation.target.partition("/")[2])


@click.command("start")
@machine_argument(many=True)
@click.pass_obj
def start_command(session: Session, names: tuple[str, ...]) -> int:
    """Start machines."""
    client = session.client
    return each(names, lambda name: finish(client, client.start(name)))


_timeout_option = click.option(
    "--timeout", "timeout_seconds", type=Number(0, 86400), metavar="SECONDS", help="Instead of the machine's own (60)."
)


@click.command("stop")
@machine_argument(many=True)
@_timeout_option
@click.option("-f", "--force", is_flag=True, help="Kill it when it takes longer than the timeout.")
@click.pass_obj
def stop_command(session: Session, names: tuple[str, ...], timeout_seconds: float | None, force: bool) -> int:
    """Ask machines to end, and wait until they have."""
    client, request = session.client, StopMachine(timeout_seconds=timeout_seconds, force=force)
    return each(names, lambda name: finish(client, client.stop(name, request)))


@click.command("restart")
@machine_argument(many=True)
@_timeout_option
@click.option("-f", "--force", is_flag=True, help="Kill it when it takes longer than the timeout.")
@click.pass_obj
def restart_command(session: Session, names: tuple[str, ...], timeout_seconds: float | None, force: bool) -> int:
    """Stop machines and start them again."""
    client, request = session.client, StopMachine(timeout_seconds=timeout_seconds, force=force)
    return each(names, lambda name: finish(client, client.restart(name, request)))


@click.command("kill")
@machine_argument(many=True)
@click.pass_obj
def kill_command(session: Session, names: tuple[str, ...]) -> int:
    """End machines now, without their consent."""
    client = session.client
    return each(names, lambda name: finish(client, client.kill(name)))


@click.command("pause")
@machine_argument(many=True)
@click.pass_obj
def pause_command(session: Session, names: tuple[str, ...]) -> int:
    """Freeze running machines; they keep their memory."""
    client = session.client
    return each(names, lambda name: finish(client, client.pause(name)))


@click.command("resume")
@machine_argument(many=True)
@click.pass_obj
def resume_command(session: Session, names: tuple[str, ...]) -> int:
    """Let paused machines go on."""
    client = session.client
    return each(names, lambda name: finish(client, client.resume(name)))


@click.command("delete")
@machine_argument(many=True)
@click.option("-f", "--force", is_flag=True, help="Kill it first where it runs.")
@click.pass_obj
def delete_command(session: Session, names: tuple[str, ...], force: bool) -> int:
    """Delete machines and what they wrote."""
    client = session.client
    return each(names, lambda name: finish(client, client.delete(name, force=force)))


@click.command("rename")
@machine_argument()
@click.argument("new_name")
@click.pass_obj
def rename_command(session: Session, name: str, new_name: str) -> None:
    """Give a stopped machine another name."""
    finish(session.client, session.client.rename(name, new_name))


@click.command("switch", short_help="Run a machine under another architecture.")
@machine_argument()
@click.option("--to", "architecture", metavar="ARCH", required=True, help="The architecture to run under.")
@click.option("--check", is_flag=True, help="Only say whether it would be possible.")
@click.option("--timeout", "timeout_seconds", type=Number(0, 86400), default=60.0, metavar="SECONDS")
@click.pass_obj
def switch_command(session: Session, name: str, architecture: str, check: bool, timeout_seconds: float) -> None:
    """Run a machine under another architecture; nothing is converted and nothing is copied."""
    client = session.client
    before = client.machine(name)
    request = SwitchMachine(architecture=architecture, check=check, timeout_seconds=timeout_seconds)
    operation = client.switch(name, request)
    if operation is None:
        print(f"machine {name} can be switched from {before.architecture} to {architecture}")
        return
    finish(client, operation)
    after = client.machine(name)
    print(f"machine {name} is now {after.architecture}, {after.state.value} (it was {before.architecture})")
