"""Networks, from the client's side."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote

from triarch.model.network import AddAclRule, CreateNetwork, EditNetwork, NetworkView
from triarch.model.operation import Operation

if TYPE_CHECKING:
    from triarch.client.api import Client


class Networks:
    """`client.networks`: raises what `Client` raises."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def list(self) -> tuple[NetworkView, ...]:
        return self._client._get("/1/networks", tuple[NetworkView, ...])

    def get(self, name: str) -> NetworkView:
        return self._client._get(_one(name), NetworkView)

    def create(self, request: CreateNetwork) -> Operation:
        return self._client._change("POST", "/1/networks", request)

    def edit(self, name: str, request: EditNetwork) -> Operation:
        """Change what `request` says; machines that run are held to it at once."""
        return self._client._change("POST", f"{_one(name)}/edit", request)

    def delete(self, name: str) -> Operation:
        return self._client._change("DELETE", _one(name))

    def add_rule(self, name: str, request: AddAclRule) -> Operation:
        return self._client._change("POST", f"{_one(name)}/acl", request)

    def remove_rule(self, name: str, position: int) -> Operation:
        """`position` from 1."""
        return self._client._change("DELETE", f"{_one(name)}/acl/{position}")


def _one(name: str) -> str:
    return f"/1/networks/{quote(name, safe='')}"
