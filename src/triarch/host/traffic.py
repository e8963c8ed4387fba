"""Bytes through a network interface, as the kernel counts them (sysfs-class-net-statistics)."""

from __future__ import annotations

import msgspec


class Traffic(msgspec.Struct, frozen=True, kw_only=True):
    """Since the interface exists, as the host sees it: what it received is what a machine behind it sent."""

    received_bytes: int
    sent_bytes: int


def traffic(interface: str) -> Traffic | None:
    """None when there is no such interface."""
    base = f"/sys/class/net/{interface}/statistics"
    try:
        with open(f"{base}/rx_bytes") as received, open(f"{base}/tx_bytes") as sent:  # noqa: PTH123
            return Traffic(received_bytes=int(received.read()), sent_bytes=int(sent.read()))
    except (OSError, ValueError):
        return None
