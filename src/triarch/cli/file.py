"""Commands about the files of machines."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import msgspec

from triarch.cli import exit_codes
from triarch.cli.app import complain
from triarch.cli.arguments import NounGroup
from triarch.cli.dry_run import dry_run_option, would
from triarch.cli.listing import Listing, list_options
from triarch.cli.output import Column, plain
from triarch.cli.progress import FRAME_SECONDS, QUIET_SECONDS
from triarch.cli.session import Session
from triarch.errors import Invalid, NotFound
from triarch.model.resources import format_size

if TYPE_CHECKING:
    from triarch.client.file_local import Transfer
    from triarch.client.file_push import Overrides
    from triarch.client.files import Outcome

_STANDARD = "-"
_SHOWN_SKIPS = 10
_MAX_ID = (1 << 32) - 2


@click.group(
    "file",
    short_help="Copy, edit, list and delete files of machines.",
    cls=NounGroup,
    epilog="Examples: triarch file push app.conf web/etc/; triarch file pull -r web/var/log ./logs; "
    "triarch file list web/etc",
)
def file_command() -> None:
    """Copy, edit, list and delete files of machines, running or stopped."""


class Place(msgspec.Struct, frozen=True):
    """`NAME/PATH` as people write it."""

    machine: str
    path: bytes


def parse_place(text: str) -> Place:
    """Raises `Invalid` for what names no place in a machine."""
    name, slash, path = text.partition("/")
    if not name or not slash:
        raise Invalid(f"'{text}' names no place in a machine: it needs NAME/PATH", hint=f"triarch file list {text}/")
    return Place(name, os.fsencode("/" + path))


class Show:
    """What a copy does, as one live line; nothing where nobody looks on, or when it is over in a moment."""

    def __init__(self, verb: str) -> None:
        self._verb = verb
        self._live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._started = time.monotonic()
        self._shown_at = self._started + QUIET_SECONDS - FRAME_SECONDS
        self._dirty = False

    def report(self, transfer: Transfer) -> None:
        now = time.monotonic()
        if not self._live or now - self._shown_at < FRAME_SECONDS:
            return
        self._shown_at = now
        self._dirty = True
        sys.stderr.write(f"\r\x1b[K{self._line(transfer, now)}")
        sys.stderr.flush()

    def _line(self, transfer: Transfer, now: float) -> str:
        width = os.get_terminal_size(sys.stderr.fileno()).columns or 80
        rate = transfer.done_bytes / max(now - self._started, 0.001)
        total = transfer.total_bytes
        share = f" of {format_size(total)} {transfer.done_bytes / total:.0%}" if total else ""
        text = f"{self._verb}: {_rounded(transfer.done_bytes)}{share}, {transfer.files} files, {_rounded(int(rate))}/s"
        return f"{text}  {plain(transfer.name)}"[: width - 1]

    def clear(self) -> None:
        if self._dirty:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def _rounded(size_bytes: int) -> str:
    for unit, length in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size_bytes >= length:
            return f"{size_bytes / length:.1f} {unit}"
    return f"{size_bytes} B"


def _tell(outcome: Outcome) -> int:
    """Complain about what did not work; the exit code."""
    if outcome.disarmed:
        print(
            f"note: left out set-user-ID bits or capabilities of {outcome.disarmed} files; --trust keeps them",
            file=sys.stderr,
        )
    for skipped in outcome.skipped[:_SHOWN_SKIPS]:
        print(f"note: skipped '{plain(skipped.name)}': {skipped.reason}", file=sys.stderr)
    if len(outcome.skipped) > _SHOWN_SKIPS:
        print(f"note: skipped {len(outcome.skipped) - _SHOWN_SKIPS} more", file=sys.stderr)
    if len(outcome.errors) == 1:
        raise outcome.errors[0]
    for error in outcome.errors[:_SHOWN_SKIPS]:
        complain(error.message, error.hint)
    if len(outcome.errors) > _SHOWN_SKIPS:
        complain(f"{len(outcome.errors) - _SHOWN_SKIPS} more could not be copied", None)
    return exit_codes.ERROR if outcome.errors else 0


class ModeType(click.ParamType[int]):
    """`644`: permissions in octal."""

    name = "mode"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            mode = int(value, 8)
        except ValueError:
            mode = -1
        if not 0 <= mode <= 0o7777:
            self.fail(f"'{value}' is no mode: it needs octal digits such as 644", param, ctx)
        return mode


_id_type = click.IntRange(0, _MAX_ID)


@file_command.command(
    "push",
    epilog="Examples: triarch file push app.conf web/etc/app.conf; triarch file push -r site/ web/srv/; "
    "pg_dump db | triarch file push - web/tmp/db.sql --mode 600",
)
@click.option("-r", "--recursive", is_flag=True, help="Copy directories with all that is in them.")
@click.option("-p", "--parents", is_flag=True, help="Make the directories that the place needs.")
@click.option("--uid", type=_id_type, help="Owner in the machine (default: as here for root, else 0).")
@click.option("--gid", type=_id_type, help="Group in the machine.")
@click.option("--mode", type=ModeType(), help="Permissions in the machine, in octal (default: as here).")
@click.argument("sources", metavar="LOCAL...", nargs=-1, required=True)
@click.argument("target", metavar="NAME/PATH")
@click.pass_obj
def push_command(
    session: Session,
    recursive: bool,
    parents: bool,
    uid: int | None,
    gid: int | None,
    mode: int | None,
    sources: tuple[str, ...],
    target: str,
) -> int:
    """Copy local files into a machine; `-` is standard input.

    Owner, mode, times, extended attributes, links and holes are kept. A copy of a large file that was interrupted goes
    on where it ended when the same command is run again.
    """
    from triarch.client.file_push import Overrides

    place = parse_place(target)
    overrides = Overrides(uid=uid, gid=gid, mode=mode)
    show = Show(f"push to {place.machine}")
    try:
        if _STANDARD in sources:
            return _tell(_push_input(session, sources, place, overrides, show))
        files = session.client.files
        encoded = tuple(map(os.fsencode, sources))
        outcome = files.push(
            place.machine,
            encoded,
            place.path,
            recursive=recursive,
            parents=parents,
            overrides=overrides,
            report=show.report,
        )
    finally:
        show.clear()
    return _tell(outcome)


def _push_input(session: Session, sources: tuple[str, ...], place: Place, overrides: Overrides, show: Show) -> Outcome:
    if len(sources) > 1 or place.path.endswith(b"/"):
        raise Invalid("standard input goes to one file: give it a name", hint=f"triarch file push - {place.machine}/…")
    return session.client.files.push_stream(place.machine, sys.stdin.buffer, place.path, overrides, show.report)


@file_command.command(
    "pull",
    epilog="Examples: triarch file pull web/etc/hosts .; triarch file pull -r web/var/log ./logs; "
    "triarch file pull web/etc/os-release -",
)
@click.option("-r", "--recursive", is_flag=True, help="Copy directories with all that is in them.")
@click.option("--trust", is_flag=True, help="Keep set-user-ID bits and file capabilities.")
@click.argument("sources", metavar="NAME/PATH...", nargs=-1, required=True)
@click.argument("target", metavar="LOCAL")
@click.pass_obj
def pull_command(session: Session, recursive: bool, trust: bool, sources: tuple[str, ...], target: str) -> int:
    """Copy files out of a machine; `-` is standard output.

    Nothing is written outside of LOCAL, whatever the machine says. Owners are kept when root copies.
    """
    places = [parse_place(source) for source in sources]
    names = {place.machine for place in places}
    if len(names) > 1:
        raise Invalid(f"cannot pull from {len(names)} machines at once", hint="triarch file pull NAME/PATH... LOCAL")
    name = names.pop()
    paths = [place.path for place in places]
    show = Show(f"pull from {name}")
    files = session.client.files
    try:
        if target == _STANDARD:
            for path in paths:
                files.pull_stream(name, path, sys.stdout.buffer, show.report)
            return 0
        outcome = files.pull(name, paths, os.fsencode(target), recursive=recursive, trusted=trust, report=show.report)
    finally:
        show.clear()
    return _tell(outcome)


@file_command.command(
    "edit", epilog="Examples: triarch file edit web/etc/hosts; EDITOR=nano triarch file edit web/etc/motd"
)
@click.argument("target", metavar="NAME/PATH")
@click.pass_obj
def edit_command(session: Session, target: str) -> int:
    """Edit a file of a machine in $EDITOR; a new one is made. Owner and mode stay."""
    import tempfile

    from triarch.client.file_push import Overrides
    from triarch.model.file_protocol import FileKind

    place = parse_place(target)
    files = session.client.files
    with tempfile.TemporaryDirectory(prefix="triarch-edit-") as directory:
        copy = Path(directory) / (os.fsdecode(os.path.basename(place.path)) or "file")  # noqa: PTH119
        found = files.stat(place.machine, place.path)
        if found is None:
            copy.touch(mode=0o644)
            path, overrides = place.path, Overrides(uid=0, gid=0, mode=0o644)
        elif found.kind is not FileKind.FILE:
            raise Invalid(f"cannot edit '{target}': it is no ordinary file")
        else:
            files.pull(place.machine, [found.path], os.fsencode(copy))
            # Where a link leads, so that the link stays one.
            path, overrides = found.path, Overrides(uid=found.uid, gid=found.gid, mode=found.mode)
        before = copy.read_bytes()
        click.edit(filename=str(copy))
        if copy.read_bytes() == before:
            print("nothing changed", file=sys.stderr)
            return 0
        os.utime(copy)
        return _tell(files.push(place.machine, [os.fsencode(copy)], path, overrides=overrides))


class Listed(msgspec.Struct, frozen=True, kw_only=True):
    """A row of `file list`."""

    name: str
    kind: str
    mode: str
    uid: int
    gid: int
    size_bytes: int
    modified_at: str
    target: str = ""


_KINDS = {"f": "file", "d": "directory", "l": "symlink", "p": "fifo", "c": "character", "b": "block", "s": "socket"}

COLUMNS = (
    Column[Listed]("MODE", lambda row: row.mode),
    Column[Listed]("KIND", lambda row: row.kind),
    Column[Listed]("UID", lambda row: str(row.uid), right=True),
    Column[Listed]("GID", lambda row: str(row.gid), right=True),
    Column[Listed]("SIZE", lambda row: str(row.size_bytes), right=True),
    Column[Listed]("MODIFIED", lambda row: row.modified_at),
    Column[Listed](
        "NAME",
        lambda row: f"{row.name} -> {row.target}" if row.target else row.name,
        color=lambda row: "cyan" if row.kind == "directory" else None,
        machine_value=lambda row: row.name,
    ),
)


@file_command.command(
    "list",
    epilog="Examples: triarch file list web/etc; triarch file list web/ -o json; "
    "triarch file list web/var/log '*.log' --sort -size",
)
@click.argument("target", metavar="NAME/PATH")
@list_options(COLUMNS)
@click.pass_obj
def list_command(session: Session, target: str, listing: Listing[Listed]) -> None:
    """List a directory of a machine (also ls)."""
    from datetime import UTC, datetime

    place = parse_place(target)
    rows = []
    for entry in session.client.files.list(place.machine, place.path):
        seconds = entry.modified_ns // 1_000_000_000
        try:
            modified = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
        except (ValueError, OverflowError, OSError):
            modified = str(seconds)
        rows.append(
            Listed(
                name=_text(entry.path),
                kind=_KINDS[entry.kind.value],
                mode=f"{entry.mode:04o}",
                uid=entry.uid,
                gid=entry.gid,
                size_bytes=entry.size_bytes,
                modified_at=modified,
                target=_text(entry.target),
            )
        )
    listing.print(rows)


def _text(name: bytes) -> str:
    """A name that need not be text, as JSON and a terminal can have it."""
    return name.decode(errors="backslashreplace")


@file_command.command("delete", epilog="Examples: triarch file delete web/tmp/x; triarch file delete -r web/srv/old")
@click.option("-r", "--recursive", is_flag=True, help="Delete directories with all that is in them.")
@click.argument("targets", metavar="NAME/PATH...", nargs=-1, required=True)
@dry_run_option
@click.pass_obj
def delete_command(session: Session, recursive: bool, targets: tuple[str, ...], dry_run: bool) -> int:
    """Delete files of a machine (also rm). What is mounted into it stays."""
    from triarch.cli.progress import each

    def delete(target: str) -> None:
        place = parse_place(target)
        if dry_run:
            found = session.client.files.stat(place.machine, place.path, follow=False)
            if found is None:
                raise NotFound(f"there is no '{target}'", hint=f"triarch file list {place.machine}/")
            would("delete", f"{_KINDS[found.kind.value]} {target}")
            return
        session.client.files.delete(place.machine, place.path, recursive=recursive)

    return each(targets, delete)
