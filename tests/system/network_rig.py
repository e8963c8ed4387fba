"""Network namespaces that a test makes, plugged into an instance's bridge as a container would be."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from ipaddress import IPv4Address, IPv4Interface, IPv4Network
from pathlib import Path
from typing import TypeVar

import pytest

from triarch.errors import Error
from triarch.host.netlink import Netlink, enter_network_namespace
from triarch.model.instance import Instance, instance_at
from triarch.model.network import Network, NetworkKind, Nic
from triarch.network.addresses import mac
from triarch.network.host import HostNetworks
from triarch.network.plan import Port

LOOPBACK = 1
TIMEOUT_SECONDS = 5.0
T = TypeVar("T")


def instance_with_networks(root: Path) -> Instance:
    """The instance in `root`, on a host where it can have a NAT network; elsewhere the test is skipped."""
    found = instance_at(root)
    if not found.of_root:
        pytest.skip("needs root: bridges and network namespaces")
    try:
        HostNetworks(found).probe()
    except Error as error:
        pytest.skip(f"no NAT network here: {error}")
    return found


def network_of(subnet: IPv4Network, **values: object) -> Network:
    """The record of a NAT network on `subnet`: the built-in one unless `values` say otherwise."""
    given: dict[str, object] = {"name": "nat", "index": 0, "kind": NetworkKind.NAT, "ipv4": str(subnet)}
    return Network(**{**given, "created_at": datetime.now(UTC), **values})  # type: ignore[arg-type]


class NatNetwork:
    """The built-in network as the engine works with it: cards on the first addresses of one subnet."""

    def __init__(self, instance: Instance) -> None:
        self.host = HostNetworks(instance)
        self._instance = instance

    def choose_subnet(self) -> IPv4Network:
        return self.host.choose_subnet()

    async def ensure(self, subnet: IPv4Network) -> None:
        await self.host.ensure(network_of(subnet))

    def nic(self, subnet: IPv4Network, index: int) -> Nic:
        address = subnet.network_address + 1 + index
        return Nic(mac=mac(self._instance.tag, index), address=f"{address}/{subnet.prefixlen}")

    async def publish(self, name: str, ip: str, index: int = 1) -> None:
        """Plug in machine `index`: known by its name, and let through with its own address."""
        nic = Nic(mac=mac(self._instance.tag, index), address=f"{ip}/18")
        interface = self._instance.host_interface(index)
        port = Port(network="nat", machine=name, names=(name,), host_interface=interface, nic=nic)
        await self.host.plug(network_of(self.choose_subnet()), port)

    async def withdraw(self, index: int) -> None:
        await self.host.unplug(self._instance.host_interface(index))

    async def teardown(self) -> None:
        await self.host.teardown()


class Namespace:
    """An empty network namespace, for as long as its holder process lives."""

    def __init__(self) -> None:
        self._holder = subprocess.Popen(
            ["unshare", "--net", "sh", "-c", "echo; exec sleep 600"], stdout=subprocess.PIPE
        )
        assert self._holder.stdout is not None
        self._holder.stdout.readline()
        self.fd = os.open(f"/proc/{self._holder.pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        os.close(self.fd)
        self._holder.kill()
        self._holder.communicate()

    def run(self, function: Callable[[], T]) -> T:
        """Call `function` in a thread that is inside; sockets that it makes stay inside."""
        results: list[T] = []
        errors: list[BaseException] = []

        def body() -> None:
            try:
                enter_network_namespace(self.fd)
                results.append(function())
            except BaseException as error:  # noqa: BLE001 - handed to the caller's thread
                errors.append(error)

        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    def attach(self, host_interface: str, bridge: str, mac: str, address: str, gateway: str | None) -> None:
        """As a container start does it: veth, loopback, address, default route."""
        with Netlink() as outside:
            bridge_index = outside.index_of(bridge)
            assert bridge_index is not None
            outside.add_veth(host_interface, bridge_index, "eth0", self.fd, mac)
        with Netlink(self.fd) as inside:
            index = inside.index_of("eth0")
            assert index is not None
            inside.set_up(LOOPBACK)
            inside.set_up(index)
            inside.add_address(index, IPv4Interface(address))
            if gateway is not None:
                inside.add_default_route(IPv4Address(gateway))


@contextmanager
def namespaces(count: int) -> Iterator[list[Namespace]]:
    made: list[Namespace] = []
    try:
        for _ in range(count):
            made.append(Namespace())
        yield made
    finally:
        for namespace in made:
            namespace.close()


def ping(address: str) -> bool:
    """One ICMP echo from where the calling thread is."""
    body = struct.pack(">BBHHH", 8, 0, 0, 4242, 1) + b"triarch!"
    total = sum(struct.unpack(f">{len(body) // 2}H", body))
    total = (total >> 16) + (total & 0xFFFF)
    packet = body[:2] + struct.pack(">H", ~(total + (total >> 16)) & 0xFFFF) + body[4:]
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
        raw.settimeout(TIMEOUT_SECONDS)
        raw.sendto(packet, (address, 0))
        try:
            while True:
                reply, (sender, _) = raw.recvfrom(2048)
                if sender == address and reply[20] == 0:
                    return True
        except TimeoutError:
            return False


class Answer:
    """What a name server said: its code and the addresses."""

    def __init__(self, reply: bytes) -> None:
        self.code = reply[3] & 15
        count = struct.unpack_from(">H", reply, 6)[0]
        # Each record of an A answer: name pointer, type, class, TTL, length, four bytes.
        self.addresses = [str(IPv4Address(reply[-4:]))] if count == 1 and reply[-6:-4] == b"\0\4" else []
        self.count = count


def query(server: str, name: str, kind: int = 1, timeout_seconds: float = TIMEOUT_SECONDS) -> Answer:
    """One DNS question over UDP (kind 1 is A, 28 AAAA)."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    question = struct.pack(">6H", 77, 0x100, 1, 0, 0, 0) + labels + b"\0" + struct.pack(">HH", kind, 1)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.settimeout(timeout_seconds)
        udp.sendto(question, (server, 53))
        return Answer(udp.recv(4096))


@contextmanager
def listener(namespace: Namespace) -> Iterator[tuple[socket.socket, int]]:
    """A TCP socket that listens inside, and its port."""

    def listen() -> socket.socket:
        made = socket.create_server(("0.0.0.0", 0))
        made.settimeout(TIMEOUT_SECONDS)
        return made

    with namespace.run(listen) as server:
        yield server, server.getsockname()[1]
