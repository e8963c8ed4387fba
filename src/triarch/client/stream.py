"""The client's end of a stream; the messages are described in `triarch.model.stream`."""

from __future__ import annotations

import contextlib
import socket
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from select import POLLIN, POLLOUT, poll
from types import TracebackType

import msgspec
from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Ping,
    RejectConnection,
    RejectData,
    Request,
    TextMessage,
)
from wsproto.utilities import LocalProtocolError, RemoteProtocolError

from triarch.client.connection import HOST, RECEIVE_BYTES
from triarch.client.problems import error_of, error_of_response
from triarch.errors import DaemonUnavailable, Exhausted, Failed, Invalid
from triarch.model.driver import Resize
from triarch.model.event import Event
from triarch.model.machine import Exit
from triarch.model.resources import format_size
from triarch.model.stream import MAX_DATA_BYTES, MAX_MESSAGE_BYTES, STDERR, STDIN, STDOUT, TOO_SLOW, Control, Ending

# More than this is not taken from the caller before the daemon has taken what there is.
MAX_OUTGOING_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class Output:
    """Bytes that the command wrote; `channel` is STDOUT or STDERR of `triarch.model.stream`."""

    channel: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Completed:
    """A command that has ended."""

    exit: Exit
    stdout: bytes
    stderr: bytes


class WebSocket:
    """wsproto on a socket: text messages as a whole, and binary ones, which carry output, in pieces as they come."""

    def __init__(self, connection: socket.socket, target: str) -> None:
        """Open a WebSocket at `target` (blocking). Raises the error that the daemon refused with."""
        self._socket = connection
        self._protocol = WSConnection(ConnectionType.CLIENT)
        self._outgoing = bytearray()
        self._received: deque[BytesMessage | TextMessage | CloseConnection] = deque()
        self._text = ""
        self._channel: int | None = None
        self._open = False
        self._refusal: RejectConnection | None = None
        self._refusal_body = b""
        connection.sendall(self._protocol.send(Request(host=HOST, target=target)))
        while not self._open:
            self._feed()
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
        event = TextMessage(data=message) if isinstance(message, str) else BytesMessage(data=message)
        # When the daemon has said its last word already, that comes with the next `receive`.
        with contextlib.suppress(LocalProtocolError):
            self._outgoing += self._protocol.send(event)
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

    def receive(self) -> Iterator[Output | str | int]:
        """What has come, without waiting: pieces of binary messages, whole text messages, the code of the close.

        Raises `DaemonUnavailable` when the daemon vanished.
        """
        try:
            self._feed()
        except BlockingIOError:
            pass
        except ConnectionError as error:
            raise DaemonUnavailable("the daemon ended and closed the stream") from error
        while self._received:
            event = self._received.popleft()
            if isinstance(event, CloseConnection):
                yield event.code
            elif isinstance(event, BytesMessage):
                yield self._output(event)
            else:
                self._text += event.data
                if event.message_finished:
                    yield self._text
                    self._text = ""

    def _output(self, event: BytesMessage) -> Output:
        """A long message comes in pieces, of which the first begins with the channel."""
        data = bytes(event.data)
        if self._channel is None:
            self._channel, data = data[0] if data else STDOUT, data[1:]
        output = Output(self._channel, data)
        if event.message_finished:
            self._channel = None
        return output

    def _feed(self) -> None:
        data = self._socket.recv(RECEIVE_BYTES)
        if not data:
            raise ConnectionResetError("the daemon closed the connection")
        try:
            self._protocol.receive_data(data)
            for event in self._protocol.events():
                self._take(event)
        except RemoteProtocolError as error:
            raise Failed(f"the daemon broke the WebSocket protocol: {error}") from error

    def _take(self, event: object) -> None:
        if isinstance(event, AcceptConnection):
            self._open = True
        elif isinstance(event, Ping):
            self._outgoing += self._protocol.send(event.response())
            self.flush()
        elif isinstance(event, RejectConnection):
            self._refusal = event
            if not event.has_body:
                raise error_of_response(event.status_code, b"")
        elif isinstance(event, RejectData) and self._refusal is not None:
            self._refusal_body += event.data
            if event.body_finished:
                raise error_of_response(self._refusal.status_code, self._refusal_body)
        elif isinstance(event, BytesMessage | TextMessage | CloseConnection):
            self._received.append(event)


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
            if isinstance(item, Output):
                yield item
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
