"""Holding a container's filesystems still: those on its loop devices, from outside and without its help."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from triarch.drivers.base import FREEZE_SECONDS
from triarch.errors import Failed, TimedOut, WrongState
from triarch.host.freeze import Freeze, loop_devices_of, thaw
from triarch.model.device import VolumeDevice
from triarch.model.driver import MachineSpec
from triarch.model.snapshot import Consistency


class Freezes:
    """The freezes of one driver object. One that the object's daemon leaves behind ends with that daemon."""

    def __init__(self) -> None:
        self._freezes: dict[str, Freeze] = {}

    async def freeze(self, spec: MachineSpec) -> Consistency:
        held = self._freezes.get(spec.uuid)
        if held is not None:
            await held.go_on()
            return Consistency.FROZEN
        devices = _devices(spec)
        if not devices:
            raise WrongState(f"cannot freeze machine '{spec.machine.name}': it does not run", machine=spec.machine.name)
        try:
            self._freezes[spec.uuid] = await Freeze.begin(devices, FREEZE_SECONDS)
        except Failed:
            # Whoever froze it was killed before it could thaw.
            await thaw(devices)
            self._freezes[spec.uuid] = await Freeze.begin(devices, FREEZE_SECONDS)
        return Consistency.FROZEN

    async def thaw(self, spec: MachineSpec) -> float | None:
        held = self._freezes.pop(spec.uuid, None)
        if held is not None:
            return await held.end()
        devices = _devices(spec)
        if devices:
            await thaw(devices)
        return None

    async def close(self) -> None:
        """Nothing stays frozen."""
        while self._freezes:
            _, held = self._freezes.popitem()
            with suppress(TimedOut):
                await held.end()


def _devices(spec: MachineSpec) -> tuple[str, ...]:
    volumes = (Path(each.path) for each in spec.devices if isinstance(each.device, VolumeDevice))
    return loop_devices_of((Path(spec.delta_path), *volumes))
