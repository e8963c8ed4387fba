"""What a VM uses."""

from __future__ import annotations

from triarch.drivers.qemu.cmdline import memory_bytes
from triarch.host.measure import measure
from triarch.host.pidfd import ProcessId
from triarch.host.traffic import traffic
from triarch.model.driver import MachineSpec, Usage
from triarch.model.network import BridgeLink, MacvlanLink


def usage_of(spec: MachineSpec, process: ProcessId) -> Usage:
    """Memory is what QEMU has for itself: guest memory that was touched, not the template that VMs share.

    The limit is what the guest may touch; QEMU's own needs come on top. Raises `Unavailable` when it has just ended.
    """
    used = measure(process)
    received = sent = None
    match spec.link:
        case BridgeLink() as link if (through := traffic(link.host_interface)) is not None:
            received, sent = through.sent_bytes, through.received_bytes
        case MacvlanLink() as link if (through := traffic(link.host_interface)) is not None:
            # The interface is the machine's own here, not the other end of it.
            received, sent = through.received_bytes, through.sent_bytes
    return Usage(
        cpu_seconds=used.cpu_seconds,
        memory_bytes=used.memory_bytes,
        memory_limit_bytes=memory_bytes(spec.machine.resources),
        swap_bytes=used.swap_bytes,
        disk_read_bytes=used.disk_read_bytes,
        disk_written_bytes=used.disk_written_bytes,
        network_received_bytes=received,
        network_sent_bytes=sent,
    )
