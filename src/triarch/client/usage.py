"""What machines use, from the client's side."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING
from urllib.parse import quote, urlencode

from triarch.model.usage import MachineUsage, UsageHistory, UsageRow

if TYPE_CHECKING:
    from triarch.client.api import Client


class Usages:
    """`client.usages`: raises what `Client` raises."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def all(self) -> tuple[MachineUsage, ...]:
        """All machines and what they use now, sorted by name."""
        return self._client._get("/1/usage", tuple[MachineUsage, ...])

    def history(self, name: str) -> UsageHistory:
        """The last ten minutes of a machine."""
        return self._client._get(f"/1/machines/{quote(name, safe='')}/usage/history", UsageHistory)

    def account(
        self,
        begin: datetime | None = None,
        end: datetime | None = None,
        *,
        by: str = "machine",
        machine: str | None = None,
        label: str | None = None,
    ) -> tuple[UsageRow, ...]:
        """What was used over time: a row per machine, or with `by="label:KEY"` per value of a label."""
        asked = {
            "from": None if begin is None else begin.isoformat(),
            "to": None if end is None else end.isoformat(),
            "by": by,
            "machine": machine,
            "label": label,
        }
        query = urlencode({key: value for key, value in asked.items() if value is not None})
        return self._client._get(f"/1/usage/account?{query}", tuple[UsageRow, ...])

    def metrics(self) -> str:
        """All figures in Prometheus' text format."""
        return self._client.request_raw("/metrics").decode()
