"""What the daemon can ask for about networks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from ipaddress import IPv4Network, IPv6Network, ip_network

import msgspec
from msgspec import UNSET

from triarch.engine.network_procedures import (
    CreateNetworkProcedure,
    DeleteNetworkProcedure,
    EditNetworkProcedure,
    NetworkArguments,
)
from triarch.engine.network_records import cards_of
from triarch.engine.operations import Operations
from triarch.engine.services import Services
from triarch.errors import Busy, Exists, InUse, Invalid, NotFound, Unsupported
from triarch.model.names import check_network_name, some_of
from triarch.model.network import (
    DEFAULT_NETWORK,
    NO_NETWORK,
    USER_NETWORK,
    AclRule,
    AddAclRule,
    CreateNetwork,
    EditNetwork,
    Network,
    NetworkKind,
    NetworkView,
    Protocol,
)
from triarch.model.operation import Operation

_RESERVED = (DEFAULT_NETWORK, USER_NETWORK, NO_NETWORK)
MAX_ACL_RULES = 1000
_LONGEST_PREFIX, _SHORTEST_PREFIX = 29, 8
_LONGEST_PREFIX_6, _SHORTEST_PREFIX_6 = 112, 48


class Networks:
    """Networks beside the built-in one, and access lists of all. Changes return an `Operation` that already runs."""

    def __init__(self, services: Services, operations: Operations) -> None:
        self._services = services
        self._operations = operations
        self._tasks: set[asyncio.Task[None]] = set()

    # -- looking

    def list(self) -> tuple[NetworkView, ...]:
        """All of them, sorted by name; the built-in one once it was needed."""
        return tuple(self._view(network) for network in self._services.networks.all())

    def get(self, name: str) -> NetworkView:
        return self._view(self._services.networks.get(name))

    def _view(self, network: Network) -> NetworkView:
        return NetworkView(
            **msgspec.structs.asdict(network),
            machines=self._machines_on(network.name),
            operation=self._operations.holder(f"network/{network.name}"),
        )

    def _machines_on(self, name: str) -> tuple[str, ...]:
        """Those that have a card on it, and those that are about to."""
        machines = self._services.claims.others("")
        return tuple(sorted({m.name for m in machines if any(card.network == name for card in cards_of(m))}))

    # -- changing

    async def create(self, request: CreateNetwork) -> Operation:
        """Record it and make it on the host. Raises what is wrong with it, `Exists`, `InUse`, `Exhausted`."""
        name = check_network_name(request.name)
        if name in _RESERVED:
            raise Invalid(f"the name '{name}' has a meaning of its own; choose another one", network=name)
        if self._services.networks.find(name) is not None:
            raise Exists(f"network '{name}' exists already", hint=f"triarch network info {name}", network=name)
        self._operations.check_free(f"network/{name}")
        if name in self._services.networks.reserved:
            raise Busy(f"network '{name}' is being made by somebody else", hint="triarch network list", network=name)
        network = self._planned(request)
        # Before anything waits: its index and ranges are nobody else's.
        self._services.networks.reserved[name] = network
        try:
            await asyncio.to_thread(self._services.network.check_parent, network, force=request.force)
            operation = self._operations.begin(
                CreateNetworkProcedure(self._services, NetworkArguments(network=network))
            )
        except BaseException:
            del self._services.networks.reserved[name]
            raise
        self._afterwards(operation.id, lambda: self._services.networks.reserved.pop(name, None))
        return operation

    def _afterwards(self, operation_id: str, act: Callable[[], object]) -> None:
        async def wait() -> None:
            await self._operations.wait(operation_id)
            act()

        task = asyncio.create_task(wait())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _planned(self, request: CreateNetwork) -> Network:
        """The record, with ranges chosen beside the host's own and those of other networks."""
        _check_kind(request)
        host, records = self._services.network, self._services.networks
        others = (*records.all(), *records.reserved.values())
        index = records.free_index()
        served = request.kind in (NetworkKind.NAT, NetworkKind.ISOLATED)
        ipv4, ipv6 = _subnet4(request.ipv4), None if request.ipv6 in (None, "none") else _subnet6(request.ipv6 or "")
        if served:
            host.probe()
            if ipv4 is None:
                ipv4 = host.choose_subnet(others, _bare(request, index))
            else:
                self._check_apart(ipv4, others)
            if ipv6 is None and request.ipv6 is None:
                ipv6 = host.choose_subnet6(index, others)
            elif ipv6 is not None:
                self._check_apart(ipv6, others)
        network = msgspec.structs.replace(
            _bare(request, index),
            ipv4=None if ipv4 is None else str(ipv4),
            ipv6=None if ipv6 is None else str(ipv6),
        )
        _check_acl(network)
        return network

    def _check_apart(self, subnet: IPv4Network | IPv6Network, others: tuple[Network, ...]) -> None:
        for other in others:
            for text in (other.ipv4, other.ipv6):
                if text is not None and other.served:
                    theirs = ip_network(text)
                    if theirs.version == subnet.version and theirs.overlaps(subnet):
                        raise InUse(
                            f"the range {subnet} overlaps {theirs} of network '{other.name}'",
                            hint=f"triarch network info {other.name}",
                        )
        self._services.network.check_free(subnet)

    async def edit(self, name: str, request: EditNetwork) -> Operation:
        """Change what may change; machines that run are held to it at once."""
        before = await self._known(name)
        self._operations.check_free(f"network/{name}")
        given = {key: getattr(request, key) for key in EditNetwork.__struct_fields__}
        after = msgspec.structs.replace(before, **{key: value for key, value in given.items() if value is not UNSET})
        if (request.gateway or request.nameserver) and before.served:
            raise Invalid(f"network '{name}' is of kind {before.kind.value}: the host is its gateway and name server")
        _check_acl(after)
        arguments = NetworkArguments(network=after, before=before)
        return self._operations.begin(EditNetworkProcedure(self._services, arguments))

    async def add_rule(self, name: str, request: AddAclRule) -> Operation:
        """At `position`, or at the end."""
        rules = (await self._known(name)).acl
        at = len(rules) if request.position is None else request.position - 1
        if at > len(rules):
            raise Invalid(f"network '{name}' has {len(rules)} rules: there is no position {request.position}")
        return await self.edit(name, EditNetwork(acl=(*rules[:at], request.rule, *rules[at:])))

    async def remove_rule(self, name: str, position: int) -> Operation:
        """`position` from 1."""
        rules = (await self._known(name)).acl
        if not 1 <= position <= len(rules):
            raise NotFound(
                f"network '{name}' has no rule {position}: it has {len(rules)}", hint=f"triarch network acl list {name}"
            )
        return await self.edit(name, EditNetwork(acl=(*rules[: position - 1], *rules[position:])))

    async def _known(self, name: str) -> Network:
        return await self._services.networks.need(name)

    async def delete(self, name: str) -> Operation:
        """Raises `InUse` that names machines on it."""
        network = self._services.networks.get(name)
        if name == DEFAULT_NETWORK:
            raise Invalid("network 'nat' is built in: it cannot be deleted", hint="triarch down")
        self._operations.check_free(f"network/{name}")
        users = self._machines_on(name)
        if users:
            raise InUse(
                f"network '{name}' is in use by {some_of(users)}", hint=f"triarch delete {users[0]}", network=name
            )
        operation = self._operations.begin(DeleteNetworkProcedure(self._services, NetworkArguments(network=network)))
        self._services.networks.leaving.add(name)
        self._afterwards(operation.id, lambda: self._services.networks.leaving.discard(name))
        return operation


