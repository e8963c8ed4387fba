"""Pieces of the command line and the client, without a daemon."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime, timedelta

import click
import pytest

from triarch.cli.arguments import CommandAfterName, parse_environment, without_dashes
from triarch.cli.machines import parse_forward
from triarch.cli.output import age
from triarch.client.problems import error_of, error_of_response
from triarch.errors import CommandFailed, Error, Failed, Invalid, MissingProgram, NotFound
from triarch.model.network import Forward
from triarch.model.operation import Problem


@click.command("x", cls=CommandAfterName)
@click.option("-t", "flag", is_flag=True)
@click.option("-e", "words", multiple=True)
@click.argument("name")
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def example(**values: object) -> dict[str, object]:
    return values


@pytest.mark.parametrize(
    ("line", "flag", "command"),
    [
        ("web ls -l", False, ("ls", "-l")),
        ("-t web ls -l", True, ("ls", "-l")),
        ("web -- ls -l", False, ("ls", "-l")),
        ("web -t -e A=b -- ls -t", True, ("ls", "-t")),
        ("web git log -- file", False, ("git", "log", "--", "file")),
        ("web -- git log -- file", False, ("git", "log", "--", "file")),
    ],
)
def test_options_stand_before_or_after_the_name(line: str, flag: bool, command: tuple[str, ...]) -> None:
    values = example.main(line.split(), standalone_mode=False)
    assert (values["name"], values["flag"], without_dashes(values["command"])) == ("web", flag, command)


def test_forwards() -> None:
    assert parse_forward("8080:80") == Forward(host_port=8080, machine_port=80)
    assert parse_forward("0.0.0.0:1:2") == Forward(host_port=1, machine_port=2, host_address="0.0.0.0")
    for text in ("80", "a:80", "0:80", "80:70000", "1:2:3:4", "", ":"):
        with pytest.raises(Invalid, match="port forward"):
            parse_forward(text)


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "here")
    assert parse_environment(["A=b=c", "E=", "KEPT"]) == {"A": "b=c", "E": "", "KEPT": "here"}
    for text in ("=x", "NOT_SET_ANYWHERE"):
        with pytest.raises(Invalid):
            parse_environment([text])


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "just now"), (1, "1 second ago"), (119, "1 minute ago"), (7200, "2 hours ago"), (86400 * 800, "2 years ago")],
)
def test_ages(seconds: int, text: str) -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert age(now - timedelta(seconds=seconds), now) == text


@pytest.mark.parametrize("error", [NotFound("no", hint="look", machine="a"), MissingProgram("crun", "crun")])
def test_errors_survive_the_wire(error: Error) -> None:
    problem = Problem(
        code=error.code, status=error.status, message=error.message, hint=error.hint, fields=dict(error.fields)
    )
    back = error_of(problem)
    assert (type(back), back.message, back.hint, back.fields) == (type(error), error.message, error.hint, error.fields)


def test_errors_that_nobody_knows() -> None:
    assert type(error_of(Problem(code="internal", status=500, message="m"))) is Failed
    assert type(error_of(Problem(code="new", status=400, message="m"))) is Error
    assert type(error_of(Problem(code="command-failed", status=500, message="m"))) is CommandFailed
    assert "status 502" in error_of_response(502, b"<html>").message


def imported_by(*arguments: str) -> set[str]:
    code = "import sys; from triarch.cli.entry import main; main(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_version_costs_no_import() -> None:
    assert not imported_by("--version") & {"click", "msgspec", "h11", "triarch.model.machine"}


def test_a_command_imports_only_what_it_needs() -> None:
    code = "import sys, triarch.cli.app as a; a.cli.get_command(None, 'list'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = set(done.stdout.split())
    assert "triarch.cli.look" in modules
    assert not modules & {"rich", "yaml", "wsproto", "asyncio", "litestar", "triarch.cli.machines", "subprocess"}
