"""Networks as stored, with the copy in memory, and who has which address on them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

from triarch.engine.records import MachineRecords, NamedRecords
from triarch.errors import Busy, Exhausted
from triarch.model.device import NicDevice
from triarch.model.machine import Machine
from triarch.model.network import DEFAULT_NETWORK, Network, NetworkKind, Nic
from triarch.store.base import Store

if TYPE_CHECKING:
    from triarch.network.host import HostNetworks

# Where earlier releases kept the subnet of the built-in network.
SUBNET_KEY = "network/nat"
MAX_NETWORKS = 999


class NetworkRecords(NamedRecords[Network]):
    """Networks; the built-in one is stored when it is first needed."""

    noun = "network"
    kind = Network

    def __init__(self, store: Store, host: HostNetworks) -> None:
        super().__init__(store)
        self._host = host
        # Those that are being made: their indexes and names are taken.
        self.reserved: dict[str, Network] = {}
        # Those that are being deleted: nobody gets on them any more.
        self.leaving: set[str] = set()

    async def load(self) -> None:
        await super().load()
        former = await self._store.get(SUBNET_KEY)
        if former is not None and DEFAULT_NETWORK not in self._by_name:
            await self.put(self._built_in(former.value.decode()))

    async def need(self, name: str) -> Network:
        """As `get`; the built-in network is made up at the first call, on ranges that the host does not use.

        Raises `Busy` too, for one that is being deleted.
        """
        if name in self.leaving:
            raise Busy(f"network '{name}' is being deleted", hint="triarch network list", network=name)
        if name == DEFAULT_NETWORK and name not in self._by_name:
            await self.put(self._built_in(str(self._host.choose_subnet(self.all()))))
        return self.get(name)

    def _built_in(self, subnet: str) -> Network:
        subnet6 = self._host.choose_subnet6(0, self.all())
        return Network(
            name=DEFAULT_NETWORK,
            index=0,
            kind=NetworkKind.NAT,
            ipv4=subnet,
            ipv6=None if subnet6 is None else str(subnet6),
            description="made by itself",
            created_at=datetime.now(UTC),
        )

    def free_index(self) -> int:
        used = {network.index for network in (*self._by_name.values(), *self.reserved.values())}
        for index in range(1, MAX_NETWORKS + 1):
            if index not in used:
                return index
        raise Exhausted(f"this instance has {MAX_NETWORKS} networks already, which is the most it takes")


class Card(NamedTuple):
    """One network card of a machine: `device` is its name among the machine's devices, empty for the first one."""

    machine: str
    network: str
    device: str
    nic: Nic


def cards_of(machine: Machine) -> Iterator[Card]:
    """All cards of a machine that are on networks, the first one first."""
    if machine.nic is not None:
        yield Card(machine.name, machine.network, "", machine.nic)
    for name, nic in machine.nics.items():
        device = machine.devices.get(name)
        if isinstance(device, NicDevice):
            yield Card(machine.name, device.network, name, nic)


class Claims:
    """Machines as they will be: what they have is taken before their records say so."""

    def __init__(self, machines: MachineRecords) -> None:
        self._machines = machines
        self._claimed: dict[str, Machine] = {}

    def claim(self, machine: Machine) -> None:
        """From now on its addresses, ports and aliases are its own."""
        self._claimed[machine.uuid] = machine

    def release(self, target: str) -> None:
        """An operation on `machine/NAME` ended: its record says what it has, or nothing came of it."""
        for uuid, machine in tuple(self._claimed.items()):
            if f"machine/{machine.name}" == target:
                del self._claimed[uuid]

    def others(self, uuid: str) -> Iterator[Machine]:
        """Every other machine, as it is recorded and as it will be."""
        yield from (kept.value for kept in self._machines.all() if kept.value.uuid != uuid)
        yield from (machine for key, machine in self._claimed.items() if key != uuid)
