"""Commands that follow what happens."""

from __future__ import annotations

import click
import msgspec

from triarch.cli import terminal
from triarch.cli.arguments import machine_argument
from triarch.cli.output import plain, print_value
from triarch.cli.progress import finish
from triarch.cli.session import Session
from triarch.errors import Invalid, NotFound
from triarch.model.event import Event
from triarch.model.operation import Operation


@click.command("logs")
@machine_argument()
@click.option("-f", "--follow", is_flag=True, help="Go on until the machine stops.")
@click.pass_obj
def logs_command(session: Session, name: str, follow: bool) -> None:
    """Print a machine's console output."""
    for piece in session.client.logs(name, follow=follow):
        terminal.write_all(terminal.STDOUT_FILENO, piece)


@click.command("events", short_help="Print what happens as it happens.")
@click.option(
    "-o",
    "--output",
    "output_format",
    type=click.Choice(("table", "json", "yaml")),
    default="table",
    help="How to print.",
)
@click.pass_obj
def events_command(session: Session, output_format: str) -> None:
    """Print what happens as it happens, one line each; with -o json one object a line."""
    session.client.server()
    for event in session.client.events():
        if output_format == "json":
            print(msgspec.json.encode(event).decode(), flush=True)
        elif output_format == "yaml":
            print("---")
            print_value(event, "yaml")
        else:
            print(plain(_line(event)), flush=True)


def _line(event: Event) -> str:
    moment = event.at.astimezone().strftime("%H:%M:%S.%f")[:-3]
    facts = " ".join(f"{name}={value}" for name, value in event.fields.items() if value is not None)
    if event.operation is not None:
        facts = f"{_describe(event.operation)} {facts}".rstrip()
    return f"{moment}  {event.kind:<18}  {event.target:<24}  {facts}".rstrip()


def _describe(operation: Operation) -> str:
    words = [operation.verb, operation.status.value]
    if operation.error is not None:
        words.append(operation.error.message)
    elif not operation.status.ended:
        words.append(operation.progress.text or operation.progress.step)
    return " ".join(word for word in words if word)


@click.command("wait", short_help="Wait for an operation or a machine's.")
@click.argument("subject", metavar="OPERATION|NAME")
@click.pass_obj
def wait_command(session: Session, subject: str) -> None:
    """Wait for an operation, or for whatever is under way with a machine; fails when that failed."""
    client = session.client
    try:
        operation_id = client.machine(subject).operation
    except (NotFound, Invalid):
        operation_id = subject
    if operation_id is not None:
        finish(client, client.operation(operation_id), cancels=False)
