"""Commands in a running VM: SSH over a virtio-serial port to the server in the guest's hidden root.

It needs no network, no package and no password in the machine. One host process owns the port (QEMU takes one client)
and runs any number of commands over one connection. Both ends prove who they are with keys made for this machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import msgspec

from triarch.errors import Failed, Invalid, TimedOut, Unavailable
from triarch.guest.keys import AgentKeys
from triarch.model.driver import (
    TIMED_OUT_CODE,
    TIMEOUT_GRACE_SECONDS,
    Data,
    EndOfInput,
    ExecRequest,
    Input,
    Resize,
    Stream,
)
from triarch.model.machine import Exit

if TYPE_CHECKING:
    from asyncssh import SSHClientConnection, SSHClientProcess, SSHReader

_BANNER = b"SSH-"
# A port that carries an earlier client's session stays silent; a fresh server may be slow: wait longer each time.
_FIRST_BANNER_SECONDS = 1.0
_LAST_BANNER_SECONDS = 10.0
# A port that is reopened at once still carries the old session: the guest must see the gap.
_RETRY_SECONDS = 0.25
_LOGIN_TIMEOUT_SECONDS = 60.0
_CONNECT_TIMEOUT_SECONDS = 60.0
_HANGUP_SECONDS = 2.0
_LATE_SECONDS = 15.0
_CHUNK_BYTES = 65536
_MAX_ANSWER_BYTES = 256 << 10
# A disk may take twenty seconds to show up, and a large volume long to be written out.
_ASK_SECONDS = 120.0
_END_OF_TRANSMISSION = b"\x04"
# dropbear refuses commands of more than 9,000 bytes; longer requests are sent ahead of their command.
_MAX_COMMAND_BYTES = 8000
MAX_REQUEST_BYTES = 2 << 20
# A request of its own beside those of `exec` (guest/init/session.c).
_SERVE_FILES = "s:files"


class Stdio(Protocol):
    """The far end of a command (as `triarch.drivers.base.Stdio`)."""

    async def read(self) -> Input: ...

    async def write(self, stream: Stream, data: bytes) -> None: ...


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """How a request ended (None: nobody knows), and what was said on standard output and standard error."""

    code: int | None
    output: bytes
    errors: bytes


class Agent:
    """The agent of one running machine. Nothing is opened before the first use; `close` ends all of it."""

    def __init__(self, socket_path: str | Path, keys: AgentKeys) -> None:
        self._socket_path = Path(socket_path)
        self._keys = keys
        self._connection: SSHClientConnection | None = None
        self._connecting = asyncio.Lock()
        self._request_ids = itertools.count(1)

    async def wait_ready(self, timeout_seconds: float) -> None:
        """Return when commands can be run. Raises `TimedOut`; `Unavailable` when the VM is gone."""
        await self._connect(timeout_seconds)

    async def exec(self, request: ExecRequest, stdio: Stdio) -> Exit:
        """Run a command and return how it ended; `code` is None when the machine ended first.

        When the far end is gone, or this is cancelled, the command gets SIGHUP and two seconds later SIGKILL. Raises
        `Invalid` for a request that no program can be given, `Unavailable` or `TimedOut` when there is no agent.
        """
        encoded = encode_request(request)
        connection = await self._connect(_CONNECT_TIMEOUT_SECONDS)
        try:
            process = await self._start(connection, request, encoded)
        except connection_errors() as error:
            raise Unavailable(f"the machine's agent did not run the command: {error}") from error
        if request.timeout_seconds is None:
            return await _converse(process, stdio, terminal=request.terminal)
        return await _converse_for(request.timeout_seconds, process, stdio, terminal=request.terminal)

    async def serve_files(self, stdio: Stdio) -> None:
        """Let the file server in the machine (`guest/files`) speak with the far end; return at its end.

        Raises `Unavailable` or `TimedOut` when there is no agent.
        """
        connection = await self._connect(_CONNECT_TIMEOUT_SECONDS)
        try:
            process = await connection.create_process(_SERVE_FILES, encoding=None)
        except connection_errors() as error:
            raise Unavailable(f"the machine's agent did not start the file server: {error}") from error
        await _converse(process, stdio, terminal=False)

    async def request(self, command: str) -> SSHClientProcess[bytes]:
        """Begin one of the requests of `init/session.c`, whose input and output are the caller's.

        Raises `Unavailable` or `TimedOut` when there is no agent.
        """
        connection = await self._connect(_CONNECT_TIMEOUT_SECONDS)
        try:
            return await connection.create_process(command, encoding=None)
        except connection_errors() as error:
            raise Unavailable(f"the machine's agent did not take a request: {error}") from error

    async def ask(self, command: str, input_bytes: bytes = b"") -> Answer:
        """One of the requests of `init/session.c`, from beginning to end.

        A guest is hostile: one that does not come to its end is `TimedOut`, one that says too much `Failed`.
        """
        try:
            async with asyncio.timeout(_ASK_SECONDS):
                process = await self.request(command)
                try:
                    if input_bytes:
                        process.stdin.write(input_bytes)
                        process.stdin.write_eof()
                    output, errors = await asyncio.gather(_read_all(process.stdout), _read_all(process.stderr))
                    await process.wait_closed()
                    return Answer(code=process.exit_status, output=output, errors=errors)
                finally:
                    process.close()
        except TimeoutError as error:
            raise TimedOut(f"the machine's agent did not do what it was asked within {_ASK_SECONDS:g} s") from error
        except connection_errors() as error:
            raise Unavailable(f"the machine's agent hung up: {error}") from error

    async def close(self) -> None:
        """Let go of the port; commands that still run are hung up."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.abort()
            with contextlib.suppress(*connection_errors()):
                await connection.wait_closed()

    async def _start(
        self, connection: SSHClientConnection, request: ExecRequest, encoded: bytes
    ) -> SSHClientProcess[bytes]:
        if len(encoded) <= _MAX_COMMAND_BYTES:
            command = f"x:{encoded.decode()}"
        else:
            number = next(self._request_ids)
            if (await self.ask(f"p:{number}", encoded)).code != 0:
                raise Unavailable(f"the machine's agent did not take a request of {len(encoded)} bytes")
            command = f"r:{number}"
        return await connection.create_process(
            command,
            encoding=None,
            term_type=request.environment.get("TERM", "xterm-256color") if request.terminal else None,
            term_size=(request.columns, request.rows) if request.terminal else (),
        )

    async def _connect(self, timeout_seconds: float) -> SSHClientConnection:
        async with self._connecting:
            if self._connection is not None and not self._connection.is_closed():
                return self._connection
            try:
                async with asyncio.timeout(timeout_seconds):
                    self._connection = await self._connect_patiently()
            except TimeoutError as error:
                raise TimedOut(f"the machine's agent did not answer within {timeout_seconds:g} seconds") from error
            return self._connection

    async def _connect_patiently(self) -> SSHClientConnection:
        patience = _FIRST_BANNER_SECONDS
        while True:
            try:
                async with _open_port(self._socket_path) as port:
                    if await _sends_banner(port, patience):
                        return await self._log_in(port.dup())
            except (FileNotFoundError, ConnectionRefusedError) as error:
                raise Unavailable(f"the machine's agent port {self._socket_path} is gone") from error
            except connection_errors():
                pass  # a session of an earlier client that is just ending: try again
            await asyncio.sleep(_RETRY_SECONDS)
            patience = min(2 * patience, _LAST_BANNER_SECONDS)

    async def _log_in(self, port: socket.socket) -> SSHClientConnection:
        import asyncssh

        # asyncssh insists on knowing who asks, and a user id of a container need not have a name. Nobody is told it.
        os.environ.setdefault("LOGNAME", "triarch")
        try:
            return await asyncssh.connect(
                host="machine",
                sock=port,
                username="root",
                client_keys=[asyncssh.import_private_key(self._keys.client_key)],
                known_hosts=([asyncssh.import_public_key(self._keys.host_public_key)], [], []),
                config=None,
                agent_path=None,
                preferred_auth=["publickey"],
                compression_algs=["none"],
                login_timeout=_LOGIN_TIMEOUT_SECONDS,
                client_version="triarch",
            )
        except asyncssh.HostKeyNotVerifiable as error:
            port.close()
            raise Failed("what answers on the machine's agent port does not have the machine's key") from error
        except asyncssh.PermissionDenied as error:
            port.close()
            raise Failed("the machine's agent does not accept the key that was made for it") from error
        except BaseException:
            port.close()
            raise