def _bare(request: CreateNetwork, index: int) -> Network:
    served = request.kind in (NetworkKind.NAT, NetworkKind.ISOLATED)
    return Network(
        name=request.name,
        index=index,
        kind=request.kind,
        parent=request.parent,
        gateway=request.gateway,
        nameserver=request.nameserver,
        dhcp=request.dhcp and served,
        dns=request.dns and served,
        acl=request.acl,
        description=request.description,
        labels=request.labels,
        created_at=datetime.now(UTC),
    )


def _check_kind(request: CreateNetwork) -> None:
    """What does not go together."""
    kind, name = request.kind, request.name
    if kind in (NetworkKind.NAT, NetworkKind.ISOLATED):
        if request.parent is not None:
            raise Invalid(f"network '{name}' is of kind {kind.value}, which stands on no interface of the host")
        if request.gateway is not None or request.nameserver is not None:
            raise Invalid(f"network '{name}' is of kind {kind.value}: the host is its gateway and name server")
        return
    if request.parent is None:
        raise Invalid(
            f"network '{name}' is of kind {kind.value}, which needs an interface of the host",
            hint=f"triarch network create {name} --kind {kind.value} --parent eth1",
        )
    if (request.gateway is not None) and request.ipv4 is None:
        raise Invalid(
            f"network '{name}' has a gateway but no range: machines ask for both by DHCP, or --ipv4 says both"
        )


