"""The architectures, by the name that people type. Values are `module:Class`, imported only when asked for."""

from __future__ import annotations

from importlib import import_module
from typing import cast

from triarch.drivers.base import DriverFactory
from triarch.errors import Invalid

DRIVERS: dict[str, str] = {
    "container": "triarch.drivers.container.driver:ContainerDriver",
    "hosted": "triarch.drivers.qemu.driver:HostedDriver",
    "kvm": "triarch.drivers.qemu.driver:KvmDriver",
    "fake": "triarch.drivers.fake:FakeDriver",
}

# Not offered to people: `fake` runs nothing.
HIDDEN = frozenset({"fake"})


def driver_factory(name: str) -> DriverFactory:
    """The class of architecture `name`. Raises `Invalid` that lists the architectures there are."""
    if name not in DRIVERS:
        known = ", ".join(n for n in DRIVERS if n not in HIDDEN)
        raise Invalid(f"unknown architecture {name!r}: there are {known}", hint="triarch doctor")
    module, _, attribute = DRIVERS[name].partition(":")
    return cast(DriverFactory, getattr(import_module(module), attribute))
