"""Reading responses of HTTP/1.1 (RFC 9112) as the daemon sends them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

MAX_HEAD_BYTES = 64 << 10
# A chunk's size in hexadecimal, its extensions, or one field of the trailer.
MAX_LINE_BYTES = 4 << 10

_NO_BODY = frozenset((101, 204, 304))
_LINE_END = b"\r\n"


class BrokenProtocol(ConnectionError):
    """What the peer sent is not the protocol."""


class Response:
    """One final response, interim ones left out; its head is read when it is made, its body when that is asked for.

    `receive` gives the next bytes of the connection, b"" at its end. Every method raises what `receive` does,
    `BrokenProtocol`, and `ConnectionResetError` for a response that is cut. Fields have their names in lower case.
    """

    def __init__(self, receive: Callable[[], bytes]) -> None:
        self._receive = receive
        self._buffer = bytearray()
        self._ended = False
        self.status = 100
        self.fields: dict[str, str] = {}
        while self.status < 200 and self.status != 101:
            self._read_head()

    def body(self) -> Iterator[bytes]:
        """The body in pieces as they come."""
        if self.status in _NO_BODY:
            pass
        elif self.fields.get("transfer-encoding", "").lower() == "chunked":
            while size_bytes := self._chunk_size():
                yield from self._exactly(size_bytes)
                if self._line():
                    raise BrokenProtocol("a chunk is longer than it says")
            while self._line():
                pass
        elif "content-length" in self.fields:
            yield from self._exactly(_number(self.fields["content-length"], 10))
        else:
            yield from self._until_closed()
        self._ended = True

    @property
    def reusable(self) -> bool:
        """Whether the connection is good for another request."""
        return self._ended and not self._buffer and self.fields.get("connection", "").lower() != "close"

    def take_rest(self) -> bytes:
        """What came after the response, or after its head where the body was not asked for."""
        rest = bytes(self._buffer)
        self._buffer.clear()
        return rest

    def _read_head(self) -> None:
        head = self._until(_LINE_END * 2, MAX_HEAD_BYTES).decode("latin-1")
        status_line, *lines = head.split("\r\n")
        version, _, rest = status_line.partition(" ")
        code = rest[:3]
        if not version.startswith("HTTP/1.") or not (code.isascii() and code.isdigit()) or len(code) < 3:
            raise BrokenProtocol(f"not a status line: {status_line[:80]!r}")
        self.status = int(code)
        self.fields = {}
        for line in lines:
            name, colon, value = line.partition(":")
            if not colon or not name or name != name.strip():
                raise BrokenProtocol(f"not a header field: {line[:80]!r}")
            self.fields[name.lower()] = value.strip(" \t")

    def _chunk_size(self) -> int:
        return _number(self._line().partition(b";")[0].decode("latin-1").strip(), 16)

    def _line(self) -> bytes:
        return self._until(_LINE_END, MAX_LINE_BYTES)

    def _until(self, end: bytes, limit_bytes: int) -> bytes:
        searched = 0
        while (at := self._buffer.find(end, searched)) < 0:
            if len(self._buffer) > limit_bytes:
                raise BrokenProtocol(f"no end within {limit_bytes} bytes")
            searched = max(0, len(self._buffer) - len(end) + 1)
            self._fill()
        taken = bytes(self._buffer[:at])
        del self._buffer[: at + len(end)]
        return taken

    def _exactly(self, size_bytes: int) -> Iterator[bytes]:
        while size_bytes:
            if not self._buffer:
                self._fill()
            piece = bytes(self._buffer[:size_bytes])
            del self._buffer[:size_bytes]
            size_bytes -= len(piece)
            yield piece

    def _until_closed(self) -> Iterator[bytes]:
        self.fields["connection"] = "close"
        if self._buffer:
            yield self.take_rest()
        while data := self._receive():
            yield data

    def _fill(self) -> None:
        data = self._receive()
        if not data:
            raise ConnectionResetError("the connection was closed in the middle of a response")
        self._buffer += data


def _number(text: str, base: int) -> int:
    """Digits and nothing else: `int` alone takes signs, spaces and underscores too."""
    if not (text.isascii() and text.isalnum()):
        raise BrokenProtocol(f"not a length: {text[:80]!r}")
    try:
        return int(text, base)
    except ValueError as error:
        raise BrokenProtocol(f"not a length: {text[:80]!r}") from error
