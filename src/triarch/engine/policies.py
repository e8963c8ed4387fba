"""What a machine's policies allow, and which of them can mean nothing."""

from __future__ import annotations

import os

from triarch.engine.first_boot import check_first_boot
from triarch.engine.order import check_dependencies, dependencies, dependents
from triarch.engine.probe import check_health
from triarch.engine.services import Services
from triarch.errors import Denied, InUse, Invalid
from triarch.model.device import DiskDevice
from triarch.model.machine import Machine
from triarch.model.names import some_of
from triarch.model.policy import RestartPolicy


def check_unprotected(machine: Machine, verb: str) -> None:
    """Raise `Denied` for a machine that is protected from what would destroy something of it."""
    if machine.protected:
        raise Denied(
            f"cannot {verb} machine '{machine.name}': it is protected",
            hint=f"triarch set {machine.name} protected=false",
            machine=machine.name,
        )


def check_unneeded(services: Services, machine: Machine, verb: str) -> None:
    """Raise `InUse` for a machine that others depend on: nobody would find it again under its name."""
    depends = dependencies(kept.value for kept in services.machines.all())
    needing = dependents(depends)[machine.name]
    if needing:
        left = ",".join(name for name in depends[needing[0]] if name != machine.name)
        raise InUse(
            f"cannot {verb} machine '{machine.name}': {some_of(needing)} depends on it",
            hint=f"triarch set {needing[0]} depends-on={left}",
            machine=machine.name,
        )


def check_disks(services: Services, machine: Machine) -> None:
    """One disk belongs to one machine, once: two kernels would ruin its filesystem. Raises `InUse`.

    Any number may read one that none of them writes to.
    """
    machines = services.claims.others(machine.uuid)
    others = [(other.name, name, disk) for other in machines for name, disk in _disks(other)]
    for name, disk in _disks(machine):
        for owner, owned, other in others:
            same = os.path.realpath(other.source) == os.path.realpath(disk.source)
            if same and not (disk.read_only and other.read_only):
                raise InUse(
                    f"{disk.source} is device '{owned}' of machine '{owner}'",
                    hint=f"triarch device remove {owner} {owned}",
                )
        others.append((machine.name, name, disk))


def _disks(machine: Machine) -> list[tuple[str, DiskDevice]]:
    return [(name, device) for name, device in machine.devices.items() if isinstance(device, DiskDevice)]


def check_policies(services: Services, machine: Machine) -> None:
    """Refuse policies of a new or changed machine that can mean nothing: the check, dependencies that go round.

    Raises `Invalid`, and `InUse` for a disk that another machine has.
    """
    check_health(machine)
    check_disks(services, machine)
    check_first_boot(machine.name, machine.first_boot, services.template_of(machine))
    if machine.ephemeral and machine.restart is not RestartPolicy.NO:
        raise Invalid(f"machine '{machine.name}' is deleted when it stops, so it cannot be restarted then")
    check_dependencies((kept.value for kept in services.machines.all()), machine)
