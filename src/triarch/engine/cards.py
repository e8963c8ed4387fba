"""Which networks a machine is on, with which addresses, names and ports: chosen beside those of all other machines."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import msgspec
from msgspec import UNSET

from triarch.engine.network_records import Card, cards_of
from triarch.engine.services import Services
from triarch.errors import Exhausted, InUse, Invalid, MissingProgram, NotFound, Unavailable, Unsupported, WrongState
from triarch.host.ports import port_error
from triarch.model.device import NicDevice
from triarch.model.machine import Machine
from triarch.model.names import check_machine_name
from triarch.model.network import NO_NETWORK, USER_NETWORK, Forward, Network, NetworkKind, Nic, Protocol
from triarch.model.settings import Settings
from triarch.model.state import State
from triarch.network.addresses import (
    MAX_CARDS,
    card_number,
    check_static,
    check_static6,
    gateway6,
    pick,
    pick6,
)
from triarch.network.plan import ANY_ADDRESS, Port

# Settings that say something of networks and hold at once on a running machine.
LIVE_FIELDS = frozenset({"aliases", "forwards"})


async def need_networks(services: Services, machine_network: str, settings: Settings) -> None:
    """The networks that these settings name are there. Raises `NotFound`."""
    devices = {} if settings.devices is UNSET else settings.devices
    named = [device.network for device in devices.values() if isinstance(device, NicDevice)]
    for name in (machine_network, *named):
        if name not in (USER_NETWORK, NO_NETWORK):
            await services.networks.need(name)


def placed(services: Services, machine: Machine, settings: Settings, before: Machine | None = None) -> Machine:
    """`machine` (whose fields follow from `settings` by now) with its cards, which stay what they were in `before`.

    Nothing waits here: what it chose is free until something else runs. Raises `Invalid` for an address that it cannot
    have, `InUse` for one, a name or a port that another machine has, `Exhausted`.
    """
    address = settings.address if settings.address is not UNSET else None
    address6 = settings.address6 if settings.address6 is not UNSET else None
    known = {card.device: card for card in cards_of(before)} if before is not None else {}
    nic: Nic | None = None
    if machine.network == USER_NETWORK:
        nic = known[""].nic if "" in known and known[""].network == USER_NETWORK else _user_nic()
    elif machine.network != NO_NETWORK:
        wanted = _Wanted(machine, services.networks.get(machine.network), "", 0, address, address6)
        nic = _card(services, wanted, known.get(""), ())
    if (address is not None or address6 is not None) and machine.network in (USER_NETWORK, NO_NETWORK):
        raise Invalid(
            f"machine '{machine.name}' cannot have an address of its own: it is on network '{machine.network}'"
        )
    machine = msgspec.structs.replace(machine, nic=nic, nics={})
    machine = msgspec.structs.replace(machine, nics=_further(services, machine, known))
    check_aliases(services, machine)
    _check_rates(services, machine)
    _check_forwards(services, machine, before)
    return machine


class _Wanted(msgspec.Struct, frozen=True):
    machine: Machine
    network: Network
    device: str
    number: int
    address: str | None
    address6: str | None

    @property
    def who(self) -> str:
        return f"machine '{self.machine.name}'" + (f" (card '{self.device}')" if self.device else "")


def _user_nic() -> Nic:
    octets = (0x52, 0x54, 0, *secrets.token_bytes(3))
    return Nic(mac=":".join(f"{octet:02x}" for octet in octets), address="10.0.2.15/24")


def _further(services: Services, machine: Machine, known: dict[str, Card]) -> dict[str, Nic]:
    """The cards of its devices; each keeps its number, and so its MAC, for as long as it is there."""
    devices = {name: device for name, device in sorted(machine.devices.items()) if isinstance(device, NicDevice)}
    if len(devices) >= MAX_CARDS:
        raise Exhausted(
            f"machine '{machine.name}' asks for {len(devices)} more network cards: it can have {MAX_CARDS - 1}"
        )
    numbers = {name: card_number(known[name].nic.mac) for name in devices if name in known}
    free = (number for number in range(1, MAX_CARDS) if number not in numbers.values())
    made: dict[str, Nic] = {}
    for name, device in devices.items():
        if device.network in (USER_NETWORK, NO_NETWORK):
            raise Invalid(f"card '{name}' of machine '{machine.name}' needs a network, not '{device.network}'")
        network = services.networks.get(device.network)
        number = numbers[name] if name in numbers else next(free)
        wanted = _Wanted(machine, network, name, number, device.address, device.address6)
        own = list(cards_of(msgspec.structs.replace(machine, nics=made)))
        made[name] = _card(services, wanted, known.get(name), own)
    return made


def _card(services: Services, wanted: _Wanted, former: Card | None, own: Iterable[Card]) -> Nic:
    network, index = wanted.network, wanted.machine.index
    cards = [card for other in services.claims.others(wanted.machine.uuid) for card in cards_of(other)]
    taken = [card for card in (*cards, *own) if card.network == network.name]
    same = former.nic if former is not None and former.network == network.name else None
    return Nic(
        mac=same.mac if same is not None else services.network.mac(index, wanted.number),
        address=_address(wanted, same, taken),
        address6=_address6(wanted, same, taken),
    )


def _address(wanted: _Wanted, same: Nic | None, cards: list[Card]) -> str:
    """In CIDR form; empty on a network whose addresses are none of ours."""
    network = wanted.network
    taken = {IPv4Address(card.nic.ip): card.machine for card in cards if card.nic.address}
    if network.ipv4 is None:
        if wanted.address is not None:
            raise Invalid(
                f"address {wanted.address} of {wanted.who} cannot be given: network '{network.name}' has no IPv4 range",
                hint=f"triarch network info {network.name}",
            )
        return ""
    subnet = IPv4Network(network.ipv4)
    reserved = {IPv4Address(text) for text in (network.gateway, network.nameserver) if text is not None}
    if wanted.address is not None:
        address = check_static(subnet, wanted.address, wanted.who)
        if address in reserved:
            raise Invalid(f"address {address} of {wanted.who} is the gateway's or the name server's")
        _check_untaken(address, taken.get(address), wanted)
        return f"{address}/{subnet.prefixlen}"
    if same is not None and same.address:
        former = IPv4Address(same.ip)
        if former in subnet and former not in taken and former not in reserved:
            return f"{former}/{subnet.prefixlen}"
    return pick(subnet, wanted.machine.index, taken, reserved)


def _address6(wanted: _Wanted, same: Nic | None, cards: list[Card]) -> str:
    network = wanted.network
    taken = {IPv6Address(card.nic.ip6): card.machine for card in cards if card.nic.address6}
    if network.ipv6 is None:
        if wanted.address6 is not None:
            raise Invalid(
                f"address {wanted.address6} of {wanted.who} cannot be given: "
                f"network '{network.name}' has no IPv6 range",
                hint=f"triarch network info {network.name}",
            )
        return ""
    subnet = IPv6Network(network.ipv6)
    if wanted.address6 is not None:
        address = check_static6(subnet, wanted.address6, wanted.who)
        _check_untaken(address, taken.get(address), wanted)
        return f"{address}/{subnet.prefixlen}"
    if same is not None and same.address6:
        former = IPv6Address(same.ip6)
        if former in subnet and former not in taken and former != gateway6(subnet).ip:
            return f"{former}/{subnet.prefixlen}"
    return pick6(subnet, wanted.machine.index, taken)


def _check_untaken(address: IPv4Address | IPv6Address, owner: str | None, wanted: _Wanted) -> None:
    if owner is not None:
        raise InUse(
            f"address {address} of {wanted.who} is already taken by machine '{owner}'",
            hint=f"triarch info {owner}",
            machine=owner,
        )


def check_aliases(services: Services, machine: Machine) -> None:
    """The machine's name and aliases are no other's. Raises `Invalid`, `InUse`."""
    for alias in machine.aliases:
        check_machine_name(alias)
        if alias == machine.name or machine.aliases.count(alias) > 1:
            raise Invalid(f"alias '{alias}' of machine '{machine.name}' is there twice")
    for other in services.claims.others(machine.uuid):
        for name in machine.aliases:
            if name == other.name or name in other.aliases:
                raise InUse(
                    f"alias '{name}' of machine '{machine.name}' is already taken by machine '{other.name}'",
                    hint=f"triarch info {other.name}",
                )
        if machine.name in other.aliases:
            raise InUse(f"the name '{machine.name}' is an alias of machine '{other.name}'")


def _check_rates(services: Services, machine: Machine) -> None:
    resources = machine.resources
    rates = (resources.network_receive_bytes_per_second, resources.network_send_bytes_per_second)
    limited = [machine.network] if any(rate is not None for rate in rates) else []
    for device in machine.devices.values():
        if isinstance(device, NicDevice) and (device.receive_bytes_per_second or device.send_bytes_per_second):
            limited.append(device.network)
    for name in limited:
        network = services.networks.find(name)
        if network is None or network.kind is NetworkKind.MACVLAN:
            raise Unsupported(
                f"machine '{machine.name}' cannot have a network rate: network '{name}' has no port on this host "
                "where one could be set; networks of kind nat, bridge and isolated have"
            )


def _check_forwards(services: Services, machine: Machine, before: Machine | None) -> None:
    """Raises `InUse` that says who has the port: another machine, or a program of the host."""
    if not machine.forwards:
        return
    network = services.networks.find(machine.network)
    if machine.network != USER_NETWORK and (network is None or network.kind is NetworkKind.MACVLAN):
        raise Unsupported(
            f"machine '{machine.name}' asks for port forwards: network '{machine.network}' has none, "
            "networks of kind nat, bridge and isolated and network 'user' have"
        )
    if machine.nic is None or not machine.nic.address:
        raise Unsupported(
            f"machine '{machine.name}' asks for port forwards, but nobody knows its address on network "
            f"'{machine.network}'",
            hint=f"triarch network info {machine.network}",
        )
    for number, forward in enumerate(machine.forwards):
        if forward.protocol is Protocol.ICMP:
            raise Invalid(f"machine '{machine.name}' asks for a port of icmp, which has none")
        if any(clash(forward, other) for other in machine.forwards[:number]):
            raise Invalid(f"machine '{machine.name}' asks for port {_shown(forward)} twice")
        for other in services.claims.others(machine.uuid):
            if any(clash(forward, theirs) for theirs in other.forwards):
                raise InUse(
                    f"port {_shown(forward)} of the host leads to machine '{other.name}' already",
                    hint=f"triarch info {other.name}",
                    machine=other.name,
                )
        if before is None or forward not in before.forwards:
            check_host_port(machine.name, forward)


def clash(one: Forward, other: Forward) -> bool:
    """Whether both would have the same port of the host."""
    if (one.host_port, one.protocol) != (other.host_port, other.protocol):
        return False
    return one.host_address == other.host_address or ANY_ADDRESS in (one.host_address, other.host_address)


def check_host_port(name: str, forward: Forward) -> None:
    """Raise `InUse` where a program of the host listens there, `Invalid` for an address that the host has not."""
    reason = port_error(forward.host_address, forward.host_port, forward.protocol.value)
    if reason is None:
        return
    port = _shown(forward)
    if reason == "in use":
        raise InUse(
            f"port {port} of the host, which machine '{name}' asks for, is taken by a program of the host",
            hint=f"ss -lpn sport = :{forward.host_port}",
        )
    raise Invalid(f"port {port} of the host cannot be had for machine '{name}': {reason}")


def _shown(forward: Forward) -> str:
    return f"{forward.host_address}:{forward.host_port}/{forward.protocol.value}"


def check_network(services: Services, machine: Machine) -> None:
    """Raise `Unsupported` where this host cannot have what the machine's networks need, `MissingProgram`."""
    for card in cards_of(machine):
        if card.network == USER_NETWORK:
            continue
        try:
            services.network.probe()
        except MissingProgram:
            raise
        except Unavailable as error:
            # Asking again would not help: it is not absent for now, this host does not allow it.
            raise Unsupported(
                f"machine '{machine.name}' cannot have network '{card.network}': {error.message}", hint=error.hint
            ) from error


