"""The client's side of the WebSocket protocol (RFC 6455) without input and output: bytes in, messages out, and back."""

from __future__ import annotations

import os
from binascii import b2a_base64
from collections.abc import Iterator

import msgspec

from triarch.client.http import BrokenProtocol, Response

# The daemon's own messages are far smaller; a peer that announces more is none.
MAX_PAYLOAD_BYTES = 64 << 20

_KEY_SUFFIX = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING, _PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
_FINAL, _MASKED = 0x80, 0x80
_MAX_CONTROL_BYTES = 125
# A close frame without a code (7.1.5).
_NO_CODE = 1005


class Close(msgspec.Struct, frozen=True):
    """The peer's last message."""

    code: int


class _Frame(msgspec.Struct, frozen=True):
    opcode: int
    final: bool
    payload: bytes


Message = bytes | str | Close


class Handshake:
    """The request that turns an HTTP connection into a WebSocket, and the check of the answer to it."""

    def __init__(self, host: str, target: str) -> None:
        self._key = b2a_base64(os.urandom(16), newline=False)
        self.request = (
            f"GET {target} HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {self._key.decode()}\r\nSec-WebSocket-Version: 13\r\n\r\n"
        ).encode()

    def check(self, response: Response) -> None:
        """Raises `BrokenProtocol` when a response with status 101 is not the answer to this request."""
        expected = b2a_base64(_sha1(self._key + _KEY_SUFFIX), newline=False).decode()
        if response.fields.get("sec-websocket-accept") != expected:
            raise BrokenProtocol("the handshake was not answered")


class Messages:
    """Frames of one open WebSocket. After a `Close` nothing more comes."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._kind = _CONTINUATION
        self._parts: list[bytes] = []
        self._due = bytearray()

    def receive(self, data: bytes) -> Iterator[Message]:
        """The messages that are whole with these bytes. Raises `BrokenProtocol`."""
        self._buffer += data
        while (frame := self._next_frame()) is not None:
            if frame.opcode & 0x8:
                if frame.opcode == _CLOSE:
                    yield self._close(frame.payload)
                elif frame.opcode == _PING:
                    self._due += _frame(_PONG, frame.payload)
            else:
                message = self._add(frame)
                if message is not None:
                    yield message

    def take_due(self) -> bytes:
        """Answers that are owed to the peer: send them."""
        due = bytes(self._due)
        self._due.clear()
        return due

    def encode(self, message: bytes | str) -> bytes:
        return _frame(_TEXT, message.encode()) if isinstance(message, str) else _frame(_BINARY, message)

    def _next_frame(self) -> _Frame | None:
        buffer = self._buffer
        if len(buffer) < 2:
            return None
        first, size_bytes, at = buffer[0], buffer[1], 2
        opcode = first & 0x0F
        if first & 0x70 or opcode not in (_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING, _PONG):
            raise BrokenProtocol(f"an unknown frame 0x{first:02x}")
        if size_bytes & _MASKED:
            raise BrokenProtocol("a masked frame")
        if opcode & 0x8 and (size_bytes > _MAX_CONTROL_BYTES or not first & _FINAL):
            raise BrokenProtocol("a control frame that is too long or in parts")
        if size_bytes > _MAX_CONTROL_BYTES:
            at += 2 if size_bytes == 126 else 8
            if len(buffer) < at:
                return None
            size_bytes = int.from_bytes(buffer[2:at], "big")
            if size_bytes + sum(map(len, self._parts)) > MAX_PAYLOAD_BYTES:
                raise BrokenProtocol(f"a message of more than {MAX_PAYLOAD_BYTES} bytes")
        if len(buffer) < at + size_bytes:
            return None
        with memoryview(buffer) as view:
            payload = bytes(view[at : at + size_bytes])
        del buffer[: at + size_bytes]
        return _Frame(opcode, bool(first & _FINAL), payload)

    def _add(self, frame: _Frame) -> Message | None:
        if (frame.opcode == _CONTINUATION) is (self._kind == _CONTINUATION):
            raise BrokenProtocol("a part of no message, or a message within another")
        if frame.opcode != _CONTINUATION:
            self._kind = frame.opcode
        self._parts.append(frame.payload)
        if not frame.final:
            return None
        whole, kind = b"".join(self._parts), self._kind
        self._kind = _CONTINUATION
        self._parts.clear()
        return whole if kind == _BINARY else _text(whole)

    def _close(self, payload: bytes) -> Close:
        if len(payload) == 1:
            raise BrokenProtocol("half a close code")
        self._due += _frame(_CLOSE, payload[:2])
        return Close(int.from_bytes(payload[:2], "big") if payload else _NO_CODE)


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise BrokenProtocol("text that is not UTF-8") from error


def _frame(opcode: int, payload: bytes) -> bytes:
    """One whole frame, masked as a client must (5.3)."""
    size_bytes = len(payload)
    if size_bytes <= _MAX_CONTROL_BYTES:
        head = bytes((_FINAL | opcode, _MASKED | size_bytes))
    elif size_bytes < 1 << 16:
        head = bytes((_FINAL | opcode, _MASKED | 126)) + size_bytes.to_bytes(2, "big")
    else:
        head = bytes((_FINAL | opcode, _MASKED | 127)) + size_bytes.to_bytes(8, "big")
    mask = os.urandom(4)
    # As one long number, which is as fast as Python gets.
    key = (mask * (size_bytes // 4 + 1))[:size_bytes]
    masked = int.from_bytes(payload, "little") ^ int.from_bytes(key, "little")
    return head + mask + masked.to_bytes(size_bytes, "little")


def _sha1(data: bytes) -> bytes:
    try:
        # As in the standard library's random.py: hashlib loads OpenSSL, a tenth of a short command's life.
        from _sha1 import sha1  # type: ignore[import-not-found]
    except ImportError:
        from hashlib import sha1
    digest: bytes = sha1(data).digest()
    return digest
