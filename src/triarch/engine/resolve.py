"""From what a person asked for to a machine: every choice is made here, before anything is changed."""

from __future__ import annotations

import os
import secrets
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime

from triarch.drivers.base import Driver
from triarch.engine.cards import check_network, need_networks, placed
from triarch.engine.policies import check_policies
from triarch.engine.services import Services
from triarch.engine.settings import materialize
from triarch.errors import Exhausted, Invalid, MissingProgram, Unavailable
from triarch.host import facts
from triarch.host.tap import TAP_DEVICE
from triarch.model.command import check_command
from triarch.model.driver import Kind
from triarch.model.instance import MAX_MACHINES
from triarch.model.machine import CreateMachine, Machine
from triarch.model.names import check_machine_name
from triarch.model.network import DEFAULT_NETWORK, USER_NETWORK
from triarch.model.resources import Resources, format_size
from triarch.model.settings import add_up, resources_of
from triarch.model.state import State
from triarch.model.template import Init, TemplateRef

_ADJECTIVES = (
    "amber brave calm clever eager fair gentle happy keen lively merry noble proud quick quiet rapid swift wise"
)
_NOUNS = "badger crane falcon fox heron ibex jackal kestrel lark lynx marten otter owl puffin raven seal stoat wren"


async def resolve(services: Services, request: CreateMachine, taken: Mapping[str, int]) -> Machine:
    """The machine that `request` describes. Raises `Invalid`, `NotFound`, `Unsupported` or `DriverUnavailable`.

    `taken` are names and indexes of machines that have no record yet; the caller adds this one to them before it lets
    anything else run.
    """
    name = check_machine_name(request.name) if request.name is not None else _free_name(services, taken)
    template = services.templates.get(request.template)
    architecture = request.architecture or await services.architectures.default()
    driver = await services.architectures.need(architecture)
    settings = add_up((*services.profiles.layers(request.profiles), request.settings))
    check_resources(name, resources_of(settings))
    check_command(request.command, settings.environment or {})
    init = request.init or (Init.APP if request.command else template.init)
    if init is Init.APP and not (request.command or template.command):
        raise Invalid(
            f"machine '{name}' has no command to run: template '{template.ref}' has none of its own",
            hint=f"triarch run {template.name} -- COMMAND",
        )
    if init is Init.SYSTEM and request.command:
        raise Invalid(f"machine '{name}' boots its own init, so it takes no command", hint="leave out --init system")
    network = settings.network or _default_network(services, driver)
    await need_networks(services, network, settings)
    # From here on nothing waits: what is free now is free when the caller takes it.
    if name in taken and request.name is None:
        name = _free_name(services, taken)
    index = _free_index(services, taken)
    machine = Machine(
        name=name,
        uuid=str(uuid.uuid4()),
        index=index,
        template=TemplateRef(name=template.name, level=template.level, digest=template.digest),
        architecture=architecture,
        init=init,
        command=request.command,
        profiles=request.profiles,
        own=request.settings,
        network=network,
        ids=services.instance.id_range(index),
        ephemeral=request.ephemeral,
        created_at=datetime.now(UTC),
        state=State.STOPPED,
    )
    machine = placed(services, materialize(machine, settings, template.environment), settings)
    driver.validate(machine)
    check_policies(services, machine)
    check_network(services, machine)
    return machine


def check_resources(name: str, resources: Resources) -> None:
    """Refuse what this host can never give. Raises `Exhausted` that states what there is."""
    host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if resources.memory_bytes is not None and resources.memory_bytes > host_bytes:
        raise Exhausted(
            f"machine '{name}' asks for {format_size(resources.memory_bytes)} of memory: "
            f"this host has {format_size(host_bytes)}",
            machine=name,
        )
    host_cpus = os.cpu_count() or 1
    if resources.cpus is not None and resources.cpus > host_cpus:
        raise Exhausted(f"machine '{name}' asks for {resources.cpus:g} cpus: this host has {host_cpus}", machine=name)
    if resources.cpu_set is not None:
        _check_cpu_set(name, resources.cpu_set, host_cpus)


def _check_cpu_set(name: str, cpu_set: str, host_cpus: int) -> None:
    for part in cpu_set.split(","):
        first, _, last = part.partition("-")
        if int(last or first) < int(first):
            raise Invalid(f"illegal cpu set '{cpu_set}': {part} ends before it begins", machine=name)
        if int(last or first) >= host_cpus:
            raise Exhausted(
                f"machine '{name}' asks for cpu {last or first}: this host has {host_cpus}, from 0 on", machine=name
            )


def _default_network(services: Services, driver: Driver) -> str:
    """`nat`; where the host allows no bridge or tap, a VM makes do with `user`. A missing program is no such reason."""
    if driver.kind is Kind.OS_LEVEL:
        return DEFAULT_NETWORK
    try:
        services.network.probe()
    except MissingProgram:
        return DEFAULT_NETWORK
    except Unavailable:
        return USER_NETWORK
    return USER_NETWORK if facts.open_error(TAP_DEVICE) else DEFAULT_NETWORK


def _free_index(services: Services, taken: Mapping[str, int]) -> int:
    used = {*taken.values(), *(kept.value.index for kept in services.machines.all())}
    for index in range(1, MAX_MACHINES + 1):
        if index not in used:
            return index
    raise Exhausted(f"this instance has {MAX_MACHINES} machines already, which is the most it takes")


def _free_name(services: Services, taken: Mapping[str, int]) -> str:
    adjectives, nouns = _ADJECTIVES.split(), _NOUNS.split()
    while True:
        name = f"{secrets.choice(adjectives)}-{secrets.choice(nouns)}"
        if name in taken or services.machines.find(name) is not None:
            name = f"{name}-{secrets.randbelow(10_000)}"
        if name not in taken and services.machines.find(name) is None:
            return name
