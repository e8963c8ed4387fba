"""Commands that look at machines."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import click
import msgspec

from triarch.cli.arguments import completes, examples, machine_argument
from triarch.cli.listing import Listing, list_options
from triarch.cli.output import Column, age, join, output_option, print_record
from triarch.cli.session import Session
from triarch.errors import Error, NotFound, Unsupported, WrongState
from triarch.model.device import HardwareInfo
from triarch.model.driver import Usage
from triarch.model.machine import MachineView
from triarch.model.resources import format_size
from triarch.model.setting_forms import write_forward
from triarch.model.state import State
from triarch.model.usage import Sample, UsageHistory

if TYPE_CHECKING:
    from triarch.client import Client

# Of the trends in `info`.
_BARS = 40

_STATE_COLORS = {State.RUNNING: "green", State.PAUSED: "yellow", State.FAILED: "red"}


def _state_color(view: MachineView) -> str | None:
    return _STATE_COLORS.get(view.state)


LIST_COLUMNS = (
    Column[MachineView]("NAME", lambda view: view.name),
    Column[MachineView](
        "STATE",
        lambda view: f"{view.state.value}, {view.health.value}" if view.health else view.state.value,
        color=_state_color,
        machine_value=lambda view: view.state.value,
    ),
    Column[MachineView]("ARCH", lambda view: view.architecture),
    Column[MachineView]("TEMPLATE", lambda view: str(view.template)),
    Column[MachineView]("IPV4", lambda view: view.address or "-", machine_value=lambda view: view.address or ""),
)


def _number(number: float | None) -> str:
    return "" if number is None else f"{number:g}"


def _labels(view: MachineView) -> str:
    return " ".join(f"{key}={value}" for key, value in view.labels.items())


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"


MORE_COLUMNS = (
    Column[MachineView]("HEALTH", lambda view: view.health.value if view.health else ""),
    Column[MachineView]("DESIRED", lambda view: view.desired.value),
    Column[MachineView]("RESTARTS", lambda view: str(view.restarts), right=True),
    Column[MachineView]("NETWORK", lambda view: view.network),
    Column[MachineView]("IPV6", lambda view: view.address6 or ""),
    Column[MachineView]("MAC", lambda view: view.mac or ""),
    Column[MachineView]("INIT", lambda view: view.init.value),
    Column[MachineView]("CPUS", lambda view: _number(view.resources.cpus), right=True),
    Column[MachineView](
        "MEMORY",
        lambda view: format_size(view.resources.memory_bytes) if view.resources.memory_bytes else "",
        right=True,
        machine_value=lambda view: _number(view.resources.memory_bytes),
    ),
    Column[MachineView](
        "DISK",
        lambda view: format_size(view.resources.disk_bytes),
        right=True,
        machine_value=lambda view: str(view.resources.disk_bytes),
    ),
    Column[MachineView]("SNAPSHOTS", lambda view: str(view.snapshot_count), right=True),
    Column[MachineView]("PROFILES", lambda view: " ".join(view.profiles)),
    Column[MachineView]("LABELS", _labels),
    Column[MachineView]("DESCRIPTION", lambda view: view.description),
    Column[MachineView]("RESTART", lambda view: view.restart.value),
    Column[MachineView]("AUTOSTART", lambda view: _yes(view.autostart)),
    Column[MachineView]("PROTECTED", lambda view: _yes(view.protected)),
    Column[MachineView]("OPERATION", lambda view: view.operation or ""),
    Column[MachineView](
        "CREATED", lambda view: age(view.created_at), machine_value=lambda view: view.created_at.isoformat()
    ),
    Column[MachineView](
        "STARTED",
        lambda view: age(view.started_at),
        machine_value=lambda view: view.started_at.isoformat() if view.started_at else "",
    ),
    Column[MachineView]("UUID", lambda view: view.uuid),
)


@click.command(
    "list",
    epilog=examples(
        "triarch list",
        "triarch list state=running arch=hosted,kvm 'web*'",
        "triarch list label.role=web --columns name,health,label.role --sort -started",
        "triarch list -q state!=running",
    ),
)
@list_options(LIST_COLUMNS, MORE_COLUMNS, complete=completes("machines"))
@click.pass_obj
def list_command(session: Session, listing: Listing[MachineView]) -> None:
    """List machines (also ls, ps). A FILTER is COLUMN=PATTERN, COLUMN!=PATTERN, or a pattern of the name."""
    listing.print(_machines(session))


def _machines(session: Session) -> tuple[MachineView, ...]:
    client = session.running_client()
    if client is None and session.never_used:
        return ()
    return (client or session.client).machines()


class MachineInfo(MachineView, frozen=True, kw_only=True):
    """A machine and what it uses now; None where it does not run or its architecture does not measure."""

    usage: Usage | None
    history: UsageHistory | None = None
    sees: HardwareInfo | None = None


def _sees(info: MachineInfo) -> str:
    """The paravirtualization in effect."""
    if info.sees is None:
        return info.hardware.value
    return f"kernel {', '.join(info.sees.kernel)}; drivers {', '.join(info.sees.drivers)} ({info.sees.detail})"


def _trend(info: MachineInfo, value: Callable[[Sample], float], show: Callable[[float], str]) -> str:
    """The last minutes as little bars, and the highest of them."""
    from triarch.cli.figures import sparkline

    samples = info.history.samples if info.history is not None else ()
    if not samples:
        return "-"
    # One bar for as many looks as make the last ten minutes fit a line.
    step = max(1, -(-len(samples) // _BARS))
    values = [max(map(value, samples[at : at + step])) for at in range(0, len(samples), step)]
    return f"{sparkline(values, _BARS)}  up to {show(max(values))}"


def _limits(view: MachineView) -> str:
    resources = view.resources
    rates = (
        ("read", resources.io_read_bytes_per_second),
        ("write", resources.io_write_bytes_per_second),
        ("receive", resources.network_receive_bytes_per_second),
        ("send", resources.network_send_bytes_per_second),
    )
    limits = [
        f"{resources.cpus:g} cpus" if resources.cpus is not None else "",
        f"cpu weight {resources.cpu_weight}" if resources.cpu_weight is not None else "",
        f"on cpus {resources.cpu_set}" if resources.cpu_set is not None else "",
        f"{format_size(resources.memory_bytes)} memory" if resources.memory_bytes is not None else "",
        f"{format_size(resources.swap_bytes)} swap" if resources.swap_bytes is not None else "",
        f"{resources.pids} pids" if resources.pids is not None else "",
        f"io weight {resources.io_weight}" if resources.io_weight is not None else "",
        *(f"{way} {format_size(rate)}/s" for way, rate in rates if rate is not None),
    ]
    return ", ".join(limit for limit in limits if limit) or "none"


def _restart(view: MachineView) -> str:
    """The policy, how often it was followed, and when it is next."""
    parts = [view.restart.value, "at the host's boot" if view.autostart else ""]
    if view.restarts:
        parts.append(f"restarted {view.restarts} time{'' if view.restarts == 1 else 's'}")
    if view.next_start_at is not None:
        parts.append(f"next try at {view.next_start_at.astimezone():%H:%M:%S}")
    return ", ".join(part for part in parts if part)


def _last_exit(view: MachineView) -> str:
    if view.last_exit is None:
        return "-"
    code = "unknown code" if view.last_exit.code is None else f"code {view.last_exit.code}"
    return f"{code} ({view.last_exit.reason})" if view.last_exit.reason else code


def _usage(info: MachineInfo) -> str:
    if info.usage is None:
        return "-"
    processes, disk_bytes = info.usage.processes, info.usage.disk_bytes
    counts = (
        ("read", info.usage.disk_read_bytes),
        ("written", info.usage.disk_written_bytes),
        ("received", info.usage.network_received_bytes),
        ("sent", info.usage.network_sent_bytes),
    )
    figures = [
        f"{format_size(info.usage.memory_bytes)} memory",
        f"{info.usage.cpu_seconds:.1f} s of cpu",
        f"{processes} process{'' if processes == 1 else 'es'}" if processes is not None else "",
        f"{format_size(disk_bytes)} on disk" if disk_bytes is not None else "",
        f"{format_size(info.usage.swap_bytes)} swapped" if info.usage.swap_bytes else "",
        *(f"{format_size(count)} {what}" for what, count in counts if count is not None),
    ]
    return ", ".join(figure for figure in figures if figure)


INFO_COLUMNS = (
    Column[MachineInfo]("Name", lambda view: view.name),
    Column[MachineInfo]("UUID", lambda view: view.uuid),
    Column[MachineInfo]("State", lambda view: view.state.value, color=_state_color),
    Column[MachineInfo]("Architecture", lambda view: view.architecture),
    Column[MachineInfo]("Template", lambda view: str(view.template)),
    Column[MachineInfo]("Description", lambda view: view.description or "-"),
    Column[MachineInfo]("Labels", lambda view: _labels(view) or "-"),
    Column[MachineInfo]("Profiles", lambda view: " ".join(view.profiles) or "-"),
    Column[MachineInfo]("Init", lambda view: view.init.value),
    Column[MachineInfo]("Command", lambda view: join(view.command) or "-"),
    Column[MachineInfo]("Network", lambda view: view.network),
    Column[MachineInfo]("IPv4", lambda view: view.address or "-"),
    Column[MachineInfo]("IPv6", lambda view: view.address6 or "-"),
    Column[MachineInfo]("MAC", lambda view: view.mac or "-"),
    Column[MachineInfo]("Ports", lambda view: " ".join(map(write_forward, view.forwards)) or "-"),
    Column[MachineInfo]("Hardware", _sees),
    Column[MachineInfo]("Devices", lambda view: " ".join(sorted(view.devices)) or "-"),
    Column[MachineInfo]("Limits", _limits),
    Column[MachineInfo]("Disk", lambda view: format_size(view.resources.disk_bytes)),
    Column[MachineInfo]("Snapshots", lambda view: str(view.snapshot_count)),
    Column[MachineInfo]("Usage", _usage),
    Column[MachineInfo](
        "CPU", lambda view: _trend(view, lambda sample: sample.cpus, lambda most: f"{most * 100:.0f} %")
    ),
    Column[MachineInfo](
        "Memory", lambda view: _trend(view, lambda sample: sample.memory_bytes, lambda most: format_size(int(most)))
    ),
    Column[MachineInfo](
        "Created", lambda view: age(view.created_at), machine_value=lambda view: view.created_at.isoformat()
    ),
    Column[MachineInfo](
        "Started",
        lambda view: age(view.started_at),
        machine_value=lambda view: view.started_at.isoformat() if view.started_at else "",
    ),
    Column[MachineInfo]("Last exit", _last_exit),
    Column[MachineInfo]("Restart", _restart),
    Column[MachineInfo]("Health", lambda view: view.health.value if view.health else "-"),
    Column[MachineInfo]("Depends on", lambda view: " ".join(view.depends_on) or "-"),
    Column[MachineInfo]("Protected", lambda view: _yes(view.protected)),
    Column[MachineInfo]("Operation", lambda view: view.operation or "-"),
)


@click.command("info", epilog=examples("triarch info web", "triarch info web -o json", "triarch info web --settings"))
@machine_argument()
@click.option("--settings", "settings_only", is_flag=True, help="What was set, and by which profile.")
@output_option
@click.pass_obj
def info_command(session: Session, name: str, settings_only: bool, output_format: str) -> None:
    """Show all about one machine."""
    client = session.client
    view = client.machine(name)
    if settings_only:
        from triarch.cli.set import print_settings

        print_settings(client, view, output_format)
        return
    info = MachineInfo(
        **msgspec.structs.asdict(view),
        usage=_usage_of(client, view),
        history=client.usages.history(name) if view.state is State.RUNNING else None,
        sees=_seen_by(client, view),
    )
    print_record(info, INFO_COLUMNS, output_format)


def _seen_by(client: Client, view: MachineView) -> HardwareInfo | None:
    """None for a machine that does not run, or is too busy with its start to tell."""
    if view.state is not State.RUNNING:
        return None
    try:
        return client.devices.hardware(view.name)
    except Error:
        return None


def _usage_of(client: Client, view: MachineView) -> Usage | None:
    """What it uses; a machine that ends in this moment uses nothing."""
    if view.state is not State.RUNNING:
        return None
    try:
        return client.usage(view.name)
    except (NotFound, Unsupported, WrongState):
        return None
