"""Changes of networks as procedures. The record comes first and goes last, so that what is on the host has an owner."""

from __future__ import annotations

from typing import ClassVar

import msgspec

from triarch.engine.procedure import Step
from triarch.engine.services import Services
from triarch.model.network import Network


class NetworkArguments(msgspec.Struct, frozen=True, kw_only=True):
    """`network` is the record as it is to be (or was, when it is deleted), `before` as it was."""

    network: Network
    before: Network | None = None


class NetworkProcedure:
    """What all changes of a network share."""

    verb: ClassVar[str]
    arguments_type: ClassVar[type[msgspec.Struct]] = NetworkArguments

    def __init__(self, services: Services, arguments: NetworkArguments) -> None:
        self.services = services
        self.arguments = arguments

    @property
    def target(self) -> str:
        return f"network/{self.arguments.network.name}"

    @property
    def result(self) -> str | None:
        return self.arguments.network.name

    def steps(self) -> tuple[Step, ...]:
        raise NotImplementedError

    async def store(self) -> None:
        await self.services.networks.put(self.arguments.network)

    async def forget(self) -> None:
        await self.services.networks.remove(self.arguments.network.name)

    async def clear(self) -> None:
        await self.services.network.remove(self.arguments.network)

    def publish(self, kind: str) -> None:
        self.services.events.publish(f"network-{kind}", self.target, {})


class CreateNetworkProcedure(NetworkProcedure):
    """Made on the host at once, so that what it lacks is said now; after `down` it comes back with its machines."""

    verb = "create-network"

    def steps(self) -> tuple[Step, ...]:
        return (
            Step("record", self.store, self.forget),
            Step("host", self._ensure, self.clear),
            Step("created", self._created, commits=True),
        )

    async def _ensure(self) -> None:
        await self.services.network.ensure(self.arguments.network)

    async def _created(self) -> None:
        self.publish("created")


class EditNetworkProcedure(NetworkProcedure):
    """Running machines are held to it at once."""

    verb = "edit-network"

    def steps(self) -> tuple[Step, ...]:
        return (Step("host", self._replace, self._back), Step("record", self._record, commits=True))

    async def _replace(self) -> None:
        await self.services.network.replace(self.arguments.network)

    async def _back(self) -> None:
        if self.arguments.before is not None:
            await self.services.network.replace(self.arguments.before)

    async def _record(self) -> None:
        await self.store()
        await self.services.network.replace(self.arguments.network)
        self.publish("changed")


class DeleteNetworkProcedure(NetworkProcedure):
    """Begun, it is finished."""

    verb = "delete-network"

    def steps(self) -> tuple[Step, ...]:
        return (Step("host", self.clear, commits=True), Step("forget", self._forget))

    async def _forget(self) -> None:
        await self.forget()
        self.publish("deleted")


NETWORK_PROCEDURES: tuple[type[NetworkProcedure], ...] = (
    CreateNetworkProcedure,
    EditNetworkProcedure,
    DeleteNetworkProcedure,
)
