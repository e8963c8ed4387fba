"""Machines, operations and templates over HTTP, through the typed client and below it."""

from __future__ import annotations

import http.client
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from triarch.client import Client
from triarch.errors import (
    Busy,
    Cancelled,
    Conflict,
    DaemonUnavailable,
    Exhausted,
    Exists,
    InUse,
    Invalid,
    MachineFailed,
    NotFound,
    WrongState,
)
from triarch.model.instance import instance_at
from triarch.model.machine import CreateMachine, StopMachine, SwitchMachine
from triarch.model.network import Forward
from triarch.model.operation import OperationStatus
from triarch.model.settings import Settings
from triarch.model.state import State
from triarch.testing.daemon_rig import APP_TEMPLATE, SYSTEM_TEMPLATE, DaemonRig


class Raw(http.client.HTTPConnection):
    """Plain HTTP on the daemon's socket: what a client of another language sees."""

    def __init__(self, path: Path) -> None:
        super().__init__("triarch", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(str(self._path))

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[Any, dict[str, str], Any]:
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        self.request(method, path, body, fields)
        response = self.getresponse()
        data = response.read()
        found = {name.lower(): value for name, value in response.getheaders()}
        return response.status, found, json.loads(data) if data else None


@pytest.fixture
def raw(rig: DaemonRig) -> Iterator[Raw]:
    connection = Raw(rig.instance.socket_path)
    yield connection
    connection.close()


def launch(client: Client, name: str, **values: Any) -> None:
    request = CreateMachine(
        template=SYSTEM_TEMPLATE, name=name, settings=Settings(network="none", **values), start=True
    )
    client.finish(client.create(request))


def test_a_machine_from_its_beginning_to_its_end(client: Client) -> None:
    operation = client.create(CreateMachine(template=SYSTEM_TEMPLATE, name="life", settings=Settings(network="none")))
    assert operation.target == "machine/life"
    assert client.finish(operation).status is OperationStatus.SUCCEEDED
    assert client.machine("life").state is State.STOPPED
    client.finish(client.start("life"))
    assert client.machine("life").state is State.RUNNING
    client.finish(client.restart("life"))
    client.finish(client.stop("life", StopMachine(timeout_seconds=5)))
    client.finish(client.rename("life", "afterlife"))
    assert [view.name for view in client.machines() if "life" in view.name] == ["afterlife"]
    client.finish(client.start("afterlife"))
    client.finish(client.kill("afterlife"))
    client.finish(client.delete("afterlife"))
    with pytest.raises(NotFound):
        client.machine("afterlife")


def test_usage_and_pause(client: Client) -> None:
    launch(client, "frozen")
    usage = client.usage("frozen")
    assert usage.memory_bytes > 0
    assert usage.disk_bytes is not None
    client.finish(client.pause("frozen"))
    assert client.machine("frozen").state is State.PAUSED
    with pytest.raises(WrongState):
        client.usage("frozen")
    with pytest.raises(WrongState) as caught:
        client.stop("frozen")
    assert caught.value.hint == "triarch resume frozen"
    client.finish(client.resume("frozen"))
    assert client.machine("frozen").state is State.RUNNING
    client.finish(client.delete("frozen", force=True))


def test_refusals_come_back_as_the_classes_they_were(client: Client) -> None:
    launch(client, "refuse")
    cases: list[tuple[type[Exception], Any]] = [
        (NotFound, lambda: client.machine("nobody")),
        (NotFound, lambda: client.create(CreateMachine(template="nothing"))),
        (Exists, lambda: client.create(CreateMachine(template=SYSTEM_TEMPLATE, name="refuse"))),
        (Invalid, lambda: client.create(CreateMachine(template=SYSTEM_TEMPLATE, name="Bad_Name"))),
        (Invalid, lambda: client.create(CreateMachine(template=SYSTEM_TEMPLATE, architecture="vax"))),
        (Invalid, lambda: client.switch("refuse", SwitchMachine(architecture="fake", check=True))),
        (WrongState, lambda: client.delete("refuse")),
        (WrongState, lambda: client.start("refuse")),
        (InUse, lambda: client.delete_template(SYSTEM_TEMPLATE)),
        (NotFound, lambda: client.operation("abc")),
    ]
    for kind, act in cases:
        with pytest.raises(kind):
            act()
    with pytest.raises(WrongState) as caught:
        client.delete("refuse")
    assert caught.value.hint == "triarch stop refuse"
    assert caught.value.fields["state"] == "running"
    client.finish(client.delete("refuse", force=True))


def test_a_start_that_fails_is_told_by_its_operation(client: Client) -> None:
    with pytest.raises(MachineFailed, match="no luck today"):
        launch(client, "unlucky", environment={"fake.fail-start": "no luck today"})
    assert "unlucky" not in names(client)


def names(client: Client) -> list[str]:
    return [view.name for view in client.machines()]


def test_two_clients_at_one_machine(client: Client, rig: DaemonRig) -> None:
    request = CreateMachine(
        template=SYSTEM_TEMPLATE,
        name="slow",
        settings=Settings(network="none", environment={"fake.start-seconds": "1"}),
    )
    client.finish(client.create(request))
    operation = client.start("slow")
    with rig.client() as other:
        with pytest.raises(Busy) as caught:
            other.delete("slow", force=True)
        assert caught.value.fields["operation"] == operation.id
        assert other.machine("slow").operation == operation.id
        assert other.finish(operation).status is OperationStatus.SUCCEEDED
    client.finish(client.delete("slow", force=True))


def test_cancelling_undoes(client: Client) -> None:
    request = CreateMachine(
        template=SYSTEM_TEMPLATE,
        name="halted",
        settings=Settings(network="none", environment={"fake.start-seconds": "60"}),
        start=True,
    )
    operation = client.create(request)
    # Until the start itself is under way.
    while client.operation(operation.id).progress.step != "boot":
        time.sleep(0.02)
    client.cancel(operation.id)
    with pytest.raises(Cancelled):
        client.finish(operation)
    assert "halted" not in names(client)
    with pytest.raises(Conflict, match="has ended"):
        client.cancel(operation.id)


def test_waiting_ends_with_the_operation_or_the_time(client: Client) -> None:
    request = CreateMachine(
        template=SYSTEM_TEMPLATE,
        name="timed",
        settings=Settings(network="none", environment={"fake.start-seconds": "1"}),
    )
    client.finish(client.create(request))
    operation = client.start("timed")
    began = time.monotonic()
    assert not client.operation(operation.id, wait_seconds=0.2).status.ended
    assert time.monotonic() - began >= 0.15
    assert client.operation(operation.id, wait_seconds=30).status.ended
    assert time.monotonic() - began < 10
    client.finish(client.delete("timed", force=True))


def test_etags_guard_changes(raw: Raw, client: Client) -> None:
    launch(client, "tagged")
    status, headers, body = raw.ask("GET", "/1/machines/tagged")
    assert status == 200 and headers["etag"] == f'"{body["etag"]}"'
    client.finish(client.restart("tagged"))
    status, headers, problem = raw.ask("DELETE", "/1/machines/tagged?force=true", If_Match=headers["etag"])
    assert (status, problem["code"], problem["status"]) == (412, "stale", 412)
    assert headers["content-type"] == "application/problem+json"
    _, headers, _ = raw.ask("GET", "/1/machines/tagged")
    status, headers, operation = raw.ask(
        "DELETE", "/1/machines/tagged?force=true", If_Match=f'"other", {headers["etag"]}'
    )
    assert status == 202
    assert headers["location"] == f"/1/operations/{operation['id']}"
    assert raw.ask("GET", headers["location"] + "?wait_seconds=30")[2]["status"] == "succeeded"


def test_what_no_kernel_would_take_is_refused(client: Client, raw: Raw) -> None:
    def request(**values: Any) -> CreateMachine:
        return CreateMachine(template=SYSTEM_TEMPLATE, name="odd", settings=Settings(network="none", **values))

    for environment in ({"A=B": "c"}, {"": "c"}, {"A\0": "c"}, {"A\x1b[2J": "c"}, {"A": "b\0c"}):
        with pytest.raises(Invalid, match="illegal environment variable"):
            client.create(request(environment=environment))
    for command in (("",), ("true", "a\0b")):
        with pytest.raises(Invalid, match="illegal command"):
            client.create(msgspec.structs.replace(request(), command=command))
    for address in ("1.1.1.1,guestfwd=tcp:1.2.3.4:1-cmd:id", "256.1.1.1", "1.1.1.1\n", "localhost", ""):
        with pytest.raises(Invalid, match="host_address"):
            client.create(request(forwards=(Forward(host_port=1, machine_port=1, host_address=address),)))
    status, _, problem = raw.ask("POST", "/1/machines", b"[" * 100_000, Content_Type="application/json")
    assert (status, problem["message"]) == (400, "invalid request: the body is nested too deep")
    status, _, problem = raw.ask("OPTIONS", "*")
    assert (status, problem["message"]) == (404, "there is no path *")
    status, _, problem = raw.ask("POST", "/1/machines", b" " * (2 << 20), Content_Type="application/json")
    assert (status, problem["message"]) == (413, "the body is too long: this daemon takes 1.0 MiB")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b'{"name": "x"}', "template"),
        (b'{"template": 5}', "template"),
        (b'{"template": "tiny", "nmae": "x"}', "nmae"),
        (b'{"template": "tiny", "settings": {"cpus": "many"}}', "settings.cpus"),
        (b'{"template": "tiny", "settings": {"cpus": -1}}', "cpus"),
        (b'{"template": "tiny", "settings": {"forwards": [{"host_port": 70000, "machine_port": 1}]}}', "host_port"),
        (b"[]", ""),
        (b"{nonsense", ""),
        (b"\xff\xfe", ""),
        (b"", ""),
    ],
)
def test_bodies_of_the_wrong_shape_name_the_field(raw: Raw, body: bytes, field: str) -> None:
    status, headers, problem = raw.ask("POST", "/1/machines", body, Content_Type="application/json")
    assert (status, problem["code"]) == (400, "invalid"), problem
    assert headers["content-type"] == "application/problem+json"
    assert field in problem["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nowhere", 404, "not-found"),
        ("GET", "/1/machines/..%2f..%2fetc", 404, "not-found"),
        ("GET", "/1/machines/UPPER", 400, "invalid"),
        ("GET", "/1/machines/%00", 400, "invalid"),
        ("GET", "/1/templates/a@0", 400, "invalid"),
        ("PATCH", "/1/machines", 405, "invalid"),
        ("GET", "/1/operations/x?wait_seconds=-1", 400, "invalid"),
        ("GET", "/1/operations/x?wait_seconds=nan", 400, "invalid"),
        ("GET", "/1/operations/x?wait_seconds=soon", 400, "invalid"),
    ],
)
def test_bad_paths_and_queries_are_problems(raw: Raw, method: str, path: str, status: int, code: str) -> None:
    found, headers, problem = raw.ask(method, path)
    assert (found, problem["code"]) == (status, code), problem
    assert headers["content-type"] == "application/problem+json"


