"""A conversation with the file server in a machine: `model.file_protocol` over whatever carries it.

What the server says may be a hostile guest's: it is bounded, checked, and never waited for without an end.
"""

from __future__ import annotations

import os
import socket
import time
from collections import deque
from contextlib import suppress
from select import POLLIN, POLLOUT, poll
from typing import Protocol

from triarch.client.stream import Stream
from triarch.errors import DaemonUnavailable, Damaged, Error, TimedOut
from triarch.model.file_protocol import (
    MAX_BULK_BYTES,
    MAX_DATA_BYTES,
    FileEntry,
    FileFault,
    Frame,
    FrameReader,
    data_header,
    decode_fault,
    decode_hello,
    encode_entry,
    finish_request,
    sync_request,
)
from triarch.model.stream import STDOUT

# How long nothing at all may come or go: sums of large files take their time in a VM.
SILENCE_SECONDS = 300.0
_ENDING_SECONDS = 10.0
_RECEIVE_BYTES = 1 << 20
_FLUSH_BYTES = 128 << 10
# Frames that wait to be looked at: while we send, nothing but complaints can come.
_MAX_WAITING = 65_536
_MAX_WAITING_BYTES = 64 << 20


class Carrier(Protocol):
    """Bytes both ways. Nothing blocks: poll `fileno` for what `events` says."""

    def fileno(self) -> int: ...

    def send(self, data: memoryview) -> int:
        """Take some of it, perhaps none."""
        ...

    def receive(self) -> bytes | None:
        """What has come; None when nothing has, b"" when nothing comes any more."""
        ...

    @property
    def wants_write(self) -> bool: ...


class DirectCarrier:
    """The socket that is the file server's own input and output."""

    wants_write = False

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        connection.setblocking(False)
        self.fileno = connection.fileno

    def send(self, data: memoryview) -> int:
        try:
            return self._connection.send(data)
        except BlockingIOError:
            return 0

    def receive(self) -> bytes | None:
        try:
            return self._connection.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return None
        except ConnectionError:
            return b""