async def rewired(
    services: Services, before: Machine, after: Machine, settings: Settings, unplugs: str = ""
) -> Machine:
    """`after` with the cards that its settings say, where it may have them: the network parts of a `set`.

    Settings that name no network leave it where it is. Raises `WrongState` for what a running machine cannot follow,
    and what `placed` raises. The caller claims the result (`services.claims`) until it is recorded.
    """
    after = msgspec.structs.replace(after, network=settings.network or before.network)
    await need_networks(services, after.network, settings)
    after = placed(services, after, settings, before)
    moved = (before.network, before.nic) != (after.network, after.nic)
    if moved and before.state in (State.RUNNING, State.PAUSED):
        what = f"to network '{after.network}'" if before.network != after.network else "to another address"
        raise WrongState(
            f"cannot move machine '{before.name}' {what}: it is {before.state.value}; that needs stopped",
            hint=f"triarch stop {before.name}",
            machine=before.name,
        )
    _check_cards_stay(before, after, unplugs)
    check_network(services, after)
    return after


def _check_cards_stay(before: Machine, after: Machine, unplugs: str) -> None:
    """A run goes on with the cards that it has, so no other machine may get their addresses meanwhile."""
    if before.state not in (State.RUNNING, State.PAUSED):
        return
    cards = set(cards_of(after))
    for card in cards_of(before):
        if card.device not in ("", unplugs) and card not in cards:
            raise WrongState(
                f"cannot take card '{card.device}' from machine '{before.name}' or change it: "
                f"it is {before.state.value}; that needs stopped",
                hint=f"triarch stop {before.name}",
                machine=before.name,
            )


