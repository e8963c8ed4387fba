"""The drivers of this instance: made when first needed, probed once, listened to while they own machines."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping

from triarch.drivers import DRIVERS, HIDDEN, driver_factory
from triarch.drivers.base import Driver, DriverFactory, capabilities_of
from triarch.errors import DriverUnavailable, Error, Unsupported
from triarch.model.driver import Architecture, DriverInfo, Observation
from triarch.model.instance import Instance

log = logging.getLogger(__name__)

PREFERENCE = ("container", "kvm", "hosted")
RELISTEN_SECONDS = 1.0

Listener = Callable[[str, Observation], None]


class Architectures:
    """Drivers by architecture name."""

    def __init__(
        self, instance: Instance, listener: Listener, factories: Mapping[str, DriverFactory] | None = None
    ) -> None:
        """`factories` replaces the table of `triarch.drivers` (tests). `listener` hears every observation."""
        self._instance = instance
        self._listener = listener
        self._factories = factories
        self._drivers: dict[str, Driver] = {}
        self._probes: dict[str, Architecture] = {}
        self._listening: dict[str, asyncio.Task[None]] = {}

    def names(self, *, hidden: bool = False) -> tuple[str, ...]:
        if self._factories is not None:
            return tuple(self._factories)
        return tuple(name for name in DRIVERS if hidden or name not in HIDDEN)

    def driver(self, name: str) -> Driver:
        """Raises `Invalid` for an unknown architecture."""
        if name not in self._drivers:
            factory = (self._factories or {}).get(name) or driver_factory(name)
            self._drivers[name] = factory(self._instance)
        return self._drivers[name]

    def lacks(self, architecture: str, capability: str) -> Unsupported:
        """The refusal for what this architecture cannot do, naming those that can."""
        having = self.having(capability)
        return Unsupported(
            f"architecture '{architecture}' has no {capability}"
            + (f"; it is there under {', '.join(having)}" if having else "")
        )

    def having(self, capability: str) -> tuple[str, ...]:
        """The architectures that can do it, of those that were asked for by now."""
        return tuple(name for name, driver in self._drivers.items() if capability in capabilities_of(driver))

    def made(self) -> Mapping[str, Driver]:
        return dict(self._drivers)

    # -- probing

    async def probe(self, name: str, *, refresh: bool = False) -> Architecture:
        """What the driver's probe said, remembered until `refresh`. Never raises for what the host lacks."""
        if refresh or name not in self._probes:
            driver = self.driver(name)
            try:
                self._probes[name] = _available(await driver.probe())
            except Error as error:
                self._probes[name] = Architecture(
                    name=name, kind=driver.kind, available=False, reason=error.message, hint=error.hint
                )
        return self._probes[name]

    async def probe_all(self, *, refresh: bool = False) -> tuple[Architecture, ...]:
        return tuple(await asyncio.gather(*(self.probe(name, refresh=refresh) for name in self.names())))

    async def need(self, name: str) -> Driver:
        """The driver, if machines can run under it here. Raises `DriverUnavailable` with the probe's reason."""
        found = await self.probe(name)
        if not found.available:
            # What was missing may have been installed since: a refusal is never served from memory.
            found = await self.probe(name, refresh=True)
        if not found.available:
            raise DriverUnavailable(
                f"architecture '{name}' cannot run here: {found.reason}", hint=found.hint or "triarch doctor"
            )
        return self.driver(name)

    async def default(self) -> str:
        """The first architecture of the preference that runs here. Raises `DriverUnavailable`."""
        preference = PREFERENCE if self._factories is None else tuple(self._factories)
        reasons = []
        for name in preference:
            found = await self.probe(name)
            if found.available:
                return name
            reasons.append(f"{name}: {found.reason}")
        raise DriverUnavailable(f"no architecture can run here ({'; '.join(reasons)})", hint="triarch doctor")

    # -- listening

    def listen(self, name: str) -> None:
        """Hear the driver's events from now on; the driver first tells what it owns already."""
        if name not in self._listening:
            self._listening[name] = asyncio.create_task(self._listen(name), name=f"events-{name}")

    async def _listen(self, name: str) -> None:
        while True:
            try:
                async for observation in self.driver(name).events():
                    self._listener(name, observation)
            except Exception:
                # The stream starts with everything that the driver owns, so nothing is lost by beginning again.
                log.exception("the event stream of driver %s broke; listening again", name)
            await asyncio.sleep(RELISTEN_SECONDS)

    async def close(self) -> None:
        """Stop listening and let go of every driver. Machines keep running."""
        for task in self._listening.values():
            task.cancel()
        await asyncio.gather(*self._listening.values(), return_exceptions=True)
        self._listening.clear()
        for driver in self._drivers.values():
            await driver.close()
        self._drivers.clear()


def _available(info: DriverInfo) -> Architecture:
    return Architecture(
        name=info.name, kind=info.kind, available=True, version=info.version, capabilities=info.capabilities
    )
