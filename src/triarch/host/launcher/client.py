"""The daemon's end of the launcher."""

from __future__ import annotations

import asyncio
import fcntl
import itertools
import os
import socket
import subprocess
import sys
from contextlib import suppress

import msgspec

from triarch.errors import (
    Busy,
    Damaged,
    Error,
    Exhausted,
    InUse,
    Invalid,
    MachineFailed,
    NotFound,
    TimedOut,
    Unavailable,
    Unsupported,
)
from triarch.host.launcher.protocol import (
    MAX_MESSAGE_BYTES,
    Cancel,
    Join,
    Launch,
    Launched,
    Place,
    Plug,
    Probe,
    Refused,
    Reply,
    Unplug,
    Visit,
    Work,
)
from triarch.host.launcher.protocol import place_in as place_in
from triarch.host.process import program_environment

_CLASSES: dict[str, type[Error]] = {kind.code: kind for kind in (Busy, Damaged, Exhausted)}
_PLUG_CLASSES = _CLASSES | {kind.code: kind for kind in (InUse, Invalid, NotFound, Unavailable, Unsupported)}
_AT_ONCE = max(4, 2 * (os.cpu_count() or 1))
_SETTLE_SECONDS = 10.0
_POLL_SECONDS = 0.005


class Launcher:
    """Starts the fork server at its first use, and again when it was killed."""

    def __init__(self, run_dir: str) -> None:
        self._run_dir = run_dir
        self._place = place_in(run_dir)
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._connection: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._sending = asyncio.Lock()
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._decoder: msgspec.json.Decoder[Reply] = msgspec.json.Decoder(Reply)

    @property
    def place(self) -> Place:
        return self._place

    async def launch(self, request: Launch) -> Launched:
        """Create the container and return when it waits to be released.

        Raises what the failed step raised (`Busy` for a delta in use, `Damaged`, `Exhausted`), or `MachineFailed`
        that names the step. Nothing but the host's end of the network, control groups and files can be left over.
        """
        reply = await self._call(request)
        assert isinstance(reply, Launched)
        return reply

    async def probe(self, request: Probe) -> None:
        """Return when this host can assemble a machine. Raises as `launch`."""
        await self._call(request)

    async def visit(self, request: Visit, program_fd: int, stdio_fd: int) -> None:
        """Run a program in a tree and return when it has ended and its mounts are gone. Raises as `launch`.

        Cancelling this call ends the program. The caller closes its own descriptors.
        """
        await self._exchange(request, (program_fd, stdio_fd))

    async def join(self, request: Join, program_fd: int, stdio_fd: int, pidfd: int) -> None:
        """Run a program among a container's files, as `visit` does."""
        await self._exchange(request, (program_fd, stdio_fd, pidfd))

    async def plug(self, request: Plug) -> None:
        """Mount something in a container that exists. Raises as `launch`."""
        await self._call(request)

    async def unplug(self, request: Unplug) -> None:
        """Take it away again. Raises `InUse` where the container does not let go of it."""
        await self._call(request)

    async def settle(self) -> None:
        """Return when no launch of an earlier daemon is still under way. Raises `TimedOut`."""
        if self._connection is not None:
            return
        try:
            lock_fd = os.open(self._place.lock, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            async with asyncio.timeout(_SETTLE_SECONDS):
                while True:
                    with suppress(BlockingIOError):
                        fcntl.flock(lock_fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                        return
                    await asyncio.sleep(_POLL_SECONDS)
        except TimeoutError as error:
            raise TimedOut(f"another launcher still works in {self._run_dir}") from error
        finally:
            os.close(lock_fd)

    async def close(self) -> None:
        """End the fork server. Machines keep running."""
        self._disconnect("the launcher was closed")
        process, self._process = self._process, None
        if process is not None:
            await asyncio.to_thread(process.wait)

    @property
    def pid(self) -> int | None:
        """Of the fork server, while there is one: a new one sees the mounts that this process sees."""
        return None if self._process is None else self._process.pid

    async def _call(self, request: Launch | Probe | Plug | Unplug) -> Reply:
        async with self._slots:
            return await self._exchange(request)

    async def _exchange(self, request: Work, fds: tuple[int, ...] = ()) -> Reply:
        number = next(self._numbers)
        request = msgspec.structs.replace(request, id=number)
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        try:
            await self._send(request, fds)
            reply = await asyncio.shield(future)
        except asyncio.CancelledError:
            await self._give_up(number, future)
            raise
        finally:
            self._waiting.pop(number, None)
        if isinstance(reply, Refused):
            classes = _PLUG_CLASSES if isinstance(request, Plug | Unplug) else _CLASSES
            kind = classes.get(reply.code or "", MachineFailed)
            raise kind(f"cannot {reply.step}: {reply.message}", step=reply.step)
        return reply

    async def _give_up(self, number: int, future: asyncio.Future[Reply]) -> None:
        """Return when the launch has really ended: only then can its remains be cleaned up."""
        if self._connection is not None:
            with suppress(Error, OSError):
                await self._send(Cancel(id=number))
        with suppress(Error):
            await future

    async def _send(self, request: Work | Cancel, fds: tuple[int, ...] = ()) -> None:
        async with self._sending:
            connection = self._connection or self._connect()
            message = msgspec.json.encode(request)
            try:
                if fds:
                    await _send_with(connection, message, fds)
                else:
                    await asyncio.get_running_loop().sock_sendall(connection, message)
            except OSError as error:
                self._disconnect("the launcher ended")
                raise Unavailable("the launcher ended", hint="try again") from error

    def _connect(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        argv = [sys.executable, "-I", "-m", "triarch.host.launcher", self._run_dir, str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], env=program_environment()
            )
        ours.setblocking(False)
        asyncio.get_running_loop().add_reader(ours.fileno(), self._receive)
        self._connection = ours
        return ours

    def _receive(self) -> None:
        assert self._connection is not None
        try:
            message = self._connection.recv(MAX_MESSAGE_BYTES)
        except BlockingIOError:
            return
        except ConnectionError:
            message = b""
        if not message:
            self._disconnect("the launcher ended")
            return
        reply = self._decoder.decode(message)
        future = self._waiting.get(reply.id)
        if future is not None and not future.done():
            future.set_result(reply)

    def _disconnect(self, reason: str) -> None:
        connection, self._connection = self._connection, None
        if connection is None:
            return
        asyncio.get_running_loop().remove_reader(connection.fileno())
        connection.close()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(Unavailable(reason, hint="try again"))


async def _send_with(connection: socket.socket, message: bytes, fds: tuple[int, ...]) -> None:
    while True:
        try:
            socket.send_fds(connection, [message], fds)
            return
        except BlockingIOError:
            # Packets are small and taken at once: this hardly ever waits.
            await asyncio.sleep(_POLL_SECONDS)
