"""Profiles, from the client's side."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote

from triarch.model.operation import Operation
from triarch.model.settings import Profile, ProfileView, SetProfile

if TYPE_CHECKING:
    from triarch.client.api import Client


class Profiles:
    """`client.profiles`: raises what `Client` raises. An operation's result has a line for each machine it changed."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def list(self) -> tuple[ProfileView, ...]:
        """Sorted by name."""
        return self._client._get("/1/profiles", tuple[ProfileView, ...])

    def get(self, name: str) -> ProfileView:
        return self._client._get(_one(name), ProfileView)

    def create(self, profile: Profile) -> Operation:
        return self._client._change("POST", "/1/profiles", profile)

    def replace(self, profile: Profile, etag: str | None = None) -> Operation:
        """All of it anew. With an `etag`, raises `Stale` when it is not what was read."""
        return self._client._change("PUT", _one(profile.name), profile, etag)

    def set(self, name: str, request: SetProfile) -> Operation:
        return self._client._change("POST", f"{_one(name)}/set", request)

    def delete(self, name: str) -> Operation:
        """Raises `InUse`."""
        return self._client._change("DELETE", _one(name))


def _one(name: str) -> str:
    return f"/1/profiles/{quote(name, safe='')}"
