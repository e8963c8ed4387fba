"""HTTP/1.1 over the daemon's unix socket, one request at a time."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from triarch.client.http import Response
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


class Upload(msgspec.Struct, frozen=True):
    """The body of a request. `etag`: refuse it when the object is another one by now (If-Match)."""

    content_type: str
    size_bytes: int
    pieces: Iterable[bytes]
    etag: str | None = None


class Connection:
    """A connection that is made when first needed, kept between requests, and made again when the daemon closed it."""

    def __init__(self, path: Path, timeout_seconds: float) -> None:
        """`timeout_seconds` is the longest silence of the daemon."""
        self._path = path
        self._timeout_seconds = timeout_seconds
        self._socket: socket.socket | None = None

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
        self,
        method: str,
        target: str,
        upload: Upload | None = None,
        patience_seconds: float | None = 0.0,
        fields: tuple[tuple[str, str], ...] = (),
    ) -> Iterator[bytes]:
        """The body of the answer as it comes; with `patience_seconds` None it may pause for ever.

        `fields` are header fields besides the usual.
        """
        connection = self.open()
        silence = None if patience_seconds is None else self._timeout_seconds + patience_seconds
        connection.settimeout(silence)
        reusable = False
        try:
            sent = self._send(connection, method, target, upload, fields)
            response = Response(lambda: connection.recv(RECEIVE_BYTES))
            if response.status >= 400:
                body = b"".join(response.body())
                reusable = sent and response.reusable
                raise error_of_response(response.status, body)
            yield from response.body()
            reusable = sent and response.reusable
        except TimeoutError as error:
            raise TimedOut(f"the daemon has not answered {method} {target} for {silence:g} s") from error
        except OSError as error:
            raise DaemonUnavailable(
                f"the daemon ended before it had answered {method} {target}", hint="triarch list"
            ) from error
        finally:
            if not reusable:
                self.close()

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
        return self._socket

    def _send(
        self,
        connection: socket.socket,
        method: str,
        target: str,
        upload: Upload | None,
        fields: tuple[tuple[str, str], ...],
    ) -> bool:
        """Whether all of it was sent."""
        head = f"{method} {target} HTTP/1.1\r\nHost: {HOST}\r\n"
        head += "".join(f"{name}: {value}\r\n" for name, value in fields)
        if upload is not None:
            head += f"Content-Type: {upload.content_type}\r\nContent-Length: {upload.size_bytes}\r\n"
            head += f'If-Match: "{upload.etag}"\r\n' if upload.etag is not None else ""
        connection.sendall(f"{head}\r\n".encode("ascii"))
        try:
            for piece in upload.pieces if upload is not None else ():
                connection.sendall(piece)
        except (BrokenPipeError, ConnectionResetError):
            # The daemon may refuse a long body before it has read all of it: what counts is its answer.
            return False
        return True
