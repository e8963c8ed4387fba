"""Streams: commands, throw-away machines, consoles; clients that are slow, vanish, or talk nonsense."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from triarch.client import Client
from triarch.client.connection import connect
from triarch.client.stream import Stream, wait
from triarch.errors import Failed, Invalid, NotFound, WrongState
from triarch.model.driver import ExecRequest
from triarch.model.machine import CreateMachine
from triarch.model.settings import Settings
from triarch.model.stream import STDOUT, ConsoleRequest, RunRequest
from triarch.testing.daemon_rig import APP_TEMPLATE, SYSTEM_TEMPLATE, DaemonRig

BIG = 20 << 20


@pytest.fixture(scope="module", autouse=True)
def machine(rig: DaemonRig) -> Iterator[None]:
    with rig.client() as client:
        client.finish(
            client.create(
                CreateMachine(template=SYSTEM_TEMPLATE, name="web", settings=Settings(network="none"), start=True)
            )
        )
    yield


def run_request(*command: str) -> RunRequest:
    return RunRequest(machine=CreateMachine(template=APP_TEMPLATE, settings=Settings(network="none"), command=command))


def resident_bytes(pid: int) -> int:
    from pathlib import Path

    line = next(x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) << 10


def test_output_streams_and_exit_code_arrive(client: Client) -> None:
    done = client.execute("web", "sh", "-c", "echo out; echo err >&2; exit 7")
    assert (done.exit.code, done.stdout, done.stderr) == (7, b"out\n", b"err\n")


def test_big_input_comes_back_whole(client: Client) -> None:
    data = bytes(range(256)) * (BIG // 256)
    assert client.execute("web", "cat", input_bytes=data).stdout == data


def test_a_slow_client_holds_the_command_up_and_not_the_daemon(client: Client, rig: DaemonRig) -> None:
    before = resident_bytes(rig.pid)
    with client.exec("web", ExecRequest(command=("sh", "-c", "while :; do seq 1 10000; done"))) as stream:
        time.sleep(2)
        assert resident_bytes(rig.pid) - before < 32 << 20
        assert client.execute("web", "echo", "hi").stdout == b"hi\n"
        wait(stream)
        assert any(output.channel == STDOUT and output.data for output in stream.receive())


def test_a_vanished_client_ends_its_run(client: Client) -> None:
    stream = client.run(run_request("sleep", "3600"))
    deadline = time.monotonic() + 20
    while not any(view.ephemeral for view in client.machines()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    stream.close()
    while any(view.ephemeral for view in client.machines()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_run_passes_the_exit_code_and_leaves_no_machine(client: Client) -> None:
    with client.run(run_request("sh", "-c", "echo hi; exit 3")) as stream:
        done = stream.communicate()
    assert (done.exit.code, done.stdout) == (3, b"hi\n")
    assert [view.name for view in client.machines()] == ["web"]


def test_a_resize_reaches_the_command(client: Client) -> None:
    command = ("sh", "-c", "read x; stty size")
    with client.exec("web", ExecRequest(command=command, terminal=True)) as stream:
        stream.resize(columns=101, rows=41)
        assert b"41 101" in stream.communicate(b"go\n").stdout


def test_who_a_command_runs_as(client: Client) -> None:
    command = ("sh", "-c", "id -u; echo $HOME")
    with client.exec("web", ExecRequest(command=command, user="bob")) as stream:
        assert stream.communicate().stdout == b"1000\n/home/bob\n"
    with client.exec("web", ExecRequest(command=command, user="eve")) as stream:
        done = stream.communicate()
    assert (done.exit.code, done.stdout) == (126, b"") and b"no user 'eve'" in done.stderr


def test_a_login_shell_reads_its_input(client: Client) -> None:
    with client.exec("web", ExecRequest(login=True, user="bob")) as stream:
        done = stream.communicate(b"pwd\nexit 5\n")
    assert (done.exit.code, done.stdout) == (5, b"/home/bob\n")


def test_a_command_that_takes_too_long(client: Client) -> None:
    with client.exec("web", ExecRequest(command=("sleep", "1000"), timeout_seconds=0.2)) as stream:
        done = stream.communicate()
    assert (done.exit.code, done.exit.reason) == (124, "timed out after 0.2 s")


def collect(stream: Stream, wanted: bytes) -> bytes:
    text, deadline = b"", time.monotonic() + 20
    while wanted not in text:
        assert time.monotonic() < deadline, text
        wait(stream)
        text += b"".join(output.data for output in stream.receive())
    return text


def test_a_console_shows_its_past_and_what_any_of_them_types(client: Client) -> None:
    with client.console("web") as first, client.console("web", ConsoleRequest(read_only=True)) as second:
        second.send_input(b"echo of the second\n")
        first.send_input(b"echo of the first\n")
        for each in (first, second):
            assert b"of the second" not in collect(each, b"of the first\n")
    with client.console("web") as late, client.console("web", ConsoleRequest(history_bytes=0)) as new:
        collect(late, b"of the first\n")
        new.send_input(b"echo now\n")
        assert collect(new, b"now\n") == b"now\n"


def test_a_console_ends_with_its_machine(client: Client) -> None:
    machine = CreateMachine(template=SYSTEM_TEMPLATE, name="short", settings=Settings(network="none"), start=True)
    client.finish(client.create(machine))
    with client.console("short") as stream:
        client.finish(client.kill("short"))
        stream.communicate()
    client.finish(client.delete("short"))


def test_logs_of_a_while_and_the_last_lines(client: Client) -> None:
    with client.console("web") as console:
        console.send_input(b"echo line one\necho line two\n")
        collect(console, b"line two\n")
    assert b"".join(client.logs("web", tail=1)) == b"line two\n"
    assert b"".join(client.logs("web", since="1h", tail=2)) == b"line one\nline two\n"
    assert b"".join(client.logs("web", since="2999-01-01")) == b""
    for wrong in ("soon", "", "-5m"):
        with pytest.raises(Invalid, match="illegal time"):
            b"".join(client.logs("web", since=wrong))


@pytest.mark.parametrize(
    ("target", "opening", "kind"),
    [
        ("/1/machines/nobody/exec", b'{"command":["true"]}', NotFound),
        ("/1/machines/BAD/exec", b'{"command":["true"]}', Invalid),
        ("/1/machines/web/exec", b'{"command":[]}', Invalid),
        ("/1/machines/web/exec", b'{"command":"true"}', Invalid),
        ("/1/machines/web/exec", b"nonsense", Invalid),
        ("/1/machines/web/exec", b'{"command":["true"],"user":0}', Invalid),
        ("/1/machines/web/exec", b'{"command":["true"],"timeout_seconds":-1}', Invalid),
        ("/1/machines/web/exec", b'{"command":["true"],"columns":99999999999}', Invalid),
        ("/1/machines/web/console", b'{"history_bytes":-1}', Invalid),
        ("/1/machines/web/console", b'{"history_bytes":1e12}', Invalid),
        ("/1/run", b'{"machine":{"template":"nothing"}}', NotFound),
        ("/1/nowhere", b"{}", Failed),
    ],
)
def test_refusals_are_told(rig: DaemonRig, target: str, opening: bytes, kind: type[Exception]) -> None:
    with pytest.raises(kind), Stream(connect(rig.instance.socket_path, 20), target, opening) as stream:
        stream.communicate()


def test_exec_in_a_stopped_machine_says_how_to_start_it(client: Client) -> None:
    client.finish(client.create(CreateMachine(template=SYSTEM_TEMPLATE, name="off", settings=Settings(network="none"))))
    with pytest.raises(WrongState) as caught:
        client.execute("off", "true")
    assert caught.value.hint == "triarch start off"
    client.finish(client.delete("off"))


def test_a_request_that_is_too_long_says_so(client: Client) -> None:
    with pytest.raises(Invalid, match=r"too long: 1\.9 MiB; the daemon takes 1\.0 MiB"):
        client.exec("anything", ExecRequest(command=("true", "x" * 2_000_000)))
