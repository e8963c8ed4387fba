"""This process's terminal and pipes, connected to a stream."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING

from triarch.model.stream import STDERR

if TYPE_CHECKING:
    from triarch.client.stream import Stream
    from triarch.model.machine import Exit

READ_BYTES = 64 << 10
DETACH_KEY = b"\x1d"
STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO = 0, 1, 2


def size() -> os.terminal_size:
    """The terminal's size, 80 × 24 where there is none."""
    for descriptor in (STDOUT_FILENO, STDIN_FILENO):
        with contextlib.suppress(OSError):
            return os.get_terminal_size(descriptor)
    return os.terminal_size((80, 24))


def is_terminal() -> bool:
    """Whether a person sits at both ends."""
    return os.isatty(STDIN_FILENO) and os.isatty(STDOUT_FILENO)


@contextlib.contextmanager
def raw_terminal() -> Iterator[None]:
    """Pass every key on as it is typed; whatever happens inside, the terminal is afterwards what it was."""
    if not os.isatty(STDIN_FILENO):
        yield
        return
    import termios
    import tty

    before = termios.tcgetattr(STDIN_FILENO)
    with _end_on(signal.SIGTERM, signal.SIGHUP):
        try:
            tty.setraw(STDIN_FILENO, termios.TCSADRAIN)
            yield
        finally:
            termios.tcsetattr(STDIN_FILENO, termios.TCSADRAIN, before)


@contextlib.contextmanager
def _end_on(*numbers: signal.Signals) -> Iterator[None]:
    """Turn signals that would end the process at once into an exception that unwinds it."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    previous = [(number, signal.signal(number, end)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in previous:
            signal.signal(number, handler)


@contextlib.contextmanager
def _resizes() -> Iterator[socket.socket]:
    """A socket that becomes readable when the terminal's size has changed."""
    reader, writer = socket.socketpair()
    reader.setblocking(False)
    writer.setblocking(False)
    previous = signal.signal(signal.SIGWINCH, lambda *_: None)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    try:
        yield reader
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGWINCH, previous)
        reader.close()
        writer.close()


class Attachment:
    """Moves bytes between this process's standard streams and a stream until that ends."""

    def __init__(self, stream: Stream, *, terminal: bool, interactive: bool = True, detach_key: bytes = b"") -> None:
        """Without `interactive` the command's input is empty. `detach_key` ends the attachment, not the command."""
        self._stream = stream
        self._terminal = terminal
        self._detach_key = detach_key
        self._input_open = interactive and _is_open(STDIN_FILENO)
        self._detached = False
        if not self._input_open:
            stream.end_input()

    def run(self) -> Exit | None:
        """Returns the exit that the daemon told, None after a detach. Raises the error that ended the stream."""
        with raw_terminal() if self._terminal else contextlib.nullcontext(), _resizes() as resizes:
            while True:
                ready = self._poll(resizes)
                if resizes.fileno() in ready:
                    self._resize(resizes)
                if STDIN_FILENO in ready:
                    self._read_input()
                    if self._detached:
                        return None
                self._stream.flush()
                if self._stream.fileno() in ready:
                    self._write_output()
                if (ending := self._stream.ending) is not None:
                    return ending.exit

    def _poll(self, resizes: socket.socket) -> set[int]:
        # poll and not epoll: input may be a plain file.
        poller = select.poll()
        poller.register(resizes, select.POLLIN)
        poller.register(self._stream, select.POLLIN | (select.POLLOUT if self._stream.wants_write else 0))
        if self._input_open and not self._stream.full:
            poller.register(STDIN_FILENO, select.POLLIN)
        return {descriptor for descriptor, _ in poller.poll()}

    def _resize(self, resizes: socket.socket) -> None:
        numbers = resizes.recv(4096)
        if self._terminal and signal.SIGWINCH in numbers:
            self._stream.resize(*size())

    def _read_input(self) -> None:
        try:
            data = os.read(STDIN_FILENO, READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            # EIO: the terminal has hung up.
            data = b""
        if self._detach_key and self._detach_key in data:
            data = data[: data.index(self._detach_key)]
            self._detached = True
        if data:
            self._stream.send_input(data)
        elif not self._detached:
            self._input_open = False
            self._stream.end_input()

    def _write_output(self) -> None:
        for output in self._stream.receive():
            write_all(STDERR_FILENO if output.channel == STDERR else STDOUT_FILENO, output.data)


def write_all(descriptor: int, data: bytes) -> None:
    """Write to a pipe, file or terminal, even one that somebody left in non-blocking mode."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:
            select.select([], [descriptor], [])


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True
