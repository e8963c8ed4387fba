"""What procedures work with, in one place."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from triarch.drivers.base import Driver
from triarch.engine.architectures import Architectures
from triarch.engine.events import EventBus
from triarch.engine.network_records import Claims, NetworkRecords, cards_of
from triarch.engine.plugged import resolved_devices
from triarch.engine.records import MachineRecords, ProfileRecords, TemplateRecords
from triarch.engine.snapshot_records import SnapshotRecords
from triarch.engine.trees import Trees
from triarch.model.device import Hardware
from triarch.model.driver import GuestPack, LayerFile, MachineSpec
from triarch.model.instance import Instance
from triarch.model.machine import Machine
from triarch.model.network import USER_NETWORK, Link, NoLink, UserLink
from triarch.model.operation import Progress
from triarch.model.template import Template
from triarch.network.addresses import card_number
from triarch.network.host import HostNetworks
from triarch.storage.base import Pool
from triarch.store.base import Store

Report = Callable[[str, Progress], None]
Need = Callable[[Machine], Awaitable[None]]


@dataclass(slots=True)
class Services:
    """The parts that an engine is made of.

    `need` returns when all runs that a machine depends on. `network` is the host's side of networks, `networks` their
    records; `claims` are the addresses and ports of machines whose records do not say so yet.
    """

    instance: Instance
    store: Store
    pool: Pool
    network: HostNetworks
    networks: NetworkRecords
    claims: Claims
    architectures: Architectures
    events: EventBus
    machines: MachineRecords
    templates: TemplateRecords
    profiles: ProfileRecords
    snapshots: SnapshotRecords
    report: Report
    trees: Trees
    need: Need
    guest_packs: dict[Hardware, GuestPack] = field(default_factory=dict)

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
            guest_pack=self.guest_packs.get(machine.hardware),
            devices=resolved_devices(machine, self.pool, self.link_for),
        )

    def template_of(self, machine: Machine) -> Template:
        return self.templates.get(f"{machine.template.name}@{machine.template.level}")

    def link(self, machine: Machine) -> Link:
        """How the machine's first card is plugged in."""
        if machine.network == USER_NETWORK and machine.nic is not None:
            return UserLink(nic=machine.nic, forwards=machine.forwards)
        return self.link_for(machine, "")

    def link_for(self, machine: Machine, device: str) -> Link:
        """How the card of its device `device` (kind `nic`) is plugged in; `NoLink` where there is none."""
        for card in cards_of(machine):
            network = self.networks.find(card.network)
            if card.device == device and network is not None:
                interface = self.network.host_interface(machine.index, card_number(card.nic.mac))
                return self.network.link(network, card.nic, interface)
        return NoLink()
