"""The client: one method for each thing that the daemon can do."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, TypeVar
from urllib.parse import quote

import msgspec

from triarch.client.connection import Connection, Upload, connect
from triarch.client.problems import error_of
from triarch.errors import Failed, Invalid
from triarch.model.driver import Architecture, ExecRequest, Usage
from triarch.model.event import Event
from triarch.model.instance import Instance
from triarch.model.machine import (
    CreateMachine,
    MachineView,
    RenameMachine,
    SetMachine,
    SettingChange,
    StopMachine,
    SwitchMachine,
)
from triarch.model.operation import Operation
from triarch.model.request import BuildTemplate, Check
from triarch.model.server import ServerInfo
from triarch.model.stream import ConsoleRequest, FilesRequest, RunRequest
from triarch.model.template import Template

if TYPE_CHECKING:
    from triarch.client.backups import Backups
    from triarch.client.devices import Devices
    from triarch.client.files import Files
    from triarch.client.networks import Networks
    from triarch.client.profiles import Profiles
    from triarch.client.snapshots import Snapshots
    from triarch.client.stream import Completed, Stream
    from triarch.client.usage import Usages

T = TypeVar("T")

# The longest that the daemon may be silent: it may try an architecture for real before it answers.
TIMEOUT_SECONDS = 120.0
WAIT_SECONDS = 30.0
UPLOAD_PIECE_BYTES = 256 << 10


class Client:
    """Speaks to the daemon of one instance over its unix socket. Blocking; one object belongs to one thread.

    Every method raises the errors that the daemon raised, as the same classes, and `DaemonUnavailable` or `Denied`
    when it cannot be reached. Changes return the `Operation` that runs; `finish` waits for it.
    """

    def __init__(self, instance: Instance, timeout_seconds: float = TIMEOUT_SECONDS) -> None:
        self._socket_path = instance.socket_path
        self._timeout_seconds = timeout_seconds
        self._connection = Connection(instance.socket_path, timeout_seconds)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def connect(self) -> None:
        """Connect now and not at the first request. Raises `DaemonUnavailable` or `Denied`."""
        self._connection.open()

    def close(self) -> None:
        self._connection.close()

    def _get(self, target: str, kind: type[T], patience_seconds: float = 0.0) -> T:
        return self._decode(self._connection.request("GET", target, None, patience_seconds), kind)

    def _change(
        self, method: str, target: str, body: msgspec.Struct | None = None, etag: str | None = None
    ) -> Operation:
        return self._decode(self._send(method, target, body, etag), Operation)

    def _send(self, method: str, target: str, body: msgspec.Struct | None = None, etag: str | None = None) -> bytes:
        if body is None:
            return self._connection.request(method, target)
        encoded = msgspec.json.encode(body)
        return self._connection.request(method, target, Upload("application/json", len(encoded), (encoded,), etag))

    def _decode(self, body: bytes, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(body, type=kind)
        except msgspec.MsgspecError as error:
            raise Failed(f"cannot understand the daemon's answer: {error}", hint="triarch version") from error

    # -- nouns with a module of their own

    @property
    def profiles(self) -> Profiles:
        from triarch.client.profiles import Profiles

        return Profiles(self)

    @property
    def files(self) -> Files:
        from triarch.client.files import Files

        return Files(self)

    @property
    def usages(self) -> Usages:
        from triarch.client.usage import Usages

        return Usages(self)

    @property
    def snapshots(self) -> Snapshots:
        from triarch.client.snapshots import Snapshots

        return Snapshots(self)

    @property
    def networks(self) -> Networks:
        from triarch.client.networks import Networks

        return Networks(self)

    @property
    def devices(self) -> Devices:
        from triarch.client.devices import Devices

        return Devices(self)

    @property
    def backups(self) -> Backups:
        from triarch.client.backups import Backups

        return Backups(self)

    # -- the daemon and its host

    def server(self) -> ServerInfo:
        return self._get("/1", ServerInfo)

    def request_raw(self, target: str) -> bytes:
        """The undecoded answer to GET `target`."""
        return self._connection.request("GET", target)

    def openapi(self) -> bytes:
        """The API's description as an OpenAPI document in JSON."""
        return self.request_raw("/schema/openapi.json")

    def architectures(self, *, refresh: bool = False) -> tuple[Architecture, ...]:
        return self._get(f"/1/architectures?refresh={_flag(refresh)}", tuple[Architecture, ...])

    def doctor(self) -> tuple[Check, ...]:
        return self._get("/1/doctor", tuple[Check, ...])

    def down(self, *, until_boot: bool = False) -> Operation:
        """Stop every machine and clear the host; the daemon ends when the operation has succeeded.

        With `until_boot` the machines that ran are started again when the host has booted.
        """
        return self._change("POST", f"/1/down?until_boot={_flag(until_boot)}")

    def wait_closed(self) -> None:
        """Return when the daemon has closed the connection, as it does when it ends."""
        self._connection.wait_closed()

    # -- machines

    def machines(self) -> tuple[MachineView, ...]:
        return self._get("/1/machines", tuple[MachineView, ...])

    def machine(self, name: str) -> MachineView:
        return self._get(_machine(name), MachineView)

    def wait_machine(self, name: str, *words: str, wait_seconds: float = WAIT_SECONDS) -> MachineView:
        """The machine once its state or its health is one of `words`, or as it is after `wait_seconds`."""
        query = "&".join(f"until={quote(word, safe='')}" for word in words)
        return self._get(f"{_machine(name)}/wait?{query}&wait_seconds={wait_seconds}", MachineView, wait_seconds)

    def create(self, request: CreateMachine) -> Operation:
        return self._change("POST", "/1/machines", request)

    def delete(self, name: str, *, force: bool = False) -> Operation:
        return self._change("DELETE", f"{_machine(name)}?force={_flag(force)}")

    def start(self, name: str) -> Operation:
        return self._change("POST", f"{_machine(name)}/start")

    def stop(self, name: str, request: StopMachine | None = None) -> Operation:
        return self._change("POST", f"{_machine(name)}/stop", request or StopMachine())

    def restart(self, name: str, request: StopMachine | None = None) -> Operation:
        return self._change("POST", f"{_machine(name)}/restart", request or StopMachine())

    def kill(self, name: str) -> Operation:
        return self._change("POST", f"{_machine(name)}/kill")

    def pause(self, name: str) -> Operation:
        return self._change("POST", f"{_machine(name)}/pause")

    def resume(self, name: str) -> Operation:
        return self._change("POST", f"{_machine(name)}/resume")

    def rename(self, name: str, new_name: str) -> Operation:
        return self._change("POST", f"{_machine(name)}/rename", RenameMachine(name=new_name))

    def set(self, name: str, request: SetMachine) -> Operation:
        """The operation's result says what takes effect when. Raises what the machine refuses, and `Busy`."""
        return self._change("POST", f"{_machine(name)}/set", request)

    def check_set(self, name: str, request: SetMachine) -> tuple[SettingChange, ...]:
        """What `set` would change."""
        body = self._send("POST", f"{_machine(name)}/set", msgspec.structs.replace(request, check=True))
        return self._decode(body, tuple[SettingChange, ...])

    def switch(self, name: str, request: SwitchMachine) -> Operation | None:
        """None when the request only checks, and the switch would be possible."""
        body = self._send("POST", f"{_machine(name)}/switch", request)
        return self._decode(body, Operation) if body else None

    def usage(self, name: str) -> Usage:
        """What a running machine uses now. Raises `WrongState` when it does not run."""
        return self._get(f"{_machine(name)}/usage", Usage)

    def logs(
        self, name: str, *, follow: bool = False, since: str | None = None, tail: int | None = None
    ) -> Iterator[bytes]:
        """The machine's console output; with `follow` until it stops.

        `since` is `10m` (ago) or a date and time, `tail` the most lines of what was kept.
        """
        from urllib.parse import quote

        wishes = (f"&since={quote(since, safe='')}" if since is not None else "") + (
            f"&tail={tail}" if tail is not None else ""
        )
        target = f"{_machine(name)}/logs?follow={_flag(follow)}{wishes}"
        return self._connection.stream("GET", target, None, None)

    # -- operations

    def operations(self) -> tuple[Operation, ...]:
        return self._get("/1/operations", tuple[Operation, ...])

    def operation(self, operation_id: str, wait_seconds: float = 0.0) -> Operation:
        """The operation when it has ended, or as it is after `wait_seconds`."""
        target = f"/1/operations/{quote(operation_id, safe='')}?wait_seconds={wait_seconds}"
        return self._get(target, Operation, wait_seconds)

    def cancel(self, operation_id: str) -> Operation:
        return self._change("DELETE", f"/1/operations/{quote(operation_id, safe='')}")

    def wait(self, operation: Operation) -> Operation:
        """The operation when it has ended, however it ended."""
        while not operation.status.ended:
            operation = self.operation(operation.id, WAIT_SECONDS)
        return operation

    def finish(self, operation: Operation) -> Operation:
        """The operation when it has succeeded. Raises the error that it ended with."""
        operation = self.wait(operation)
        if operation.error is not None:
            raise error_of(operation.error)
        return operation

    # -- templates

    def templates(self) -> tuple[Template, ...]:
        return self._get("/1/templates", tuple[Template, ...])

    def template(self, ref: str) -> Template:
        return self._get(f"/1/templates/{quote(ref, safe='@')}", Template)

    def build_template(self, request: BuildTemplate) -> Operation:
        return self._change("POST", "/1/templates", request)

    def import_template(self, name: str, archive: Path) -> Operation:
        """Upload a root file system archive. Raises `Invalid` for no file, `OSError` when it cannot be read."""
        with archive.open("rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise Invalid(f"cannot import '{archive}': it is no ordinary file")
            upload = Upload("application/octet-stream", status.st_size, _pieces_of(file, archive, status.st_size))
            body = self._connection.request("PUT", f"/1/templates/{quote(name, safe='')}", upload)
        return self._decode(body, Operation)

    def delete_template(self, ref: str) -> Operation:
        return self._change("DELETE", f"/1/templates/{quote(ref, safe='@')}")

    # -- streams

    def _open(self, target: str, request: msgspec.Struct | None = None) -> Stream:
        from triarch.client.stream import Stream

        return Stream(
            connect(self._socket_path, self._timeout_seconds),
            target,
            b"{}" if request is None else msgspec.json.encode(request),
        )

    def exec(self, name: str, request: ExecRequest) -> Stream:
        """Run a command in a running machine, with this end of its input and output in the caller's hands."""
        return self._open(f"{_machine(name)}/exec", request)

    def execute(self, name: str, *command: str, input_bytes: bytes = b"") -> Completed:
        """Run a command in a running machine to its end and return all its output."""
        with self.exec(name, ExecRequest(command=command)) as stream:
            return stream.communicate(input_bytes)

    def open_files(self, name: str, request: FilesRequest) -> Stream:
        """Speak with the file server in a machine; `client.files` does."""
        return self._open(f"{_machine(name)}/files", request)

    def console(self, name: str, request: ConsoleRequest | None = None) -> Stream:
        """Attach to a machine's console; as many as want to may."""
        return self._open(f"{_machine(name)}/console", request)

    def run(self, request: RunRequest) -> Stream:
        """Run a command in a throw-away machine; closing the stream early removes it."""
        return self._open("/1/run", request)

    def events(self) -> Iterator[Event]:
        """Every event from the time that the first one is asked for; ends when the daemon ends."""
        from triarch.client.stream import read_events

        return read_events(connect(self._socket_path, self._timeout_seconds))


def _pieces_of(file: BinaryIO, path: Path, size_bytes: int) -> Iterator[bytes]:
    """Exactly `size_bytes`: what is appended meanwhile is left out. Raises `Failed` when the file was cut."""
    left = size_bytes
    while left:
        piece = file.read(min(left, UPLOAD_PIECE_BYTES))
        if not piece:
            raise Failed(f"'{path}' was cut while it was read: {left} of {size_bytes} bytes are missing")
        left -= len(piece)
        yield piece


def _machine(name: str) -> str:
    return f"/1/machines/{quote(name, safe='')}"


def _flag(value: bool) -> str:
    return "true" if value else "false"
