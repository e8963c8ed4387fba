"""The event stream."""

from __future__ import annotations

import msgspec
from litestar import websocket

from triarch.daemon.streams import ClientGone, Socket, Wire
from triarch.engine.engine import Engine
from triarch.errors import Exhausted
from triarch.model.stream import TOO_SLOW


@websocket("/events")
async def events(socket: Socket, engine: Engine) -> None:
    """Every event from now on, one JSON message each. A client that is too slow is closed with code 1013."""
    await socket.accept()
    wire = Wire(socket)
    encoder = msgspec.json.Encoder()

    async def forward() -> None:
        try:
            async for event in engine.events():
                await wire.send_text(encoder.encode(event).decode())
        except Exhausted as error:
            await wire.close(TOO_SLOW, error.message)

    try:
        await wire.attend(forward())
    except ClientGone:
        return


HANDLERS = (events,)
