"""Pieces of the command line and the client, without a daemon."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import click
import pytest

from triarch.cli.arguments import CommandAfterName, without_dashes
from triarch.cli.output import age, plain
from triarch.cli.settings import parse_environment, parse_forward, setting_options
from triarch.client import Client
from triarch.client.problems import error_of, error_of_response
from triarch.errors import CommandFailed, Error, Failed, Invalid, MissingProgram, NotFound
from triarch.model.instance import instance_at
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
    for text in ("80", "a:80", "0:80", "80:70000", "1:2:3:4", "", ":", "x,y=z:1:2"):
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
    assert not imported_by("--version") & {"click", "msgspec", "triarch.model.machine"}


def test_a_command_that_attaches_imports_little(tmp_path: Path) -> None:
    code = (
        "import os, sys; os._exit = lambda code: None; from triarch.cli.entry import main; main(); print(*sys.modules)"
    )
    arguments = (f"--root={tmp_path}", "exec", "--help")
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    modules = set(done.stdout.split())
    assert {"triarch.cli.attach", "msgspec"} <= modules
    assert not modules & {"typing_extensions", "hashlib", "dataclasses", "termios", "h11", "wsproto", "asyncio", "ssl"}


def test_a_command_imports_only_what_it_needs() -> None:
    code = "import sys, triarch.cli.app as a; a.cli.get_command(None, 'list'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = set(done.stdout.split())
    assert "triarch.cli.look" in modules
    assert not modules & {"rich", "yaml", "wsproto", "asyncio", "litestar", "triarch.cli.machines", "subprocess"}


def test_control_characters_of_strangers_are_shown_and_not_obeyed() -> None:
    assert plain("Debian 12 (ü日本)") == "Debian 12 (ü日本)"
    assert plain("a\x1b[31mb\r\n\u202e\udc80") == "a\\x1b[31mb\\r\\n\\u202e\\udc80"
    assert plain("a\nb\x07", keep="\n") == "a\nb\\x07"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--cpus nan", "not a number"),
        ("--cpus 0", "not in the range"),
        ("--memory 1", "at least 16.0 MiB"),
        ("--disk 1M", "at least 64.0 MiB"),
        ("--pids 1", "not in the range"),
    ],
)
def test_limits_that_are_none_are_refused_before_anything_is_asked(words: str, complaint: str) -> None:
    @click.command()
    @setting_options
    def limited(**_: object) -> None:
        return

    with pytest.raises(click.UsageError, match=complaint):
        limited.main(words.split(), standalone_mode=False)


def test_only_whole_ordinary_files_are_uploaded(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match="no ordinary file"):
        Client(instance_at(tmp_path)).import_template("x", Path("/dev/zero"))