def encode_request(request: ExecRequest) -> bytes:
    """What `init/session.c` executes: a row of netstrings. Raises `Invalid`."""
    variables = [f"{name}={value}" for name, value in request.environment.items()]
    if not request.command and not request.login:
        raise Invalid("there is no command to run")
    if any(not name or "=" in name for name in request.environment):
        raise Invalid("a variable needs a name without '='")
    timeout_ms = 0 if request.timeout_seconds is None else max(1, int(request.timeout_seconds * 1000))
    head = (
        request.user,
        request.directory or ("" if request.login else "/"),
        "1" if request.login else "0",
        str(timeout_ms),
        str(int(TIMEOUT_GRACE_SECONDS * 1000)),
        str(len(request.command)),
    )
    words = (*head, *request.command, *variables)
    if any("\0" in word for word in words):
        raise Invalid("the command or its environment has a NUL character; no program can be given that")
    try:
        encoded = [word.encode() for word in words]
    except UnicodeEncodeError as error:
        raise Invalid("the command or its environment is not valid text") from error
    whole = b"".join(b"%d:%s" % (len(word), word) for word in encoded)
    if len(whole) > MAX_REQUEST_BYTES:
        raise Invalid(f"the command takes {len(whole)} bytes; a VM takes at most {MAX_REQUEST_BYTES}")
    return whole


