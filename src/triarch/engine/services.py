"""What procedures work with, in one place."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from ipaddress import IPv4Network
from typing import Protocol

from triarch.drivers.base import Driver
from triarch.engine.architectures import Architectures
from triarch.engine.events import EventBus
from triarch.engine.plugged import resolved_devices
from triarch.engine.records import MachineRecords, ProfileRecords, TemplateRecords
from triarch.engine.snapshot_records import SnapshotRecords
from triarch.engine.trees import Trees
from triarch.model.driver import GuestPack, LayerFile, MachineSpec
from triarch.model.instance import Instance
from triarch.model.machine import Machine
from triarch.model.network import DEFAULT_NETWORK, USER_NETWORK, BridgeLink, Link, Nic, NoLink, UserLink
from triarch.model.operation import Progress
from triarch.model.template import Template
from triarch.storage.base import Pool
from triarch.store.base import Store

Report = Callable[[str, Progress], None]
Need = Callable[[Machine], Awaitable[None]]


class Network(Protocol):
    """The NAT network as the engine uses it (`triarch.network.nat.NatNetwork`)."""

    def probe(self) -> None: ...
    def choose_subnet(self) -> IPv4Network: ...
    def nic(self, subnet: IPv4Network, index: int) -> Nic: ...
    def link(self, subnet: IPv4Network, machine: Machine) -> BridgeLink: ...
    async def ensure(self, subnet: IPv4Network) -> None: ...
    async def publish(self, name: str, ip: str) -> None: ...
    async def withdraw(self, name: str) -> None: ...
    async def release(self, index: int) -> None: ...
    async def teardown(self) -> None: ...


SUBNET_KEY = "network/nat"


@dataclass(slots=True)
class Services:
    """The parts that an engine is made of.

    `need` returns when all runs that a machine depends on. `subnet` is chosen once in an instance's life and kept in
    the store.
    """

    instance: Instance
    store: Store
    pool: Pool
    network: Network
    architectures: Architectures
    events: EventBus
    machines: MachineRecords
    templates: TemplateRecords
    profiles: ProfileRecords
    snapshots: SnapshotRecords
    report: Report
    trees: Trees
    need: Need
    subnet: IPv4Network | None = None
    guest_pack: GuestPack | None = field(default=None)

    async def load_subnet(self) -> None:
        entry = await self.store.get(SUBNET_KEY)
        if entry is not None:
            self.subnet = IPv4Network(entry.value.decode())

    async def need_subnet(self) -> IPv4Network:
        """This instance's address range; chosen free of the host's own at the first call."""
        if self.subnet is None:
            self.subnet = self.network.choose_subnet()
            await self.store.put(SUBNET_KEY, str(self.subnet).encode())
        return self.subnet

    def driver(self, machine: Machine) -> Driver:
        return self.architectures.driver(machine.architecture)

    def spec(self, machine: Machine) -> MachineSpec:
        """Resolve a machine for its driver. Layers are named here and verified only before a start."""
        template = self.template_of(machine)
        return MachineSpec(
            machine=machine,
            template=template,
            layers=tuple(
                LayerFile(
                    digest=layer.digest, path=str(self.pool.layer_path(layer.digest)), size_bytes=layer.size_bytes
                )
                for layer in template.layers
            ),
            delta_path=str(self.pool.delta_path(machine.uuid)),
            link=self.link(machine),
            run_dir=str(self.instance.machine_run_dir(machine.uuid)),
            state_dir=str(self.instance.machine_state_dir(machine.uuid)),
            log_path=str(self.instance.log_path(machine.uuid)),
            cgroup=self.instance.cgroup(machine.uuid),
            guest_pack=self.guest_pack,
            devices=resolved_devices(machine, self.pool, self.device_link),
        )

    def device_link(self, machine: Machine, device: str) -> Link:
        """How the card of this device is plugged in."""
        return NoLink()

    def template_of(self, machine: Machine) -> Template:
        return self.templates.get(f"{machine.template.name}@{machine.template.level}")

    def link(self, machine: Machine) -> Link:
        if machine.network == DEFAULT_NETWORK and machine.nic is not None and self.subnet is not None:
            return self.network.link(self.subnet, machine)
        if machine.network == USER_NETWORK and machine.nic is not None:
            return UserLink(nic=machine.nic, forwards=machine.forwards)
        return NoLink()