def _subnet4(text: str | None) -> IPv4Network | None:
    if text is None:
        return None
    try:
        subnet = IPv4Network(text)
    except ValueError as error:
        raise Invalid(f"illegal IPv4 range '{text}': {_reason(error)}", hint="such as 10.20.0.0/24") from error
    if not _SHORTEST_PREFIX <= subnet.prefixlen <= _LONGEST_PREFIX or not subnet.is_private:
        raise Invalid(
            f"illegal IPv4 range '{text}': it needs to be private (RFC 1918) and between /{_SHORTEST_PREFIX} "
            f"and /{_LONGEST_PREFIX}",
            hint="such as 10.20.0.0/24",
        )
    return subnet


def _subnet6(text: str) -> IPv6Network:
    try:
        subnet = IPv6Network(text)
    except ValueError as error:
        raise Invalid(f"illegal IPv6 range '{text}': {_reason(error)}", hint="such as fd00:1:2:3::/64") from error
    if not _SHORTEST_PREFIX_6 <= subnet.prefixlen <= _LONGEST_PREFIX_6 or subnet.is_link_local or subnet.is_multicast:
        raise Invalid(
            f"illegal IPv6 range '{text}': it needs to be between /{_SHORTEST_PREFIX_6} and /{_LONGEST_PREFIX_6}",
            hint="such as fd00:1:2:3::/64",
        )
    return subnet


def _reason(error: ValueError) -> str:
    text = str(error)
    return "it has host bits set" if "host bits" in text else text[:1].lower() + text[1:]


def _check_acl(network: Network) -> None:
    if network.acl and network.kind is NetworkKind.MACVLAN:
        raise Unsupported(
            f"network '{network.name}' cannot have an access list: a macvlan's traffic does not pass through this "
            "host's firewall; networks of kind nat, bridge and isolated have one"
        )
    if len(network.acl) > MAX_ACL_RULES:
        raise Invalid(f"network '{network.name}' would have {len(network.acl)} rules: it can have {MAX_ACL_RULES}")
    for number, rule in enumerate(network.acl, 1):
        _check_rule(f"rule {number} of network '{network.name}'", rule)


def _check_rule(what: str, rule: AclRule) -> None:
    if rule.ports and rule.protocol is Protocol.ICMP:
        raise Invalid(f"{what} has ports, which icmp has not")
    if rule.peer is None or rule.peer.startswith(("machine:", "label:")):
        return
    try:
        ip_network(rule.peer)
    except ValueError as error:
        raise Invalid(f"{what} has the illegal peer '{rule.peer}': {_reason(error)}") from error
