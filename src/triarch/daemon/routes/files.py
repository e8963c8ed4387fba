"""The files of machines, over a WebSocket or a socket of their own."""

from __future__ import annotations

from litestar import websocket

from triarch.daemon.door import open_door
from triarch.daemon.streams import Socket, Wire, serve_stream
from triarch.engine.engine import Engine
from triarch.model.driver import Stream
from triarch.model.names import check_machine_name
from triarch.model.stream import FilesRequest


@websocket("/machines/{name:str}/files")
async def machine_files(socket: Socket, engine: Engine, name: str) -> None:
    """Speak with the file server in a machine (`triarch.model.file_protocol`)."""

    async def serve(request: FilesRequest, wire: Wire) -> None:
        machine = engine.machine(check_machine_name(name)).name
        if not request.direct:
            await engine.files.serve(machine, wire)
            return
        async with open_door(engine.instance) as door:
            await wire.write(Stream.STDERR, str(door.path).encode())
            async with door.far_end() as far_end:
                await engine.files.serve(machine, far_end)

    await serve_stream(socket, FilesRequest, serve)


HANDLERS = (machine_files,)
