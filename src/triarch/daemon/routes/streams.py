"""Commands, consoles and throw-away machines over WebSockets."""

from __future__ import annotations

from litestar import websocket

from triarch.daemon.streams import Socket, Wire, serve_stream
from triarch.engine.engine import Engine
from triarch.model.driver import ExecRequest
from triarch.model.machine import Exit
from triarch.model.names import check_machine_name
from triarch.model.stream import ConsoleRequest, RunRequest


@websocket("/machines/{name:str}/exec")
async def exec_command(socket: Socket, engine: Engine, name: str) -> None:
    """Run a command in a running machine."""

    async def serve(request: ExecRequest, wire: Wire) -> Exit:
        return await engine.terminals.exec(check_machine_name(name), request, wire)

    await serve_stream(socket, ExecRequest, serve)


@websocket("/machines/{name:str}/console")
async def console(socket: Socket, engine: Engine, name: str) -> None:
    """Attach to a machine's console."""

    async def serve(request: ConsoleRequest, wire: Wire) -> None:
        await engine.terminals.console(check_machine_name(name), request, wire)

    await serve_stream(socket, ConsoleRequest, serve)


@websocket("/run")
async def run(socket: Socket, engine: Engine) -> None:
    """A throw-away machine with the client's input and output."""

    async def serve(request: RunRequest, wire: Wire) -> Exit:
        return await engine.run(request.machine, wire, request.terminal)

    await serve_stream(socket, RunRequest, serve)


HANDLERS = (exec_command, console, run)
