"""Netlink messages: what rtnetlink and nf_tables have in common (netlink(7), `linux/netlink.h`)."""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence

from triarch.errors import Denied, Error, Exists, Failed, NotFound, Unsupported

REQUEST, ACKNOWLEDGE, DUMP = 0x001, 0x004, 0x300
NEW = 0x600  # CREATE | EXCL

_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_DUMP_INTERRUPTED = 0x010
_CAPPED, _ACK_ATTRIBUTES = 0x100, 0x200
_SOL_NETLINK, _NETLINK_CAP_ACK, _NETLINK_EXT_ACK = 270, 10, 11
_NLMSGERR_ATTR_MSG = 1
_TYPE_MASK = 0x3FFF
_RECEIVE_BYTES = 1 << 16

_HEADER = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_ATTRIBUTE = struct.Struct("=HH")  # nlattr: length, type
_ERRNO = struct.Struct("=i")

_ERRORS: dict[int, type[Error]] = {
    errno.EEXIST: Exists,
    errno.ENODEV: NotFound,
    errno.ENOENT: NotFound,
    errno.ESRCH: NotFound,
    errno.EPERM: Denied,
    errno.EACCES: Denied,
    errno.EOPNOTSUPP: Unsupported,
}


class NetlinkSocket:
    """A socket of one netlink protocol in the calling thread's network namespace; blocking, one thread at a time."""

    def __init__(self, protocol: int) -> None:
        """Raises `OSError`."""
        self._sequence = 0
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        try:
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_EXT_ACK, 1)
            self._socket.bind((0, 0))
        except OSError:
            self._socket.close()
            raise

    def close(self) -> None:
        self._socket.close()

    def exchange(self, kind: int, flags: int, body: bytes) -> list[bytes]:
        """Send one request (with ACKNOWLEDGE or DUMP) and return the payloads of its replies.

        Raises `OSError` with the kernel's errno and, where it gives one, its explanation; `InterruptedError` when
        the table changed under a dump, which may then have left something out.
        """
        self._sequence += 1
        header = _HEADER.pack(_HEADER.size + len(body), kind, flags | REQUEST, self._sequence, 0)
        self._socket.send(header + body)
        replies: list[bytes] = []
        interrupted = False
        while True:
            for reply_kind, reply_flags, sequence, payload in messages(self._socket.recv(_RECEIVE_BYTES)):
                if sequence != self._sequence:
                    continue
                interrupted |= bool(reply_flags & _DUMP_INTERRUPTED)
                if reply_kind not in (_NLMSG_ERROR, _NLMSG_DONE):
                    replies.append(payload)
                    continue
                raise_if_error(reply_kind, reply_flags, payload)
                if interrupted:
                    raise InterruptedError(errno.EINTR, "the dump was interrupted")
                return replies

    def transact(self, requests: Sequence[tuple[int, int, bytes]]) -> None:
        """Send (type, flags, body) of several requests as one datagram; return when all with ACKNOWLEDGE are answered.

        Raises `OSError` with the first refusal.
        """
        first, waiting, datagram = self._sequence + 1, set(), b""
        for kind, flags, body in requests:
            self._sequence += 1
            datagram += _HEADER.pack(_HEADER.size + len(body), kind, flags | REQUEST, self._sequence, 0)
            datagram += body + bytes(-len(body) % 4)
            if flags & ACKNOWLEDGE:
                waiting.add(self._sequence)
        self._socket.send(datagram)
        while waiting:
            for reply_kind, reply_flags, sequence, payload in messages(self._socket.recv(_RECEIVE_BYTES)):
                if sequence < first or reply_kind != _NLMSG_ERROR:
                    continue
                raise_if_error(reply_kind, reply_flags, payload)
                waiting.discard(sequence)


def messages(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """(type, flags, sequence, payload) of each message in one datagram."""
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, flags, sequence, _ = _HEADER.unpack_from(data, offset)
        if not _HEADER.size <= length <= len(data) - offset:
            raise OSError(errno.EBADMSG, f"the kernel sent a netlink message of {length} bytes that does not fit")
        yield kind, flags, sequence, data[offset + _HEADER.size : offset + length]
        offset += _aligned(length)


def raise_if_error(kind: int, flags: int, payload: bytes) -> None:
    """Raise `OSError` when the closing message of an exchange is no plain acknowledgement."""
    (number,) = _ERRNO.unpack_from(payload) if len(payload) >= _ERRNO.size else (0,)
    if number == 0:
        return
    offset = _ERRNO.size
    if kind == _NLMSG_ERROR:
        (request_length, *_) = _HEADER.unpack_from(payload, offset)
        offset += _HEADER.size if flags & _CAPPED else _aligned(request_length)
    text = b""
    if flags & _ACK_ATTRIBUTES:
        text = dict(attributes(payload, offset)).get(_NLMSGERR_ATTR_MSG, b"")
    reason = os.strerror(-number)
    if text:
        reason += f" ({text.rstrip(bytes(1)).decode(errors='replace').rstrip('.')})"
    raise OSError(-number, reason)


def translate(error: OSError, what: str) -> Error:
    """Triarch's error for `cannot {what}`."""
    kind = _ERRORS.get(error.errno or 0, Failed)
    hint = "run as root" if kind is Denied else None
    return kind(f"cannot {what}: {(error.strerror or str(error)).lower()}", hint=hint, errno=error.errno)


def attribute(kind: int, value: bytes) -> bytes:
    """One attribute, padded to four bytes; nest by passing attributes as `value`."""
    length = _ATTRIBUTE.size + len(value)
    return _ATTRIBUTE.pack(length, kind) + value + bytes(_aligned(length) - length)


def attributes(data: bytes, offset: int = 0) -> Iterator[tuple[int, bytes]]:
    """(type, value) of each attribute from `offset` on."""
    while offset + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, offset)
        if length < _ATTRIBUTE.size:
            return
        yield kind & _TYPE_MASK, data[offset + _ATTRIBUTE.size : offset + length]
        offset += _aligned(length)


def _aligned(length: int) -> int:
    return (length + 3) & ~3
