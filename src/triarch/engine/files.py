"""The files of machines, running or stopped."""

from __future__ import annotations

import asyncio

from triarch.drivers.base import Files as HasFiles
from triarch.drivers.base import Stdio
from triarch.engine.machine_procedures import MachineArguments, MachineProcedure
from triarch.engine.operations import Operations
from triarch.engine.procedure import Step
from triarch.engine.services import Services
from triarch.engine.trees import Tree
from triarch.errors import Failed, Unsupported, WrongState
from triarch.model.machine import Machine
from triarch.model.names import check_machine_name
from triarch.model.state import State


class VisitFiles(MachineProcedure):
    """Somebody is at the files of a machine that does not run; nothing can start it or change it meanwhile.

    There is nothing to undo: with the daemon the file server and its mounts have died.
    """

    verb = "files"

    def __init__(self, services: Services, arguments: MachineArguments, stdio: Stdio | None = None) -> None:
        super().__init__(services, arguments)
        self._stdio = stdio

    def steps(self) -> tuple[Step, ...]:
        return (Step("prepare", self._prepare), Step("serve", self._serve))

    async def _prepare(self) -> None:
        await self.machine.verify_layers()
        if self.machine.current.state is State.FAILED:
            await self.machine.check_delta()

    async def _serve(self) -> None:
        if self._stdio is None:
            raise Failed("whoever was at the files is gone")
        spec = self.machine.spec
        tree = Tree(layers=spec.layers, delta_path=spec.delta_path, ids=spec.machine.ids, read_only=False)
        await self.services.trees.serve(tree, self._stdio)


FILES_PROCEDURES = (VisitFiles,)


class Files:
    """Lets callers speak with the file server in a machine (`triarch.model.file_protocol`)."""

    def __init__(self, services: Services, operations: Operations) -> None:
        self._services = services
        self._operations = operations

    async def serve(self, name: str, stdio: Stdio) -> None:
        """Return when the far end has ended its input and has everything that was answered.

        Any number may be at the files of a running machine; one at a time at those of another, held by an operation
        with the verb `files`. Raises `WrongState` for a paused machine, `Busy`, and `Unsupported` where the
        architecture has no files or this daemon may not mount a stopped machine's.
        """
        machine = self._services.machines.get(check_machine_name(name))
        if machine.state is State.PAUSED:
            raise WrongState(
                f"cannot reach the files of machine '{name}': it is paused; that needs running or stopped",
                hint=f"triarch resume {name}",
                machine=name,
            )
        if machine.state is State.RUNNING:
            await self._serve_running(machine, stdio)
        else:
            await self._serve_stopped(machine, stdio)

    async def _serve_running(self, machine: Machine, stdio: Stdio) -> None:
        driver = self._services.driver(machine)
        if not isinstance(driver, HasFiles):
            having = self._services.architectures.having("files")
            raise Unsupported(
                f"architecture '{machine.architecture}' cannot reach a machine's files"
                + (f"; {', '.join(having)} can" if having else ""),
                machine=machine.name,
            )
        await driver.serve_files(self._services.spec(machine), stdio)

    async def _serve_stopped(self, machine: Machine, stdio: Stdio) -> None:
        self._operations.check_free(f"machine/{machine.name}")
        try:
            self._services.trees.check()
        except Unsupported as error:
            raise Unsupported(
                f"cannot reach the files of machine '{machine.name}', which is {machine.state.value}: {error.message}",
                hint=f"triarch start {machine.name}",
                machine=machine.name,
            ) from error
        operation = self._operations.begin(VisitFiles(self._services, MachineArguments(machine=machine), stdio))
        try:
            await self._operations.outcome(operation.id)
        except asyncio.CancelledError:
            self._operations.cancel(operation.id)
            # Whoever comes next must not find it held by one who has left.
            await asyncio.shield(self._operations.wait(operation.id))
            raise
