"""Snapshots, from the client's side."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote

from triarch.model.difference import Difference
from triarch.model.operation import Operation
from triarch.model.snapshot import CreateSnapshot, RenameSnapshot, RestoreSnapshot, Snapshot

if TYPE_CHECKING:
    from triarch.client.api import Client


class Snapshots:
    """`client.snapshots`: raises what `Client` raises."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def list(self, name: str) -> tuple[Snapshot, ...]:
        """Those of a machine, oldest first."""
        return self._client._get(_all(name), tuple[Snapshot, ...])

    def get(self, name: str, snapshot: str) -> Snapshot:
        return self._client._get(_one(name, snapshot), Snapshot)

    def create(self, name: str, request: CreateSnapshot | None = None) -> Operation:
        """The operation's result is the snapshot's name."""
        return self._client._change("POST", _all(name), request or CreateSnapshot())

    def delete(self, name: str, snapshot: str) -> Operation:
        return self._client._change("DELETE", _one(name, snapshot))

    def rename(self, name: str, snapshot: str, new_name: str) -> Operation:
        return self._client._change("POST", f"{_one(name, snapshot)}/rename", RenameSnapshot(name=new_name))

    def restore(self, name: str, request: RestoreSnapshot) -> Operation | None:
        """None when the request only checks, and the restore would be possible."""
        body = self._client._send("POST", f"/1/machines/{quote(name, safe='')}/restore", request)
        return self._client._decode(body, Operation) if body else None

    def diff(self, name: str, snapshot: str, other: str | None = None) -> Difference:
        """What changed from a snapshot to another one, or to what the machine is now."""
        query = "" if other is None else f"?to={quote(other, safe='')}"
        return self._client._get(f"{_one(name, snapshot)}/diff{query}", Difference)


def _all(name: str) -> str:
    return f"/1/machines/{quote(name, safe='')}/snapshots"


def _one(name: str, snapshot: str) -> str:
    return f"{_all(name)}/{quote(snapshot, safe='')}"
