"""A socket for one connection, beside the daemon's own: what is spoken there need not go through HTTP."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from triarch.errors import TimedOut
from triarch.model.driver import Data, EndOfInput, Input, Stream
from triarch.model.instance import Instance

_ACCEPT_SECONDS = 30.0
_CHUNK_BYTES = 64 << 10
_PREFIX = "door-"


class FarEnd:
    """A connection as a `Stdio`, which may also be handed to a program as it is."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def fileno(self) -> int:
        """For a program, which waits in its reads and writes."""
        self._connection.setblocking(True)
        return self._connection.fileno()

    async def read(self) -> Input:
        self._connection.setblocking(False)
        try:
            data = await asyncio.get_running_loop().sock_recv(self._connection, _CHUNK_BYTES)
        except ConnectionError:
            data = b""
        return Data(data) if data else EndOfInput()

    async def write(self, stream: Stream, data: bytes) -> None:
        """Standard error has no place here."""
        self._connection.setblocking(False)
        if stream is Stream.STDOUT:
            await asyncio.get_running_loop().sock_sendall(self._connection, data)


class Door:
    """`path` may be connected to by everybody who may connect to the daemon."""

    def __init__(self, path: Path, listener: socket.socket) -> None:
        self.path = path
        self._listener = listener

    @asynccontextmanager
    async def far_end(self) -> AsyncIterator[FarEnd]:
        """The connection that comes. Raises `TimedOut` when none does."""
        try:
            async with asyncio.timeout(_ACCEPT_SECONDS):
                connection, _ = await asyncio.get_running_loop().sock_accept(self._listener)
        except TimeoutError as error:
            raise TimedOut(f"nobody connected to {self.path} within {_ACCEPT_SECONDS:g} s") from error
        with connection:
            self.path.unlink(missing_ok=True)
            yield FarEnd(connection)


@asynccontextmanager
async def open_door(instance: Instance) -> AsyncIterator[Door]:
    """A new door, which is gone after the block."""
    path = Path(instance.run_dir) / f"{_PREFIX}{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as listener:
        listener.setblocking(False)
        try:
            listener.bind(str(path))
            # Nobody can connect before `listen`: there is no moment in which too many may.
            main = Path(instance.socket_path).stat()
            os.chown(path, main.st_uid, main.st_gid)
            path.chmod(main.st_mode & 0o777)
            listener.listen(1)
            yield Door(path, listener)
        finally:
            path.unlink(missing_ok=True)


def sweep_doors(instance: Instance) -> None:
    """Remove those that a killed daemon left."""
    for path in Path(instance.run_dir).glob(f"{_PREFIX}*"):
        path.unlink(missing_ok=True)
