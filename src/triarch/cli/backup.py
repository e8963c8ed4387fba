"""Commands that copy machines and carry them in files."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from triarch.cli.arguments import architecture_option, completes
from triarch.cli.progress import finish
from triarch.cli.session import Session
from triarch.errors import Invalid, NotFound
from triarch.model.resources import format_size
from triarch.model.snapshot import CopyMachine, ExportMachine, ImportMachine


@click.command(
    "copy",
    short_help="Make a new machine like another.",
    epilog="Examples: triarch copy web web2; triarch copy web/before-upgrade old-web; triarch copy web web2 --start",
)
@click.argument("source", metavar="NAME[/SNAPSHOT]")
@click.argument("new_name")
@click.option("--start", is_flag=True, help="Start the copy, too.")
@click.pass_obj
def copy_command(session: Session, source: str, new_name: str, start: bool) -> None:
    """Make a new machine like another, running or not, or like one of its snapshots.

    The copy has a uuid, an address, a machine-id and ssh host keys of its own.
    """
    name, _, snapshot = source.partition("/")
    client = session.client
    finish(client, client.backups.copy(name, CopyMachine(name=new_name, snapshot=snapshot or None, start=start)))
    print(f"machine {new_name} is a copy of {source}, {client.machine(new_name).state.value}")


class _Meter:
    """How far a transfer is, on a terminal."""

    def __init__(self, verb: str) -> None:
        self._verb = verb
        self._shown = -1

    def __call__(self, done: int, total: int) -> None:
        percent = done * 100 // max(1, total)
        if sys.stderr.isatty() and percent != self._shown:
            self._shown = percent
            end = "\r\x1b[K" if done >= total else ""
            sys.stderr.write(f"\r\x1b[K{self._verb}: {format_size(done)} of {format_size(total)}  {percent}%{end}")
            sys.stderr.flush()


@click.command(
    "export",
    epilog="Examples: triarch export web web.triarch; triarch export web/before-upgrade old.triarch; "
    "triarch export web web.triarch --with-template; triarch export -o yaml",
)
@click.argument("source", metavar="[NAME[/SNAPSHOT]]", required=False, shell_complete=completes("machines"))
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path), required=False)
@click.option(
    "-o",
    "--output",
    "output_format",
    type=click.Choice(["yaml", "json"]),
    help="Without FILE: print the site file of NAME, or of all there is (see apply).",
)
@click.option("--with-template", is_flag=True, help="Put the template into the file, too.")
@click.option("-f", "--force", is_flag=True, help="Replace FILE where it exists.")
@click.pass_obj
def export_command(
    session: Session,
    source: str | None,
    file: Path | None,
    output_format: str | None,
    with_template: bool,
    force: bool,
) -> None:
    """Write a whole machine, running or not, into one file. The same command takes up a transfer that broke off."""
    if output_format is not None and file is None:
        from triarch.cli.site import print_site

        print_site(session, () if source is None else (source,), output_format)
        return
    if source is None or file is None or output_format is not None:
        raise click.UsageError("export needs NAME and FILE, or -o yaml for a site file")
    if file.exists() and not force:
        raise Invalid(f"'{file}' exists already", hint=f"triarch export {source} {file} --force")
    name, _, snapshot = source.partition("/")
    client, note = session.client, Path(f"{file}.part.id")
    request = ExportMachine(snapshot=snapshot or None, with_template=with_template)
    backup_id = _unfinished(session, note, source)
    if backup_id is None:
        Path(f"{file}.part").unlink(missing_ok=True)
        backup_id = finish(client, client.backups.export(name, request)).result or ""
        note.write_text(f"{backup_id} {source}\n")
    client.backups.download(backup_id, file, _Meter("receiving"))
    note.unlink(missing_ok=True)
    client.backups.forget(backup_id)
    print(f"machine {source} is in {file}  {format_size(file.stat().st_size)}")


def _unfinished(session: Session, note: Path, source: str) -> str | None:
    """The backup that an earlier run began to receive, if the daemon still has it."""
    try:
        backup_id, of = note.read_text().split()
        if of == source:
            session.client.backups.get(backup_id)
            return backup_id
    except (FileNotFoundError, ValueError, NotFound, Invalid):
        pass
    return None


@click.command(
    "import",
    epilog="Examples: triarch import web.triarch; triarch import web.triarch web2 --start; "
    "triarch import web.triarch --as hosted",
)
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("new_name", required=False)
@architecture_option("--as", help="Run it under this architecture.")
@click.option("--start", is_flag=True, help="Start it, too.")
@click.option(
    "--host-devices", is_flag=True, help="Let it have what it asks for of this host: folders, disks, devices."
)
@click.pass_obj
def import_command(
    session: Session, file: Path, new_name: str | None, architecture: str | None, start: bool, host_devices: bool
) -> None:
    """Make the machine that is in FILE. A transfer that broke off is taken up by the same command."""
    client = session.client
    backup_id = client.backups.upload(file, _Meter("sending"))
    request = ImportMachine(name=new_name, architecture=architecture, start=start, host_devices=host_devices)
    operation = finish(client, client.backups.import_(backup_id, request))
    view = client.machine(operation.result or "")
    print(f"machine {view.name} is here, {view.architecture}, {view.state.value}")
