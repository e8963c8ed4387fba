"""Devices, from the client's side."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote

from triarch.model.device import AddDevice, DeviceView, HardwareInfo
from triarch.model.operation import Operation

if TYPE_CHECKING:
    from triarch.client.api import Client


class Devices:
    """`client.devices`: raises what `Client` raises."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def list(self, name: str) -> tuple[DeviceView, ...]:
        return self._client._get(_all(name), tuple[DeviceView, ...])

    def add(self, name: str, request: AddDevice) -> Operation:
        return self._client._change("POST", _all(name), request)

    def remove(self, name: str, device: str, *, purge: bool = False) -> Operation:
        return self._client._change("DELETE", f"{_all(name)}/{quote(device, safe='')}?purge={str(purge).lower()}")

    def hardware(self, name: str) -> HardwareInfo:
        """Which virtual hardware a running machine sees. Raises `WrongState` when it does not run."""
        return self._client._get(f"/1/machines/{quote(name, safe='')}/hardware", HardwareInfo)


def _all(name: str) -> str:
    return f"/1/machines/{quote(name, safe='')}/devices"
