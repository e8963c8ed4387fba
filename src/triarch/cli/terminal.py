"""This process's terminal and pipes, connected to a stream."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING

from triarch.errors import Invalid
from triarch.model.stream import STDERR

if TYPE_CHECKING:
    from triarch.client.stream import Stream
    from triarch.model.machine import Exit

READ_BYTES = 64 << 10
STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO = 0, 1, 2


def parse_keys(text: str) -> bytes:
    """The bytes of keys as people write them: `ctrl-]`, `ctrl-p,q`; `none` is none. Raises `Invalid`."""
    if text.lower() in ("", "none"):
        return b""
    keys = bytearray()
    for word in text.split(",") if text != "," else (text,):
        name = word.lower().removeprefix("ctrl-").removeprefix("^")
        if name == word.lower() and len(word) == 1 and word.isascii() and word.isprintable():
            keys += word.encode()
        elif name != word.lower() and len(name) == 1 and "@" <= name.upper() <= "_":
            keys.append(ord(name.upper()) - ord("@"))
        else:
            raise Invalid(f"illegal key '{word[:20]}': it needs one character, or ctrl- and one of a-z @ [ \\ ] ^ _")
    return bytes(keys)


class KeyWatch:
    """Finds a row of keys in what is typed, however it comes in pieces."""

    def __init__(self, keys: bytes) -> None:
        self._keys = keys
        self._held = b""

    def take(self, data: bytes) -> tuple[bytes, bool]:
        """What to pass on, and whether the keys were typed. A beginning of them is held until it is clear."""
        if not self._keys:
            return data, False
        data = self._held + data
        found = data.find(self._keys)
        if found >= 0:
            return data[:found], True
        hold = next(n for n in range(min(len(self._keys) - 1, len(data)), -1, -1) if data.endswith(self._keys[:n]))
        self._held = data[len(data) - hold :]
        return data[: len(data) - hold], False


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

    def __init__(self, stream: Stream, *, terminal: bool, interactive: bool = True, detach_keys: bytes = b"") -> None:
        """Without `interactive` the command's input is empty. `detach_keys` end the attachment, not the command."""
        self._stream = stream
        self._terminal = terminal
        self._detach_keys = KeyWatch(detach_keys)
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
        typed, self._detached = self._detach_keys.take(data)
        if typed:
            self._stream.send_input(typed)
        elif not data:
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
