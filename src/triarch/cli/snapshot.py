"""Commands about snapshots."""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import click

from triarch.cli.arguments import NounGroup, completes, machine_argument
from triarch.cli.dry_run import dry_run_option, would
from triarch.cli.listing import Listing, list_options
from triarch.cli.output import Column, age, output_option, plain, print_record, print_rows, print_value, style
from triarch.cli.progress import each, finish
from triarch.cli.session import Session
from triarch.model.difference import Change, Difference, FileChange
from triarch.model.resources import format_size
from triarch.model.snapshot import CreateSnapshot, RestoreSnapshot, Snapshot

_UNITS = {"m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}


class Lifetime(click.ParamType[int]):
    """`30m`, `12h`, `7d`, `2w`: seconds."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        number, unit = value[:-1], value[-1:]
        if unit not in _UNITS or not (number.isascii() and number.isdigit()) or not 0 < len(number) < 7:
            self.fail(f"{value!r} is no time: it needs a number with m, h, d or w, such as 7d", param, ctx)
        return int(number) * _UNITS[unit]


class SnapshotGroup(NounGroup):
    """`new` is `create` too."""

    aliases: ClassVar[dict[str, str]] = {**NounGroup.aliases, "new": "create"}


@click.group(
    "snapshot",
    cls=SnapshotGroup,
    epilog="Examples: triarch snapshot create web before-upgrade; triarch snapshot list web; "
    "triarch restore web before-upgrade",
)
def snapshot_command() -> None:
    """Take, list, compare and delete snapshots of machines."""


_snapshot_argument = click.argument("snapshot", shell_complete=completes("snapshots"))


def _frozen(snapshot: Snapshot) -> str:
    return "-" if snapshot.frozen_seconds is None else f"{snapshot.frozen_seconds * 1000:.1f} ms"


COLUMNS = (
    Column[Snapshot]("NAME", lambda each: each.name),
    Column[Snapshot](
        "CREATED", lambda each: age(each.created_at), machine_value=lambda each: each.created_at.isoformat()
    ),
    Column[Snapshot]("TEMPLATE", lambda each: str(each.machine.template)),
    Column[Snapshot](
        "SIZE", lambda each: format_size(each.size_bytes), right=True, machine_value=lambda each: str(each.size_bytes)
    ),
    Column[Snapshot]("KIND", lambda each: "stateful" if each.stateful else "scheduled" if each.scheduled else "disks"),
    Column[Snapshot](
        "EXPIRES",
        lambda each: each.expires_at.strftime("%Y-%m-%d %H:%M") if each.expires_at else "-",
        machine_value=lambda each: each.expires_at.isoformat() if each.expires_at else "",
    ),
)
MORE_COLUMNS = (
    Column[Snapshot]("FROZEN", _frozen, right=True),
    Column[Snapshot]("CONSISTENCY", lambda each: each.consistency.value),
    Column[Snapshot]("DESCRIPTION", lambda each: each.description),
)
INFO_COLUMNS = (
    Column[Snapshot]("Name", lambda each: each.name),
    Column[Snapshot]("Machine", lambda each: each.machine.name),
    Column[Snapshot]("Created", lambda each: age(each.created_at)),
    Column[Snapshot]("Template", lambda each: f"{each.machine.template} ({each.machine.template.digest[:12]})"),
    Column[Snapshot]("Memory", lambda each: "kept" if each.stateful else "not kept"),
    Column[Snapshot]("Consistency", lambda each: each.consistency.value),
    Column[Snapshot]("Frozen", _frozen),
    Column[Snapshot]("Size", lambda each: format_size(each.size_bytes)),
    Column[Snapshot](
        "Disks", lambda each: ", ".join(f"{disk.name} {format_size(disk.size_bytes)}" for disk in each.disks)
    ),
    Column[Snapshot]("Scheduled", lambda each: "yes" if each.scheduled else "no"),
    Column[Snapshot]("Expires", lambda each: each.expires_at.isoformat() if each.expires_at else "never"),
    Column[Snapshot]("Description", lambda each: each.description or "-"),
)


@snapshot_command.command(
    "create",
    epilog="Examples: triarch snapshot create web; triarch snapshot create web before-upgrade --expires 7d; "
    "triarch snapshot create web running --stateful",
)
@machine_argument()
@click.argument("snapshot", required=False)
@click.option("--stateful", is_flag=True, help="Keep the memory too, so that restore can go on where it was.")
@click.option("--expires", type=Lifetime(), metavar="TIME", help="Delete it after this time: 12h, 7d, 2w.")
@click.option("--description", default="", help="What it is good for.")
@output_option
@click.pass_obj
def snapshot_create(
    session: Session,
    name: str,
    snapshot: str | None,
    stateful: bool,
    expires: int | None,
    description: str,
    output_format: str,
) -> None:
    """Take a snapshot of a machine, running or not."""
    client = session.client
    request = CreateSnapshot(name=snapshot, stateful=stateful, description=description, expires_after_seconds=expires)
    operation = finish(client, client.snapshots.create(name, request))
    made = client.snapshots.get(name, operation.result or "")
    if output_format != "table":
        print_record(made, INFO_COLUMNS, output_format)
        return
    still = f", {name} stood still for {_frozen(made)}" if made.frozen_seconds is not None else ""
    print(f"snapshot {made.name} of {name}  {format_size(made.size_bytes)}{still}")
    if made.consistency.value == "crash":
        print("the guest did not answer: the snapshot is what a power cut would have left")


@snapshot_command.command(
    "list",
    epilog="Examples: triarch snapshot list web; triarch snapshot list web -o json; "
    "triarch snapshot list web kind=scheduled --columns name,frozen",
)
@machine_argument()
@list_options(COLUMNS, MORE_COLUMNS)
@click.pass_obj
def snapshot_list(session: Session, name: str, listing: Listing[Snapshot]) -> None:
    """List the snapshots of a machine, oldest first."""
    listing.print(session.client.snapshots.list(name))


@snapshot_command.command("info", epilog="Examples: triarch snapshot info web before-upgrade")
@machine_argument()
@_snapshot_argument
@output_option
@click.pass_obj
def snapshot_info(session: Session, name: str, snapshot: str, output_format: str) -> None:
    """Show all about one snapshot."""
    print_record(session.client.snapshots.get(name, snapshot), INFO_COLUMNS, output_format)


@snapshot_command.command("delete", epilog="Examples: triarch snapshot delete web before-upgrade snap0")
@machine_argument()
@click.argument("snapshots", metavar="SNAPSHOT...", nargs=-1, required=True, shell_complete=completes("snapshots"))
@dry_run_option
@click.pass_obj
def snapshot_delete(session: Session, name: str, snapshots: tuple[str, ...], dry_run: bool) -> int:
    """Delete snapshots of a machine."""
    client = session.client

    def delete(snapshot: str) -> None:
        if dry_run:
            found = client.snapshots.get(name, snapshot)
            would("delete", f"snapshot {found.name} of {name} ({format_size(found.size_bytes)})")
        else:
            finish(client, client.snapshots.delete(name, snapshot))

    return each(snapshots, delete)


@snapshot_command.command("rename", epilog="Examples: triarch snapshot rename web snap0 before-upgrade")
@machine_argument()
@_snapshot_argument
@click.argument("new_name")
@click.pass_obj
def snapshot_rename(session: Session, name: str, snapshot: str, new_name: str) -> None:
    """Give a snapshot another name."""
    finish(session.client, session.client.snapshots.rename(name, snapshot, new_name))


_SIGNS = {Change.ADDED: ("+", "green"), Change.REMOVED: ("-", "red"), Change.CHANGED: ("~", "yellow")}
FILE_COLUMNS = (
    Column[FileChange]("CHANGE", lambda each: each.change.value),
    Column[FileChange]("KIND", lambda each: each.kind),
    Column[FileChange]("PATH", lambda each: each.path),
    Column[FileChange]("PACKAGE", lambda each: each.package),
)


@snapshot_command.command(
    "diff",
    short_help="Show what changed since a snapshot.",
    epilog="Examples: triarch snapshot diff web before-upgrade; triarch snapshot diff web snap0 snap1 -o json",
)
@machine_argument()
@_snapshot_argument
@click.argument("other", required=False, metavar="[SNAPSHOT]", shell_complete=completes("snapshots"))
@output_option
@click.pass_obj
def snapshot_diff(session: Session, name: str, snapshot: str, other: str | None, output_format: str) -> None:
    """Show what changed from a snapshot to another one, or to now: packages, then files that are no package's."""
    found = session.client.snapshots.diff(name, snapshot, other)
    if output_format == "csv":
        print_rows(found.files, FILE_COLUMNS, "csv")
    elif output_format != "table":
        print_value(found, output_format)
    else:
        _print_difference(found)


def _print_difference(found: Difference) -> None:
    for package in found.packages:
        before, after = package.old_version or "not installed", package.new_version or "removed"
        print(f"package {plain(package.name)}: {plain(before)} -> {plain(after)}")
    changed = {package.name for package in found.packages}
    hidden = [file for file in found.files if file.package in changed]
    for file in found.files:
        if file.package not in changed:
            sign, color = _SIGNS[file.change]
            of = f"  ({plain(file.package)})" if file.package else ""
            print(f"{style(sign, color, sys.stdout)} {plain(file.path)}{of}")
    if hidden:
        print(f"and {len(hidden)} files of these packages (-o json names them)")


@click.command(
    "restore",
    short_help="Bring a machine back to a snapshot.",
    epilog="Examples: triarch restore web before-upgrade; triarch restore web before-upgrade --check; "
    "triarch restore web running --stateful",
)
@machine_argument()
@_snapshot_argument
@click.option("--stateful", is_flag=True, help="Go on in the memory that the snapshot kept.")
@click.option("--check", is_flag=True, help="Only say whether it would be possible.")
@click.pass_obj
def restore_command(session: Session, name: str, snapshot: str, stateful: bool, check: bool) -> None:
    """Bring a machine back to a snapshot: template, disks and settings. A running one is stopped and started again."""
    client = session.client
    operation = client.snapshots.restore(name, RestoreSnapshot(snapshot=snapshot, stateful=stateful, check=check))
    if operation is None:
        print(f"machine {name} can be restored to snapshot {snapshot}")
        return
    finish(client, operation)
    print(f"machine {name} is as it was in snapshot {snapshot}, {client.machine(name).state.value}")
