"""What every procedure on one machine is made of, whatever else its arguments say."""

from __future__ import annotations

from typing import ClassVar, Generic, Protocol, TypeVar

import msgspec

from triarch.engine.machine_actions import MachineActions
from triarch.engine.procedure import Step
from triarch.engine.services import Services
from triarch.model.machine import Machine


class _OfMachine(Protocol):
    """Arguments: a frozen struct with the machine's record as it was when the operation began."""

    @property
    def machine(self) -> Machine: ...


A = TypeVar("A", bound=_OfMachine)


class OnMachine(Generic[A]):
    """The base of procedures that hold a machine. See `procedure.Procedure`."""

    verb: ClassVar[str]
    arguments_type: ClassVar[type[msgspec.Struct]]

    def __init__(self, services: Services, arguments: A) -> None:
        self.services = services
        self.arguments = arguments
        self.machine = MachineActions(services, arguments.machine)

    @property
    def target(self) -> str:
        return self.machine.target

    @property
    def result(self) -> str | None:
        return self.arguments.machine.name

    def steps(self) -> tuple[Step, ...]:
        raise NotImplementedError
