"""A file server of the test's own: frames that it chose, or the real program in a tree of its own."""

from __future__ import annotations

import asyncio
import functools
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from triarch.client.file_link import DirectCarrier, FileLink
from triarch.guest.file_server import ensure_file_server
from triarch.model.file_protocol import Frame, frame
from triarch.model.stream import Ending

HELLO = frame(Frame.HELLO, (1).to_bytes(4, "big"))
DONE = frame(Frame.DONE, bytes(8))


def names_in(directory: str | Path) -> list[str]:
    """What is in a directory, sorted."""
    return sorted(path.name for path in Path(directory).iterdir())


class EndedStream:
    """The stream beside a conversation, which has ended in good order."""

    ending = Ending()
    wants_write = False

    def close(self) -> None:
        """Nothing is open."""


def link_on(connection: socket.socket) -> FileLink:
    stream: Any = EndedStream()
    return FileLink(stream, DirectCarrier(connection), connection)


@contextmanager
def saying(*answers: bytes) -> Iterator[FileLink]:
    """A link to a server that says these things whatever it is asked, and then hangs up."""
    ours, theirs = socket.socketpair()

    def talk() -> None:
        with theirs:
            try:
                for answer in answers:
                    theirs.sendall(answer)
                theirs.shutdown(socket.SHUT_WR)
                while theirs.recv(1 << 16):
                    pass
            except OSError:
                return

    thread = threading.Thread(target=talk)
    thread.start()
    try:
        with link_on(ours) as link:
            yield link
    finally:
        ours.close()
        thread.join()


def answers_of(tree: Path, requests: bytes) -> tuple[int, bytes]:
    """The exit code and the answers of the real program, which has `tree` as its root directory."""
    if os.geteuid():
        pytest.skip("a root directory of its own needs root")
    program = tree / ".server"
    program.unlink(missing_ok=True)
    program.write_bytes(_program().read_bytes())
    program.chmod(0o755)
    done = subprocess.run(["chroot", tree, "/.server"], input=requests, capture_output=True, timeout=60, check=False)
    assert done.stderr == b""
    return done.returncode, done.stdout


@functools.cache
def _program() -> Path:
    return asyncio.run(ensure_file_server())
