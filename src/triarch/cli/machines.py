"""Commands that make and change machines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import click

from triarch.cli.arguments import (
    CommandAfterDashes,
    Number,
    apply_all,
    architecture_option,
    examples,
    machine_argument,
    template_argument,
)
from triarch.cli.dry_run import dry_run_option, would
from triarch.cli.output import output_option, print_record, print_value
from triarch.cli.progress import each, finish
from triarch.cli.session import Session
from triarch.cli.settings import setting_options, settings_of
from triarch.errors import Denied, InUse
from triarch.model.machine import CreateMachine, MachineView, StopMachine, SwitchMachine
from triarch.model.state import Verb, next_state
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
        profiles=values["profiles"],
        settings=settings_of(values),
        start=start,
    )


def _creating(command: Any) -> Any:
    """The options of `launch` and `create`."""
    return apply_all(
        command,
        template_argument(),
        click.argument("name", required=False),
        architecture_option("--as", help="Architecture: container, hosted, kvm, …"),
        setting_options,
        click.option("--app", is_flag=True, help="Run one command (after --, or the template's own) and no init."),
        click.option("--init", type=click.Choice([init.value for init in Init]), help="What runs first."),
    )


@click.command(
    "launch",
    cls=CommandAfterDashes,
    options_metavar="[OPTIONS]",
    epilog=examples(
        "triarch launch bookworm web",
        "triarch launch bookworm db --as hosted --memory 1G --cpus 2",
        "triarch launch bookworm job --app -- /usr/bin/make -C /srv",
    ),
)
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


@click.command(
    "create",
    cls=CommandAfterDashes,
    options_metavar="[OPTIONS]",
    epilog=examples("triarch create bookworm web", "triarch create bookworm db --disk 20G --network none"),
)
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


@click.command("start", epilog=examples("triarch start web", "triarch start db web"))
@machine_argument(many=True)
@click.pass_obj
def start_command(session: Session, names: tuple[str, ...]) -> int:
    """Start machines."""
    client = session.client
    return each(names, lambda name: finish(client, client.start(name)))


_timeout_option = click.option(
    "--timeout", "timeout_seconds", type=Number(0, 86400), metavar="SECONDS", help="Instead of the machine's own (60)."
)


@click.command("stop", epilog=examples("triarch stop web", "triarch stop --timeout 10 --force web db"))
@machine_argument(many=True)
@_timeout_option
@click.option("-f", "--force", is_flag=True, help="Kill it when it takes longer than the timeout.")
@click.pass_obj
def stop_command(session: Session, names: tuple[str, ...], timeout_seconds: float | None, force: bool) -> int:
    """Ask machines to end, and wait until they have."""
    client, request = session.client, StopMachine(timeout_seconds=timeout_seconds, force=force)
    return each(names, lambda name: finish(client, client.stop(name, request)))


@click.command("restart", epilog=examples("triarch restart web", "triarch restart --force web"))
@machine_argument(many=True)
@_timeout_option
@click.option("-f", "--force", is_flag=True, help="Kill it when it takes longer than the timeout.")
@click.pass_obj
def restart_command(session: Session, names: tuple[str, ...], timeout_seconds: float | None, force: bool) -> int:
    """Stop machines and start them again."""
    client, request = session.client, StopMachine(timeout_seconds=timeout_seconds, force=force)
    return each(names, lambda name: finish(client, client.restart(name, request)))


@click.command("kill", epilog=examples("triarch kill web", "triarch kill --dry-run web"))
@machine_argument(many=True)
@dry_run_option
@click.pass_obj
def kill_command(session: Session, names: tuple[str, ...], dry_run: bool) -> int:
    """End machines now, without their consent."""
    client = session.client

    def kill(name: str) -> None:
        if dry_run:
            view = client.machine(name)
            next_state(name, view.state, Verb.KILL)
            would("kill", f"machine {name}, which is {view.state.value}")
        else:
            finish(client, client.kill(name))

    return each(names, kill)


@click.command("pause", epilog=examples("triarch pause web"))
@machine_argument(many=True)
@click.pass_obj
def pause_command(session: Session, names: tuple[str, ...]) -> int:
    """Freeze running machines; they keep their memory."""
    client = session.client
    return each(names, lambda name: finish(client, client.pause(name)))


@click.command("resume", epilog=examples("triarch resume web"))
@machine_argument(many=True)
@click.pass_obj
def resume_command(session: Session, names: tuple[str, ...]) -> int:
    """Let paused machines go on."""
    client = session.client
    return each(names, lambda name: finish(client, client.resume(name)))


@click.command(
    "delete",
    epilog=examples("triarch delete old", "triarch delete --force web db", "triarch delete --dry-run web"),
)
@machine_argument(many=True)
@click.option("-f", "--force", is_flag=True, help="Kill it first where it runs; do it though others depend on it.")
@dry_run_option
@click.pass_obj
def delete_command(session: Session, names: tuple[str, ...], force: bool, dry_run: bool) -> int:
    """Delete machines and what they wrote."""
    client = session.client

    def delete(name: str) -> None:
        if dry_run:
            would("delete", _loss(client.machine(name), () if force else client.machines(), force=force))
        else:
            finish(client, client.delete(name, force=force))

    return each(names, delete)


def _loss(view: MachineView, others: Iterable[MachineView], *, force: bool) -> str:
    """What goes with a machine. Raises what its deletion would."""
    if view.protected:
        raise Denied(
            f"cannot delete machine '{view.name}': it is protected", hint=f"triarch set {view.name} protected=false"
        )
    if not force:
        next_state(view.name, view.state, Verb.DELETE)
    for other in others:
        if view.name in other.depends_on:
            raise InUse(f"cannot delete machine '{view.name}': '{other.name}' depends on it")
    count = view.snapshot_count
    snapshots = f" and {count} snapshot{'' if count == 1 else 's'}" if count else ""
    return f"machine {view.name} ({view.state.value}, {view.template}){snapshots}"


@click.command("rename", epilog=examples("triarch rename web www"))
@machine_argument()
@click.argument("new_name")
@click.pass_obj
def rename_command(session: Session, name: str, new_name: str) -> None:
    """Give a stopped machine another name."""
    finish(session.client, session.client.rename(name, new_name))


@click.command(
    "switch",
    short_help="Run a machine under another architecture.",
    epilog=examples("triarch switch web --to hosted", "triarch switch web --to kvm --check"),
)
@machine_argument()
@architecture_option("--to", required=True, help="The architecture to run under.")
@click.option("--check", is_flag=True, help="Only say whether it would be possible.")
@click.option(
    "--timeout",
    "timeout_seconds",
    type=Number(0, 86400),
    default=60.0,
    metavar="SECONDS",
    help="How long the guest may take to end (60).",
)
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
