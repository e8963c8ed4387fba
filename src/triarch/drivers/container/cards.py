"""A container's network cards, as the launcher makes them."""

from __future__ import annotations

from triarch.host.launcher.protocol import Interface
from triarch.model.device import NicDevice
from triarch.model.driver import MachineSpec
from triarch.model.network import BridgeLink, Link, MacvlanLink

FIRST_CARD = "eth0"


def interface_of_link(name: str, link: Link) -> Interface | None:
    """The card `name` (in the machine) for a link; None for a link that needs none. Only the first is a way out."""
    if not isinstance(link, BridgeLink | MacvlanLink):
        return None
    return Interface(
        host_name=link.host_interface,
        mac=link.nic.mac,
        name=name,
        bridge=link.bridge if isinstance(link, BridgeLink) else "",
        parent=link.parent if isinstance(link, MacvlanLink) else "",
        address=link.nic.address,
        address6=link.nic.address6,
        gateway=link.gateway if name == FIRST_CARD else "",
        gateway6=link.gateway6 if name == FIRST_CARD else "",
    )


def interfaces_of(spec: MachineSpec) -> tuple[Interface, ...]:
    """All cards of a machine, the first one first."""
    links = [(FIRST_CARD, spec.link)]
    links += [(found.name, found.link) for found in spec.devices if isinstance(found.device, NicDevice)]
    made = [interface for name, link in links if (interface := interface_of_link(name, link)) is not None]
    return tuple(made)
