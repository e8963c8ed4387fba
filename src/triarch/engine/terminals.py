"""Commands in machines, their consoles and what they have said."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

from triarch.drivers.base import Console, Exec, Stdio
from triarch.engine.logs import Beginning, LogReader, LogWatch, follow_log, read_on
from triarch.engine.services import Services
from triarch.model.command import check_exec
from triarch.model.driver import Data, EndOfInput, ExecRequest, Input, Resize, Stream
from triarch.model.machine import Exit, Machine
from triarch.model.names import check_machine_name
from triarch.model.state import State, Verb, next_state
from triarch.model.stream import ConsoleRequest


class Terminals:
    """No lock is taken: any number may be at one machine at once."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._watch = LogWatch()

    def close(self) -> None:
        self._watch.close()

    async def exec(self, name: str, request: ExecRequest, stdio: Stdio) -> Exit:
        """Run a command in a running machine. Raises `Invalid`, `WrongState`, `Unsupported`."""
        machine = self._machine(name, Verb.EXEC)
        driver = self._services.driver(machine)
        check_exec(name, request)
        if not isinstance(driver, Exec):
            raise self._services.architectures.lacks(machine.architecture, "exec")
        return await driver.exec(self._services.spec(machine), request, stdio)

    async def console(self, name: str, request: ConsoleRequest, stdio: Stdio) -> None:
        """Show what a running machine says, from a while ago on, and let the far end type; return when it has stopped.

        What is shown comes from the log, so that whoever reads slowly holds up neither the machine nor other readers.
        """
        machine = self._machine(name, Verb.CONSOLE)
        driver = self._services.driver(machine)
        if not isinstance(driver, Console):
            raise self._services.architectures.lacks(machine.architecture, "console")
        typist = _ReadOnly(stdio) if request.read_only else stdio
        # Before anybody types: what comes of it must be seen, without any history too.
        beginning = Beginning(tail_bytes=request.history_bytes)
        reader = await asyncio.to_thread(LogReader, self._services.instance.log_path(machine.uuid), beginning)
        typing = asyncio.create_task(driver.console(self._services.spec(machine), typist))
        showing = asyncio.create_task(self._show(reader, machine, stdio))
        try:
            await asyncio.wait((typing, showing), return_when=asyncio.FIRST_COMPLETED)
            if not showing.done():
                # That nobody types any more says nothing of what there is to read.
                typing.result()
            await showing
        finally:
            for task in (typing, showing):
                task.cancel()
            await asyncio.gather(typing, showing, return_exceptions=True)
            reader.close()

    def logs(self, name: str, beginning: Beginning, *, follow: bool = False) -> AsyncIterator[bytes]:
        """The console output that was kept; with `follow` also what comes, until the machine stops."""
        machine = self._services.machines.get(check_machine_name(name))
        lives = self._lives(machine)
        path = self._services.instance.log_path(machine.uuid)
        return follow_log(path, self._watch, lambda: follow and lives(), beginning)

    async def _show(self, reader: LogReader, machine: Machine, stdio: Stdio) -> None:
        async with aclosing(read_on(reader, self._watch, self._lives(machine))) as pieces:
            async for data in pieces:
                await stdio.write(Stream.STDOUT, data)

    def _lives(self, machine: Machine) -> Callable[[], bool]:
        def lives() -> bool:
            kept = self._services.machines.find_uuid(machine.uuid)
            return kept is not None and kept.state in (State.RUNNING, State.PAUSED)

        return lives

    def _machine(self, name: str, verb: Verb) -> Machine:
        machine = self._services.machines.get(check_machine_name(name))
        next_state(name, machine.state, verb)
        return machine


class _ReadOnly:
    """A far end of which nothing is typed; its window counts for nothing either."""

    def __init__(self, stdio: Stdio) -> None:
        self._stdio = stdio

    async def read(self) -> Input:
        while isinstance(await self._stdio.read(), Data | Resize):
            pass
        return EndOfInput()

    async def write(self, stream: Stream, data: bytes) -> None:
        await self._stdio.write(stream, data)