# -- as the host sees them


def ports_of(services: Services, machine: Machine) -> tuple[Port, ...]:
    """The machine's cards as they are plugged into the host's networks, the first one first."""
    ports: list[Port] = []
    for card in cards_of(machine):
        if services.networks.find(card.network) is not None:
            first_there = all(port.network != card.network for port in ports)
            ports.append(_port(services, machine, card, named=first_there))
    return tuple(ports)


def port_of(services: Services, machine: Machine, device: str) -> Port:
    """That of the card `device`. Raises `NotFound`."""
    for port in ports_of(services, machine):
        if any(card.device == device and card.nic.mac == port.nic.mac for card in cards_of(machine)):
            return port
    raise NotFound(f"machine '{machine.name}' has no card '{device}'")


def _port(services: Services, machine: Machine, card: Card, *, named: bool) -> Port:
    device, resources = machine.devices.get(card.device), machine.resources
    receive, send = resources.network_receive_bytes_per_second, resources.network_send_bytes_per_second
    if isinstance(device, NicDevice):
        receive, send = device.receive_bytes_per_second, device.send_bytes_per_second
    return Port(
        network=card.network,
        machine=machine.name,
        host_interface=services.network.host_interface(machine.index, card_number(card.nic.mac)),
        nic=card.nic,
        names=(machine.name, *machine.aliases) if named else (),
        labels=machine.labels,
        forwards=() if card.device else machine.forwards,
        receive_bytes_per_second=receive,
        send_bytes_per_second=send,
    )
