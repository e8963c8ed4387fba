"""The daemon's end of a stream: input and output of a command as messages on a WebSocket.

The messages are described in `triarch.model.stream`. Back pressure goes through both ways: output is not taken from the
command while the client does not read, and input is not taken from the client while the command does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import msgspec
from litestar import WebSocket
from litestar.exceptions import LitestarException

from triarch.engine.operations import problem_of
from triarch.errors import Error, Invalid
from triarch.model.driver import Data, EndOfInput, Input, Stream
from triarch.model.machine import Exit
from triarch.model.stream import NORMAL, STDERR, STDIN, STDOUT, Control, Ending

log = logging.getLogger(__name__)

T = TypeVar("T")
Socket = WebSocket[Any, Any, Any]

MAX_PENDING_INPUTS = 16
# How often a client is looked after while the command takes none of its input.
LOOK_SECONDS = 5.0
_CHANNELS = {Stream.STDOUT: bytes([STDOUT]), Stream.STDERR: bytes([STDERR])}


class ClientGone(ConnectionError):
    """The client closed its end or vanished."""


class Wire:
    """A client's far end as a `Stdio`."""

    def __init__(self, socket: Socket) -> None:
        self._socket = socket
        self._inputs: asyncio.Queue[Input] = asyncio.Queue(MAX_PENDING_INPUTS)
        self._gone = False
        self._ended = False

    async def read(self) -> Input:
        """The next piece of input; a client that is gone has no more."""
        if self._gone and self._inputs.empty():
            return EndOfInput()
        return await self._inputs.get()

    async def write(self, stream: Stream, data: bytes) -> None:
        """Returns when the client has room. Raises `ConnectionError` when it is gone."""
        await self._send({"type": "websocket.send", "bytes": _CHANNELS[stream] + data, "text": None})

    async def send_text(self, text: str) -> None:
        await self._send({"type": "websocket.send", "bytes": None, "text": text})

    async def close(self, code: int, reason: str = "") -> None:
        await self._send({"type": "websocket.close", "code": code, "reason": reason})

    async def _send(self, message: Any) -> None:
        if self._gone:
            raise ClientGone("the client is gone")
        try:
            await self._socket.send(message)
        except (OSError, LitestarException, RuntimeError) as error:
            self._gone = True
            raise ClientGone("the client is gone") from error

    async def _receive(self) -> bytes | str:
        message: Any = await self._socket.receive()
        if message["type"] == "websocket.disconnect":
            self._gone = True
            raise ClientGone("the client is gone")
        data: bytes | None = message.get("bytes")
        text: str | None = message.get("text")
        return data if data is not None else text or ""

    async def first(self, kind: type[T]) -> T:
        """The request that opens the stream. Raises `Invalid` that names the field at fault."""
        return _decode(await self._receive(), kind)

    async def _take_input(self) -> None:
        """Queue what the client sends until it is gone (`ClientGone`) or breaks the rules (`Invalid`)."""
        while True:
            item = _input_of(await self._receive())
            if self._ended:
                continue
            self._ended = isinstance(item, EndOfInput)
            while True:
                # Not wait_for: before Python 3.12 it loses a cancellation that comes as the queue takes the item.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_SECONDS):
                        await self._inputs.put(item)
                    break
                await self.write(Stream.STDOUT, b"")

    async def attend(self, work: Coroutine[Any, Any, T]) -> T:
        """Do `work` while input comes in. A client that goes away cancels it and `ClientGone` is raised."""
        worker = asyncio.create_task(work)
        reader = asyncio.create_task(self._take_input())
        try:
            await asyncio.wait((worker, reader), return_when=asyncio.FIRST_COMPLETED)
            if not worker.done():
                # Not at once: a driver that sees the end of its input may still put things away in order.
                worker.cancel()
                await asyncio.wait((worker,))
                reader.result()
            return worker.result()
        finally:
            for task in (worker, reader):
                task.cancel()
            await asyncio.gather(worker, reader, return_exceptions=True)

    async def end(self, ending: Ending) -> None:
        """Say how it ended, and close."""
        await self.send_text(msgspec.json.encode(ending).decode())
        await self.close(NORMAL)


def _decode(message: bytes | str, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(message, type=kind)
    except RecursionError as error:
        raise Invalid("invalid message: it is nested too deep") from error
    except msgspec.MsgspecError as error:
        text = str(error)
        raise Invalid(f"invalid message: {text[:1].lower()}{text[1:]}") from error


def _input_of(message: bytes | str) -> Input:
    if isinstance(message, bytes):
        if not message or message[0] != STDIN:
            raise Invalid("invalid message: a client's data begins with channel 0")
        return Data(message[1:])
    control = _decode(message, Control)
    if control.resize is not None:
        return control.resize
    if control.eof:
        return EndOfInput()
    raise Invalid("invalid message: it has neither 'resize' nor 'eof'")


async def serve_stream(socket: Socket, kind: type[T], serve: Callable[[T, Wire], Awaitable[Exit | None]]) -> None:
    """Accept, take the opening request of `kind`, and let `serve` do it; then tell the client how it ended."""
    await socket.accept()
    wire = Wire(socket)
    try:
        ending = await _serve(wire, kind, serve)
        await wire.end(ending)
    except ClientGone:
        log.debug("the client of %s went away", socket.url.path)


async def _serve(wire: Wire, kind: type[T], serve: Callable[[T, Wire], Awaitable[Exit | None]]) -> Ending:
    async def work(request: T) -> Exit | None:
        return await serve(request, wire)

    try:
        return Ending(exit=await wire.attend(work(await wire.first(kind))))
    except ClientGone:
        raise
    except Error as error:
        return Ending(error=problem_of(error))
    except Exception as error:
        log.exception("a stream failed")
        return Ending(error=problem_of(error))
