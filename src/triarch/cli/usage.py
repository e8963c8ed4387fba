"""`triarch usage`: what was used over time, to be paid for."""

from __future__ import annotations

from datetime import UTC, datetime

import click

from triarch.cli.arguments import completes, examples
from triarch.cli.figures import number
from triarch.cli.output import Column, output_option, print_rows
from triarch.cli.session import Session
from triarch.model.resources import format_size
from triarch.model.usage import UsageRow

_GIB = 1 << 30


def _byte_hours(value: float) -> str:
    return f"{value / _GIB:.3f}"


COLUMNS = (
    Column[UsageRow]("GROUP", lambda row: row.group or "-", machine_value=lambda row: row.group),
    Column[UsageRow](
        "FROM", lambda row: f"{row.begin.astimezone():%Y-%m-%d %H:%M}", machine_value=lambda row: row.begin.isoformat()
    ),
    Column[UsageRow](
        "TO", lambda row: f"{row.end.astimezone():%Y-%m-%d %H:%M}", machine_value=lambda row: row.end.isoformat()
    ),
    Column[UsageRow]("HOURS", lambda row: f"{row.running_hours:.2f}", right=True),
    Column[UsageRow](
        "CPU_SECONDS",
        lambda row: f"{row.cpu_seconds:.1f}",
        right=True,
        machine_value=lambda row: f"{row.cpu_seconds:.3f}",
    ),
    Column[UsageRow](
        "MEMORY_GIB_HOURS",
        lambda row: _byte_hours(row.memory_byte_hours),
        right=True,
        machine_value=lambda row: f"{row.memory_byte_hours / _GIB:.6f}",
    ),
    Column[UsageRow](
        "DISK_GIB_HOURS",
        lambda row: _byte_hours(row.disk_byte_hours),
        right=True,
        machine_value=lambda row: f"{row.disk_byte_hours / _GIB:.6f}",
    ),
    Column[UsageRow](
        "RECEIVED",
        lambda row: format_size(row.network_received_bytes),
        right=True,
        machine_value=lambda row: number(row.network_received_bytes),
    ),
    Column[UsageRow](
        "SENT",
        lambda row: format_size(row.network_sent_bytes),
        right=True,
        machine_value=lambda row: number(row.network_sent_bytes),
    ),
)


@click.command(
    "usage",
    short_help="Show what machines used over time.",
    epilog=examples(
        "triarch usage",
        "triarch usage web --from 24h",
        "triarch usage --from 2026-01-01 --to 2026-01-31 --by label:team -o csv",
    ),
)
@click.argument("name", required=False, shell_complete=completes("machines"))
@click.option("--from", "begin", metavar="TIME", help="A date and time, or how long ago: 24h (30d).")
@click.option("--to", "end", metavar="TIME", help="Until then, and not until now.")
@click.option("--by", default="machine", metavar="GROUP", help="machine, or label:KEY for a row per value of it.")
@click.option("--label", metavar="KEY=VALUE", help="Only machines with this label.")
@output_option
@click.pass_obj
def usage_command(
    session: Session,
    name: str | None,
    begin: str | None,
    end: str | None,
    by: str,
    label: str | None,
    output_format: str,
) -> None:
    """Show what machines used over time, in whole hours; those that are gone are there too."""
    from triarch.model.moment import parse_moment

    now = datetime.now(UTC)
    rows = session.client.usages.account(
        None if begin is None else parse_moment(begin, now),
        None if end is None else parse_moment(end, now),
        by=by,
        machine=name,
        label=label,
    )
    print_rows(rows, COLUMNS, output_format)
