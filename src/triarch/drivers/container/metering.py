"""What a container uses."""

from __future__ import annotations

from triarch.host.cgroup_usage import usage
from triarch.host.traffic import traffic
from triarch.model.driver import MachineSpec, Usage
from triarch.model.network import BridgeLink


def usage_of(spec: MachineSpec) -> Usage:
    """From its control groups and the host's end of its first card. Raises `Unavailable` when it has just ended."""
    used = usage(spec.cgroup)
    through = traffic(spec.link.host_interface) if isinstance(spec.link, BridgeLink) else None
    return Usage(
        cpu_seconds=used.cpu_seconds,
        memory_bytes=used.memory_bytes,
        memory_limit_bytes=used.memory_limit_bytes,
        swap_bytes=used.swap_bytes,
        processes=used.processes,
        disk_read_bytes=used.disk_read_bytes,
        disk_written_bytes=used.disk_written_bytes,
        network_received_bytes=None if through is None else through.sent_bytes,
        network_sent_bytes=None if through is None else through.received_bytes,
    )
