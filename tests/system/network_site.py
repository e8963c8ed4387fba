"""The host's networks with namespaces as machines, and what tests ask of them."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable
from ipaddress import IPv4Network

import msgspec
from network_rig import Namespace, network_of

from triarch.host.launcher.connect import connect
from triarch.host.launcher.protocol import Interface
from triarch.model.instance import Instance
from triarch.model.network import (
    BridgeLink,
    MacvlanLink,
    Network,
    NetworkKind,
    Nic,
)
from triarch.network.addresses import pick, pick6
from triarch.network.host import HostNetworks
from triarch.network.plan import Port

REFUSED_SECONDS = 1.0


class Site:
    """The host's networks, and the machines that a test plugged into them."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.host = HostNetworks(instance)
        self.networks: dict[str, Network] = {}
        self.ports: dict[str, Port] = {}

    def network(self, name: str = "nat", kind: NetworkKind = NetworkKind.NAT, **values: object) -> Network:
        index = len(self.networks)
        made = network_of(self.host.choose_subnet(self.networks.values(), _index(index)), name=name, index=index)
        subnet6 = self.host.choose_subnet6(index, self.networks.values())
        given = {"kind": kind, "ipv6": None if subnet6 is None else str(subnet6), **values}
        made = msgspec.structs.replace(made, **given)
        self.networks[name] = made
        return made

    async def plug(self, namespace: Namespace, machine: str, network: Network, index: int, **values: object) -> Nic:
        """As a start of a container does it."""
        nic = Nic(mac=self.host.mac(index), address="")
        if network.ipv4 is not None:
            segment = self.host._segment(network)
            assert segment.ipv4 is not None
            nic = msgspec.structs.replace(nic, address=pick(segment.ipv4, index, (), ()))
            if segment.ipv6 is not None:
                nic = msgspec.structs.replace(nic, address6=pick6(segment.ipv6, index, ()))
        interface = self.host.host_interface(index)
        port = Port(
            network=network.name, machine=machine, names=(machine,), host_interface=interface, nic=nic, **values
        )  # type: ignore[arg-type]
        self.ports[machine] = port
        await self.host.plug(network, port)
        link = self.host.link(network, nic, interface)
        connect((interface_of(link),), namespace.fd)
        return nic

    async def change(self, machine: str, **values: object) -> None:
        self.ports[machine] = msgspec.structs.replace(self.ports[machine], **values)
        await self.host.refresh([self.ports[machine]])


def _index(index: int) -> Network | None:
    return network_of(IPv4Network("10.0.0.0/18"), name="x", index=index) if index else None


def interface_of(link: BridgeLink | MacvlanLink) -> Interface:
    return Interface(
        host_name=link.host_interface,
        mac=link.nic.mac,
        bridge=link.bridge if isinstance(link, BridgeLink) else "",
        parent=link.parent if isinstance(link, MacvlanLink) else "",
        address=link.nic.address,
        address6=link.nic.address6,
        gateway=link.gateway,
        gateway6=link.gateway6,
    )


def reaches(namespace: Namespace, address: str, port: int) -> bool:
    """Whether a TCP connection opens."""

    def attempt() -> bool:
        try:
            socket.create_connection((address, port), REFUSED_SECONDS).close()
        except TimeoutError:
            return False
        return True

    return namespace.run(attempt)


class Echo:
    """Answers UDP inside a namespace, and says from whom it heard."""

    def __init__(self, namespace: Namespace, port: int) -> None:
        self.heard: list[tuple[str, bytes]] = []
        self._udp = namespace.run(lambda: self._bind(port))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @staticmethod
    def _bind(port: int) -> socket.socket:
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        udp.bind(("0.0.0.0", port))
        udp.settimeout(0.2)
        return udp

    def _serve(self) -> None:
        while self._udp.fileno() >= 0:
            try:
                data, sender = self._udp.recvfrom(2048)
                self.heard.append((sender[0], data))
                self._udp.sendto(data, sender)
            except TimeoutError:
                continue
            except OSError:
                return

    def close(self) -> None:
        self._udp.close()
        self._thread.join()


def asks(address: str, port: int, source_port: int = 0) -> bool:
    """Whether UDP is answered."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("0.0.0.0", source_port))
        udp.settimeout(REFUSED_SECONDS)
        udp.sendto(b"?", (address, port))
        try:
            return udp.recv(10) == b"?"
        except TimeoutError:
            return False


async def eventually(check: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not check():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.05)
    return True
