"""Commands that look at machines."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click
import msgspec

from triarch.cli.arguments import machine_argument
from triarch.cli.output import Column, age, join, output_option, print_record, print_rows
from triarch.cli.session import Session
from triarch.errors import NotFound, Unsupported, WrongState
from triarch.model.driver import Usage
from triarch.model.machine import MachineView
from triarch.model.resources import format_size
from triarch.model.state import State

if TYPE_CHECKING:
    from triarch.client import Client

_STATE_COLORS = {State.RUNNING: "green", State.PAUSED: "yellow", State.FAILED: "red"}


def _state_color(view: MachineView) -> str | None:
    return _STATE_COLORS.get(view.state)


LIST_COLUMNS = (
    Column[MachineView]("NAME", lambda view: view.name),
    Column[MachineView]("STATE", lambda view: view.state.value, color=_state_color),
    Column[MachineView]("ARCH", lambda view: view.architecture),
    Column[MachineView]("TEMPLATE", lambda view: str(view.template)),
    Column[MachineView]("IPV4", lambda view: view.address or "-", machine_value=lambda view: view.address or ""),
)


@click.command("list")
@output_option
@click.option("-q", "--quiet", is_flag=True, help="Print only names.")
@click.pass_obj
def list_command(session: Session, output_format: str, quiet: bool) -> None:
    """List machines (also ls, ps)."""
    views = _machines(session)
    if quiet:
        print("".join(f"{view.name}\n" for view in views), end="")
    else:
        print_rows(views, LIST_COLUMNS, output_format)


def _machines(session: Session) -> tuple[MachineView, ...]:
    client = session.running_client()
    if client is None and session.never_used:
        return ()
    return (client or session.client).machines()


class MachineInfo(MachineView, frozen=True, kw_only=True):
    """A machine and what it uses now; None where it does not run or its architecture does not measure."""

    usage: Usage | None


def _limits(view: MachineView) -> str:
    resources = view.resources
    limits = [
        f"{resources.cpus:g} cpus" if resources.cpus is not None else "",
        f"{format_size(resources.memory_bytes)} memory" if resources.memory_bytes is not None else "",
        f"{resources.pids} pids" if resources.pids is not None else "",
        f"io weight {resources.io_weight}" if resources.io_weight is not None else "",
    ]
    return ", ".join(limit for limit in limits if limit) or "none"


def _last_exit(view: MachineView) -> str:
    if view.last_exit is None:
        return "-"
    code = "unknown code" if view.last_exit.code is None else f"code {view.last_exit.code}"
    return f"{code} ({view.last_exit.reason})" if view.last_exit.reason else code


def _usage(info: MachineInfo) -> str:
    if info.usage is None:
        return "-"
    processes, disk_bytes = info.usage.processes, info.usage.disk_bytes
    figures = [
        f"{format_size(info.usage.memory_bytes)} memory",
        f"{info.usage.cpu_seconds:.1f} s of cpu",
        f"{processes} process{'' if processes == 1 else 'es'}" if processes is not None else "",
        f"{format_size(disk_bytes)} on disk" if disk_bytes is not None else "",
    ]
    return ", ".join(figure for figure in figures if figure)


INFO_COLUMNS = (
    Column[MachineInfo]("Name", lambda view: view.name),
    Column[MachineInfo]("UUID", lambda view: view.uuid),
    Column[MachineInfo]("State", lambda view: view.state.value, color=_state_color),
    Column[MachineInfo]("Architecture", lambda view: view.architecture),
    Column[MachineInfo]("Template", lambda view: str(view.template)),
    Column[MachineInfo]("Init", lambda view: view.init.value),
    Column[MachineInfo]("Command", lambda view: join(view.command) or "-"),
    Column[MachineInfo]("Network", lambda view: view.network),
    Column[MachineInfo]("IPv4", lambda view: view.address or "-"),
    Column[MachineInfo]("MAC", lambda view: view.mac or "-"),
    Column[MachineInfo]("Limits", _limits),
    Column[MachineInfo]("Disk", lambda view: format_size(view.resources.disk_bytes)),
    Column[MachineInfo]("Usage", _usage),
    Column[MachineInfo](
        "Created", lambda view: age(view.created_at), machine_value=lambda view: view.created_at.isoformat()
    ),
    Column[MachineInfo](
        "Started",
        lambda view: age(view.started_at),
        machine_value=lambda view: view.started_at.isoformat() if view.started_at else "",
    ),
    Column[MachineInfo]("Last exit", _last_exit),
    Column[MachineInfo]("Operation", lambda view: view.operation or "-"),
)


@click.command("info")
@machine_argument()
@output_option
@click.pass_obj
def info_command(session: Session, name: str, output_format: str) -> None:
    """Show all about one machine."""
    client = session.client
    view = client.machine(name)
    info = MachineInfo(**msgspec.structs.asdict(view), usage=_usage_of(client, view))
    print_record(info, INFO_COLUMNS, output_format)


def _usage_of(client: Client, view: MachineView) -> Usage | None:
    """What it uses; a machine that ends in this moment uses nothing."""
    if view.state is not State.RUNNING:
        return None
    try:
        return client.usage(view.name)
    except (NotFound, Unsupported, WrongState):
        return None
