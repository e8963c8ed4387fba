"""HTTP/1.1 over the daemon's unix socket, one request at a time."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import h11

from triarch.client.problems import error_of_response
from triarch.errors import DaemonUnavailable, Denied, TimedOut

RECEIVE_BYTES = 256 << 10
HOST = "triarch"


def connect(path: Path, timeout_seconds: float | None) -> socket.socket:
    """Raises `DaemonUnavailable` when nothing listens there, `Denied` when the caller may not connect."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout_seconds)
    try:
        connection.connect(str(path))
    except PermissionError as error:
        connection.close()
        raise Denied(
            f"not allowed to use {path}: it is for root and group 'triarch'", hint='usermod -aG triarch "$USER"'
        ) from error
    except (FileNotFoundError, ConnectionError, NotADirectoryError) as error:
        connection.close()
        raise DaemonUnavailable(f"no daemon answers on {path}", hint="triarchd") from error
    except TimeoutError as error:
        connection.close()
        raise DaemonUnavailable(f"the daemon on {path} takes no connections") from error
    return connection


@dataclass(frozen=True, slots=True)
class Upload:
    """The body of a request."""

    content_type: str
    size_bytes: int
    pieces: Iterable[bytes]


class Connection:
    """A connection that is made when first needed, kept between requests, and made again when the daemon closed it."""

    def __init__(self, path: Path, timeout_seconds: float) -> None:
        """`timeout_seconds` is the longest silence of the daemon."""
        self._path = path
        self._timeout_seconds = timeout_seconds
        self._socket: socket.socket | None = None
        self._http = h11.Connection(h11.CLIENT)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def request(self, method: str, target: str, upload: Upload | None = None, patience_seconds: float = 0.0) -> bytes:
        """The body of the answer. Raises the error that the daemon answered with.

        `patience_seconds` is added to the timeout for a request that the daemon answers late on purpose.
        """
        return b"".join(self.stream(method, target, upload, patience_seconds))

    def stream(
        self, method: str, target: str, upload: Upload | None = None, patience_seconds: float | None = 0.0
    ) -> Iterator[bytes]:
        """The body of the answer as it comes; with `patience_seconds` None it may pause for ever."""
        connection = self.open()
        silence = None if patience_seconds is None else self._timeout_seconds + patience_seconds
        connection.settimeout(silence)
        try:
            self._send(connection, method, target, upload)
            status = self._status(connection)
            if status >= 400:
                raise error_of_response(status, b"".join(self._body(connection)))
            yield from self._body(connection)
        except TimeoutError as error:
            raise TimedOut(f"the daemon has not answered {method} {target} for {silence:g} s") from error
        except (OSError, h11.RemoteProtocolError) as error:
            raise DaemonUnavailable(
                f"the daemon ended before it had answered {method} {target}", hint="triarch list"
            ) from error
        finally:
            self._finish()

    def wait_closed(self) -> None:
        """Return when the daemon has closed its end (it is ending)."""
        if self._socket is not None:
            self._socket.settimeout(None)
            while self._socket.recv(RECEIVE_BYTES):
                pass
            self.close()

    def open(self) -> socket.socket:
        """The connected socket. Raises `DaemonUnavailable` or `Denied`."""
        if self._socket is not None and select.select([self._socket], [], [], 0)[0]:
            # Nothing is due on an idle connection but its end.
            self.close()
        if self._socket is None:
            self._socket = connect(self._path, self._timeout_seconds)
            self._http = h11.Connection(h11.CLIENT)
        return self._socket

    def _send(self, connection: socket.socket, method: str, target: str, upload: Upload | None) -> None:
        headers = [("Host", HOST)]
        if upload is not None:
            headers += [("Content-Type", upload.content_type), ("Content-Length", str(upload.size_bytes))]
        connection.sendall(self._http.send(h11.Request(method=method, target=target, headers=headers)) or b"")
        try:
            for piece in upload.pieces if upload is not None else ():
                connection.sendall(self._http.send(h11.Data(data=piece)) or b"")
            connection.sendall(self._http.send(h11.EndOfMessage()) or b"")
        except (BrokenPipeError, ConnectionResetError):
            # The daemon may refuse a long body before it has read all of it: what counts is its answer.
            self._http.send_failed()

    def _status(self, connection: socket.socket) -> int:
        event = self._next_event(connection)
        if not isinstance(event, h11.Response):
            raise ConnectionResetError("closed before an answer")
        return event.status_code

    def _body(self, connection: socket.socket) -> Iterator[bytes]:
        while isinstance(event := self._next_event(connection), h11.Data):
            yield bytes(event.data)

    def _next_event(self, connection: socket.socket) -> object:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(connection.recv(RECEIVE_BYTES))
        return event

    def _finish(self) -> None:
        """Keep the connection only when both directions ended in order."""
        if self._http.our_state is h11.DONE and self._http.their_state is h11.DONE:
            self._http.start_next_cycle()
        else:
            self.close()
