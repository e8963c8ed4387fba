"""What a machine's policies allow, and which of them can mean nothing."""

from __future__ import annotations

from triarch.engine.first_boot import check_first_boot
from triarch.engine.order import check_dependencies
from triarch.engine.probe import check_health
from triarch.engine.services import Services
from triarch.errors import Denied, Invalid
from triarch.model.machine import Machine
from triarch.model.policy import RestartPolicy


def check_unprotected(machine: Machine, verb: str) -> None:
    """Raise `Denied` for a machine that is protected from what would destroy something of it."""
    if machine.protected:
        raise Denied(
            f"cannot {verb} machine '{machine.name}': it is protected",
            hint=f"triarch set {machine.name} protected=false",
            machine=machine.name,
        )


def check_policies(services: Services, machine: Machine) -> None:
    """Refuse policies of a new or changed machine that can mean nothing: the check, dependencies that go round.

    Raises `Invalid`.
    """
    check_health(machine)
    check_first_boot(machine.name, machine.first_boot, services.template_of(machine))
    if machine.ephemeral and machine.restart is not RestartPolicy.NO:
        raise Invalid(f"machine '{machine.name}' is deleted when it stops, so it cannot be restarted then")
    check_dependencies((kept.value for kept in services.machines.all()), machine)
