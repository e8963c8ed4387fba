"""The client's end of a stream; the messages are described in `triarch.model.stream`."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from select import POLLIN, POLLOUT, poll
from types import TracebackType

import msgspec

from triarch.client.connection import HOST, RECEIVE_BYTES
from triarch.client.http import BrokenProtocol, Response
from triarch.client.problems import error_of, error_of_response
from triarch.client.websocket import Close, Handshake, Messages
from triarch.errors import DaemonUnavailable, Exhausted, Failed, Invalid
from triarch.model.driver import Resize
from triarch.model.event import Event
from triarch.model.machine import Exit
from triarch.model.resources import format_size
from triarch.model.stream import MAX_DATA_BYTES, MAX_MESSAGE_BYTES, STDERR, STDIN, STDOUT, TOO_SLOW, Control, Ending

# More than this is not taken from the caller before the daemon has taken what there is.
MAX_OUTGOING_BYTES = 256 << 10
SWITCHING = 101


class Output(msgspec.Struct, frozen=True):
    """Bytes that the command wrote; `channel` is STDOUT or STDERR of `triarch.model.stream`."""

    channel: int
    data: bytes


class Completed(msgspec.Struct, frozen=True):
    """A command that has ended."""

    exit: Exit
    stdout: bytes
    stderr: bytes


class WebSocket:
    """An open WebSocket on a socket, which is then read and written without waiting."""

    def __init__(self, connection: socket.socket, target: str) -> None:
        """Open a WebSocket at `target` (blocking). Raises the error that the daemon refused with."""
        self._socket = connection
        self._messages = Messages()
        self._outgoing = bytearray()
        self._closed = False
        handshake = Handshake(HOST, target)
        connection.sendall(handshake.request)
        with _explained():
            response = Response(lambda: connection.recv(RECEIVE_BYTES))
            if response.status != SWITCHING:
                raise error_of_response(response.status, b"".join(response.body()))
            handshake.check(response)
        self._early = response.take_rest()
        connection.setblocking(False)

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    @property
    def outgoing_bytes(self) -> int:
        """What waits to be sent."""
        return len(self._outgoing)

    def send(self, message: bytes | str) -> None:
        """Queue a message and send what the daemon takes now."""
        # When the daemon has said its last word already, that comes with the next `receive`.
        if not self._closed:
            self._outgoing += self._messages.encode(message)
        self.flush()

    def flush(self) -> None:
        """Send as much as the daemon takes now."""
        try:
            while self._outgoing:
                sent = self._socket.send(self._outgoing)
                del self._outgoing[:sent]
        except BlockingIOError:
            return
        except ConnectionError:
            self._outgoing.clear()

    def receive(self) -> Iterator[bytes | str | int]:
        """The messages that have come, without waiting: binary ones, text, the code of the close.

        Raises `DaemonUnavailable` when the daemon vanished, `Failed` when it does not speak the protocol.
        """
        with _explained():
            for message in self._messages.receive(self._received()):
                if isinstance(message, Close):
                    self._closed = True
                    yield message.code
                else:
                    yield message
        self._outgoing += self._messages.take_due()
        self.flush()

    def _received(self) -> bytes:
        early, self._early = self._early, b""
        try:
            data = self._socket.recv(RECEIVE_BYTES)
        except BlockingIOError:
            return early
        if not data and not early:
            raise ConnectionResetError("the daemon closed the connection")
        return early + data


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """What can go wrong with a connection, as errors that people read."""
    try:
        yield
    except BrokenProtocol as error:
        raise Failed(f"the daemon broke the WebSocket protocol: {error}") from error
    except ConnectionError as error:
        raise DaemonUnavailable("the daemon ended and closed the stream") from error


class Stream:
    """A command's or console's input and output. Nothing blocks but `communicate`: poll `fileno` between calls.

    Poll for writing too while `wants_write`; take no more input from wherever it comes while `full`.
    """

    def __init__(self, connection: socket.socket, target: str, opening: bytes) -> None:
        """`opening` is the request as JSON. Raises `Invalid` when it is longer than the daemon takes."""
        try:
            if len(opening) > MAX_MESSAGE_BYTES:
                raise Invalid(
                    f"the command and its environment are too long: {format_size(len(opening))}; "
                    f"the daemon takes {format_size(MAX_MESSAGE_BYTES)}"
                )
            self._websocket = WebSocket(connection, target)
        except BaseException:
            connection.close()
            raise
        self._ending: Ending | None = None
        self._websocket.send(opening.decode())

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up: a command that still runs is ended."""
        self._websocket.close()

    def fileno(self) -> int:
        return self._websocket.fileno()

    @property
    def wants_write(self) -> bool:
        return self._websocket.outgoing_bytes > 0

    @property
    def full(self) -> bool:
        return self._websocket.outgoing_bytes > MAX_OUTGOING_BYTES

    def flush(self) -> None:
        self._websocket.flush()

    def send_input(self, data: bytes) -> None:
        for start in range(0, len(data), MAX_DATA_BYTES):
            self._websocket.send(bytes([STDIN]) + data[start : start + MAX_DATA_BYTES])

    def end_input(self) -> None:
        self._websocket.send(msgspec.json.encode(Control(eof=True)).decode())

    def resize(self, columns: int, rows: int) -> None:
        self._websocket.send(msgspec.json.encode(Control(resize=Resize(columns=columns, rows=rows))).decode())

    def receive(self) -> Iterator[Output]:
        """The output that has come. After the last of it `ending` is there."""
        for item in self._websocket.receive():
            if isinstance(item, bytes):
                yield Output(item[0] if item else STDOUT, item[1:])
            elif isinstance(item, str):
                self._ending = msgspec.json.decode(item, type=Ending)
            elif self._ending is None:
                raise DaemonUnavailable("the daemon is ending and closed the stream")

    @property
    def ending(self) -> Ending | None:
        """How it ended. Raises the error that the daemon ended the stream with."""
        if self._ending is not None and self._ending.error is not None:
            raise error_of(self._ending.error)
        return self._ending

    def communicate(self, input_bytes: bytes = b"") -> Completed:
        """Send input, collect output until the end (blocking). Raises the error that the daemon ended it with."""
        stdout, stderr = bytearray(), bytearray()
        view, sent, ended = memoryview(input_bytes), 0, False
        while (ending := self.ending) is None:
            if not self.full and not ended:
                self.send_input(bytes(view[sent : sent + MAX_DATA_BYTES]))
                sent += MAX_DATA_BYTES
                if sent >= len(view):
                    self.end_input()
                    ended = True
            wait(self, write=not ended)
            for output in self.receive():
                (stderr if output.channel == STDERR else stdout).extend(output.data)
        return Completed(ending.exit or Exit(code=None), bytes(stdout), bytes(stderr))


def wait(stream: Stream, *, write: bool = False) -> None:
    """Block until something came, or, when there is something to send or `write`, until there is room to send it."""
    poller = poll()
    poller.register(stream.fileno(), POLLIN | (POLLOUT if write or stream.wants_write else 0))
    poller.poll()
    stream.flush()


def read_events(connection: socket.socket) -> Iterator[Event]:
    """The daemon's events (blocking). Ends when the daemon ends; raises `Exhausted` when this reader was too slow."""
    poller = poll()
    try:
        websocket = WebSocket(connection, "/1/events")
        poller.register(connection, POLLIN)
        while True:
            for item in websocket.receive():
                if isinstance(item, str):
                    yield msgspec.json.decode(item, type=Event)
                elif item == TOO_SLOW:
                    raise Exhausted("the event stream was closed: events were read too slowly")
                elif isinstance(item, int):
                    return
            poller.poll()
    finally:
        connection.close()
