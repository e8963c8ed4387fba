"""Commands that follow what happens."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import click
import msgspec

from triarch.cli import terminal
from triarch.cli.arguments import Number, completes, examples, machine_argument
from triarch.cli.output import plain, print_value
from triarch.cli.progress import finish
from triarch.cli.session import Session
from triarch.errors import Failed, Invalid, NotFound, TimedOut
from triarch.model.event import Event
from triarch.model.machine import MachineView
from triarch.model.operation import Operation
from triarch.model.policy import Health
from triarch.model.state import State

if TYPE_CHECKING:
    from triarch.client import Client


@click.command(
    "logs", epilog=examples("triarch logs web", "triarch logs -f --tail 10 web", "triarch logs --since 2h web")
)
@machine_argument()
@click.option("-f", "--follow", is_flag=True, help="Go on until the machine stops.")
@click.option("--since", metavar="WHEN", help="What was written since: 10m (ago), or a date and time (UTC).")
@click.option(
    "-n", "--tail", metavar="N", type=click.IntRange(min=0), help="At most the last N lines of what was kept."
)
@click.pass_obj
def logs_command(session: Session, name: str, follow: bool, since: str | None, tail: int | None) -> None:
    """Print a machine's console output."""
    for piece in session.client.logs(name, follow=follow, since=since, tail=tail):
        terminal.write_all(terminal.STDOUT_FILENO, piece)


@click.command(
    "events",
    short_help="Print what happens as it happens.",
    epilog=examples("triarch events", "triarch events -o json"),
)
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


@click.command(
    "wait",
    short_help="Wait for an operation, or for a machine's state or health.",
    epilog=examples(
        "triarch wait web",
        "triarch wait --healthy web --timeout 60",
        "triarch wait --state stopped job",
        "triarch wait 0123456789ab",
    ),
)
@click.argument("subject", metavar="OPERATION|NAME", shell_complete=completes("machines_and_operations"))
@click.option("--state", type=click.Choice([state.value for state in State]), help="Until the machine is in it.")
@click.option("--healthy", is_flag=True, help="Until the machine's health check succeeds; fails once it cannot.")
@click.option("--timeout", "timeout_seconds", type=Number(0, 86400), metavar="SECONDS", help="The longest to wait.")
@click.pass_obj
def wait_command(
    session: Session, subject: str, state: str | None, healthy: bool, timeout_seconds: float | None
) -> None:
    """Wait for an operation, or for whatever is under way with a machine; fails when that failed.

    With --state or --healthy wait until the machine is so.
    """
    if state and healthy:
        raise click.UsageError("--state and --healthy exclude each other")
    deadline = math.inf if timeout_seconds is None else time.monotonic() + timeout_seconds
    if state or healthy:
        _wait_machine(session.client, subject, state, deadline)
    else:
        _wait_operation(session.client, subject, deadline)


def _wait_operation(client: Client, subject: str, deadline: float) -> None:
    try:
        operation_id = client.machine(subject).operation
    except (NotFound, Invalid):
        operation_id = subject
    if operation_id is None:
        return
    operation = client.operation(operation_id)
    if deadline < math.inf:
        operation = client.operation(operation_id, max(0.0, min(deadline - time.monotonic(), 600.0)))
        if not operation.status.ended:
            raise TimedOut(f"operation {operation_id} ({operation.verb}) goes on", hint=f"triarch wait {operation_id}")
    finish(client, operation, cancels=False)


def _wait_machine(client: Client, name: str, state: str | None, deadline: float) -> None:
    """Until it is in `state`, or healthy. Raises `TimedOut`, and `Failed` where it will not become healthy."""
    words = (state,) if state else ("healthy", "unhealthy", "stopped", "failed")
    while True:
        left = deadline - time.monotonic()
        view = client.wait_machine(name, *words, wait_seconds=max(0.0, min(left, 30.0)))
        if state is not None and view.state.value == state:
            return
        if state is None and _is_healthy(view):
            return
        if left <= 0:
            now = f"{view.state.value}, {view.health.value}" if view.health else view.state.value
            raise TimedOut(f"machine '{name}' is not {state or 'healthy'} in time: it is {now}")
        # It ended and is about to be started again, which is not told by the words that were waited for.
        if state is None and view.state.value in words:
            time.sleep(0.2)


def _is_healthy(view: MachineView) -> bool:
    """Raises `Failed` where it cannot become so by itself."""
    running = view.state is State.RUNNING
    if running and view.health is None and view.operation is None:
        raise Invalid(f"machine '{view.name}' has no health check", hint=f"triarch info {view.name}")
    if view.health is Health.UNHEALTHY:
        raise Failed(f"machine '{view.name}' is unhealthy", hint=f"triarch info {view.name}")
    if not running and view.operation is None and view.next_start_at is None and view.desired is State.STOPPED:
        raise Failed(f"machine '{view.name}' is {view.state.value}", hint=f"triarch start {view.name}")
    return view.health is Health.HEALTHY