def test_a_body_over_a_mebibyte_is_refused(raw: Raw) -> None:
    body = json.dumps({"template": "t" * (2 << 20)}).encode()
    status, _, problem = raw.ask("POST", "/1/machines", body, Content_Type="application/json")
    assert (status, problem["code"]) == (413, "invalid")


def test_logs_are_followed_to_the_end(client: Client, rig: DaemonRig) -> None:
    client.finish(
        client.create(
            CreateMachine(template=APP_TEMPLATE, name="talker", settings=Settings(network="none"), start=True)
        )
    )
    assert b"".join(client.logs("talker")) == b"hello\n"
    pieces: list[bytes] = []
    follower = threading.Thread(target=lambda: pieces.extend(rig.client().logs("talker", follow=True)))
    follower.start()
    time.sleep(0.3)
    assert follower.is_alive()
    client.finish(client.kill("talker"))
    follower.join(20)
    assert not follower.is_alive() and b"".join(pieces) == b"hello\n"
    client.finish(client.delete("talker"))


def test_an_upload_that_cannot_be_a_template_leaves_nothing(client: Client, rig: DaemonRig, tmp_path: Path) -> None:
    archive = tmp_path / "junk.tar"
    archive.write_bytes(os.urandom(3 << 20))
    with pytest.raises(Invalid, match="template name"):
        client.import_template("Bad Name", archive)
    with pytest.raises(Exists):
        client.import_template(SYSTEM_TEMPLATE, archive)
    work = Path(rig.instance.state_dir) / "work"
    assert list(work.glob("upload-*")) == []