class StreamCarrier:
    """Through the daemon, as a browser or another host has to."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.fileno = stream.fileno

    @property
    def wants_write(self) -> bool:
        return self._stream.wants_write

    def send(self, data: memoryview) -> int:
        self._stream.flush()
        if self._stream.full:
            return 0
        piece = data[:MAX_DATA_BYTES]
        self._stream.send_input(bytes(piece))
        return len(piece)

    def receive(self) -> bytes | None:
        data = b"".join(output.data for output in self._stream.receive() if output.channel == STDOUT)
        return data or (b"" if self._stream.ending is not None else None)


class FileLink:
    """Requests out, frames in. Blocking; use it as a context."""

    def __init__(self, stream: Stream, carrier: Carrier, connection: socket.socket | None = None) -> None:
        self._stream = stream
        self._carrier = carrier
        self._connection = connection
        self._reader = FrameReader()
        self._waiting: deque[tuple[Frame, bytes]] = deque()
        self._waiting_bytes = 0
        self._outgoing = bytearray()
        self._greeted = False

    def __enter__(self) -> FileLink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._stream.close()

    def finish(self) -> None:
        """End in good order, so that a stopped machine is free again when this returns."""
        self.flush()
        if self._connection is None:
            self._stream.end_input()
        else:
            self._connection.close()
        self._await_ending()

    def abandon(self) -> None:
        """End in the middle: the server, if it can be told, and a stopped machine is free again when this returns."""
        if self._connection is not None:
            self._connection.close()
            with suppress(Error):
                self._await_ending()

    # -- out

    def send(self, data: bytes) -> None:
        """Queue it; much is sent at once, little with what follows."""
        self._outgoing += data
        if len(self._outgoing) >= _FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        if self._outgoing:
            data = bytes(self._outgoing)
            self._outgoing.clear()
            self._send_all(memoryview(data))

    def _send_all(self, view: memoryview) -> None:
        while view:
            sent = self._carrier.send(view)
            view = view[sent:]
            if not sent:
                self._wait(write=True)

    def begin(self, entry: FileEntry) -> None:
        self.send(encode_entry(entry))

    def data(self, offset: int, data: bytes | memoryview) -> None:
        """A piece of the file that was begun."""
        for start in range(0, len(data), MAX_DATA_BYTES):
            piece = data[start : start + MAX_DATA_BYTES]
            self.send(data_header(offset + start, len(piece)))
            self.send(bytes(piece))

    def data_from(self, fd: int, offset: int, size_bytes: int) -> int:
        """As `data`, some of an open file; how many bytes it had. The kernel moves them if it can."""
        if self._connection is None or size_bytes < MAX_DATA_BYTES:
            data = os.pread(fd, min(size_bytes, MAX_DATA_BYTES), offset)
            self.data(offset, data)
            return len(data)
        size_bytes = min(size_bytes, MAX_BULK_BYTES)
        self.send(data_header(offset, size_bytes))
        self.flush()
        end = offset + size_bytes
        while offset < end:
            try:
                sent = os.sendfile(self._carrier.fileno(), fd, offset, end - offset)
            except BlockingIOError:
                self._wait(write=True)
                continue
            if not sent:
                # It was cut since it was looked at; what was announced has to come.
                self._send_all(memoryview(bytes(end - offset)))
                break
            offset += sent
        return size_bytes

    def end(self, size_bytes: int) -> None:
        self.send(finish_request(size_bytes))

    def sync(self) -> tuple[FileFault, ...]:
        """Return when all that was sent is done: what did not work of it."""
        self.send(sync_request())
        faults: list[FileFault] = []
        while True:
            kind, payload = self.next()
            if kind is Frame.DONE:
                return tuple(faults)
            if kind is not Frame.ERROR:
                raise Damaged(f"the file server answered with {kind.name} where nothing was asked")
            faults.append(decode_fault(payload))

    @property
    def complaints(self) -> tuple[FileFault, ...]:
        """What the server said so far while files were sent; they stay there for `sync`."""
        return tuple(decode_fault(payload) for kind, payload in self._waiting if kind is Frame.ERROR)

    # -- in

    def next(self) -> tuple[Frame, bytes]:
        """The next frame. Raises `DaemonUnavailable` or what ended the conversation when there is none."""
        self.flush()
        while not self._waiting:
            self._wait()
        kind, payload = self._waiting.popleft()
        self._waiting_bytes -= len(payload)
        return kind, payload

    def _wait(self, *, write: bool = False) -> None:
        """Until something came, or there is room to send."""
        poller = poll()
        poller.register(self._carrier.fileno(), POLLIN | (POLLOUT if write or self._carrier.wants_write else 0))
        events = poller.poll(SILENCE_SECONDS * 1000)
        if not events:
            raise TimedOut(f"the machine's file server said nothing for {SILENCE_SECONDS:g} s")
        if events[0][1] & ~POLLOUT:
            self._take()

    def _take(self) -> None:
        data = self._carrier.receive()
        if data is None:
            return
        if not data:
            self._await_ending()
            raise DaemonUnavailable("the connection to the machine's files ended", hint="run the same command again")
        self._reader.feed(data)
        for kind, payload in self._reader.frames():
            if not self._greeted:
                if kind is not Frame.HELLO:
                    raise Damaged(f"the file server began with {kind.name}")
                decode_hello(payload)
                self._greeted = True
            else:
                self._waiting.append((kind, payload))
                self._waiting_bytes += len(payload)
        if len(self._waiting) > _MAX_WAITING or self._waiting_bytes > _MAX_WAITING_BYTES:
            raise Damaged("the file server floods us with answers to nothing")

    def _await_ending(self) -> None:
        """Raise the error with which the daemon ended it, if there is one."""
        deadline = time.monotonic() + _ENDING_SECONDS
        while self._stream.ending is None and (left := deadline - time.monotonic()) > 0:
            poller = poll()
            poller.register(self._stream.fileno(), POLLIN | (POLLOUT if self._stream.wants_write else 0))
            if poller.poll(left * 1000):
                self._stream.flush()
                for _ in self._stream.receive():
                    pass


def open_direct(stream: Stream) -> tuple[Carrier, socket.socket]:
    """Connect to the socket that the daemon names first. Raises what the daemon ended the stream with instead."""
    path = b""
    while not path:
        if stream.ending is not None:
            raise DaemonUnavailable("the daemon opened no way to the machine's files")
        poller = poll()
        poller.register(stream.fileno(), POLLIN | (POLLOUT if stream.wants_write else 0))
        if not poller.poll(SILENCE_SECONDS * 1000):
            raise TimedOut("the daemon opened no way to the machine's files")
        stream.flush()
        path = b"".join(output.data for output in stream.receive())
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(path)
    except OSError as error:
        connection.close()
        raise DaemonUnavailable(f"cannot reach the machine's files: {error.strerror}") from error
    return DirectCarrier(connection), connection