def connection_errors() -> tuple[type[Exception], ...]:
    """What a connection to an agent can end with."""
    # asyncssh takes a fifth of a second to import: only where an agent is really used.
    import asyncssh

    return (OSError, asyncssh.Error)


@contextlib.asynccontextmanager
async def _open_port(path: Path) -> AsyncIterator[socket.socket]:
    port = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    port.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(port, str(path))
        yield port
    finally:
        port.close()


async def _sends_banner(port: socket.socket, patience_seconds: float) -> bool:
    """Whether a fresh server is at the other end. Not a byte is sent before: it would reach an old session."""
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(port, readable.set)
    try:
        async with asyncio.timeout(patience_seconds):
            await readable.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(port)
    return port.recv(len(_BANNER), socket.MSG_PEEK) == _BANNER


async def _converse_for(
    timeout_seconds: float, process: SSHClientProcess[bytes], stdio: Stdio, *, terminal: bool
) -> Exit:
    """As `_converse`. The guest keeps the time; one that does not is not waited for."""
    began = time.monotonic()
    told = Exit(code=TIMED_OUT_CODE, reason=f"timed out after {timeout_seconds:g} s")
    try:
        async with asyncio.timeout(timeout_seconds + TIMEOUT_GRACE_SECONDS + _LATE_SECONDS) as patience:
            ended = await _converse(process, stdio, terminal=terminal)
    except TimeoutError:
        if not patience.expired():
            raise
        return told
    over = time.monotonic() - began >= timeout_seconds
    return told if over and ended.code == TIMED_OUT_CODE else ended


async def _converse(process: SSHClientProcess[bytes], stdio: Stdio, *, terminal: bool) -> Exit:
    feeding = asyncio.create_task(_feed(process, stdio, terminal=terminal))
    showing = asyncio.gather(_show(process.stdout, Stream.STDOUT, stdio), _show(process.stderr, Stream.STDERR, stdio))
    try:
        # Input that fails means that the far end is gone; input that ends, or never does, says nothing.
        await asyncio.wait((feeding, showing), return_when=asyncio.FIRST_COMPLETED)
        if not showing.done():
            await feeding
        await showing
        await process.wait_closed()
    except BaseException:
        await asyncio.shield(_hang_up(process))
        raise
    finally:
        for task in (feeding, showing):
            task.cancel()
        await asyncio.gather(feeding, showing, return_exceptions=True)
    return _exit_of(process)


async def _feed(process: SSHClientProcess[bytes], stdio: Stdio, *, terminal: bool) -> None:
    while True:
        piece = await stdio.read()
        with contextlib.suppress(*connection_errors()):  # the command closed its input, or ended
            match piece:
                case Data(data):
                    process.stdin.write(data)
                    await process.stdin.drain()
                case Resize(columns, rows):
                    process.change_terminal_size(columns, rows)
                case EndOfInput() if terminal:
                    # A terminal's input does not end: the channel's end would hang up the terminal, output and all.
                    process.stdin.write(_END_OF_TRANSMISSION)
                    return
                case EndOfInput():
                    process.stdin.write_eof()
                    return


async def _show(source: SSHReader[bytes], stream: Stream, stdio: Stdio) -> None:
    while data := await _read(source):
        await stdio.write(stream, data)


async def _read(source: SSHReader[bytes]) -> bytes:
    try:
        return await source.read(_CHUNK_BYTES)
    except connection_errors():
        return b""  # the machine ended: what it said has been shown


async def _read_all(source: SSHReader[bytes]) -> bytes:
    said = b""
    while piece := await source.read(_CHUNK_BYTES):
        said += piece
        if len(said) > _MAX_ANSWER_BYTES:
            raise Failed(f"the machine's agent says more than {_MAX_ANSWER_BYTES >> 10} KiB where a line is wanted")
    return said


async def _hang_up(process: SSHClientProcess[bytes]) -> None:
    for name in ("HUP", "KILL"):
        with contextlib.suppress(*connection_errors()):
            process.send_signal(name)
            async with asyncio.timeout(_HANGUP_SECONDS):
                await process.wait_closed()
                return
    process.close()


def _exit_of(process: SSHClientProcess[bytes]) -> Exit:
    if process.exit_signal is not None:
        name = process.exit_signal[0]
        number = getattr(signal, f"SIG{name}", None)
        return Exit(code=None if number is None else 128 + number, reason=f"killed by signal {name}")
    if process.exit_status is None:
        return Exit(code=None, reason="the machine ended before the command did")
    return Exit(code=process.exit_status)