def test_an_upload_that_breaks_off_leaves_nothing(rig: DaemonRig, client: Client) -> None:
    work = Path(rig.instance.state_dir) / "work"
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(rig.instance.socket_path))
        connection.sendall(
            b"PUT /1/templates/cut HTTP/1.1\r\nHost: t\r\nContent-Length: 9000000\r\n\r\n" + b"x" * 2_000_000
        )
        wait_until(lambda: len(list(work.glob("upload-*"))) == 1)
        assert [stat.S_IMODE(path.stat().st_mode) for path in work.glob("upload-*")] == [0o600]
    wait_until(lambda: not list(work.glob("upload-*")))
    assert "cut" not in [template.name for template in client.templates()]
    assert "Traceback" not in rig.log()


def test_an_upload_larger_than_the_disk_is_refused_at_once(rig: DaemonRig) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(rig.instance.socket_path))
        connection.sendall(b"PUT /1/templates/huge HTTP/1.1\r\nHost: t\r\nContent-Length: 900000000000000\r\n\r\n")
        answer = b""
        while b"}" not in answer:
            answer += connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 507") and b'"code":"exhausted"' in answer


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_no_daemon_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(DaemonUnavailable, match="no daemon answers"):
        Client(instance_at(tmp_path)).machines()


def test_more_than_the_host_has_is_refused(client: Client) -> None:

    with pytest.raises(Exhausted, match="this host has"):
        client.create(CreateMachine(template=SYSTEM_TEMPLATE, settings=Settings(memory_bytes=1 << 45)))


def test_events_tell_of_a_machine(client: Client, rig: DaemonRig) -> None:
    kinds: list[str] = []
    ready = threading.Event()

    def listen() -> None:
        with rig.client() as listener:
            events = listener.events()
            ready.set()
            for event in events:
                kinds.append(event.kind)
                if event.kind == "operation-ended" and event.target == "machine/heard":
                    return

    thread = threading.Thread(target=listen)
    thread.start()
    ready.wait()
    time.sleep(0.3)
    launch(client, "heard")
    thread.join(20)
    assert kinds[0] == "operation-created" and kinds[-1] == "operation-ended"
    client.finish(client.delete("heard", force=True))
