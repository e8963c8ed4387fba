"""Events: what happened, in order, on one stream."""

from __future__ import annotations

from datetime import datetime

import msgspec

from triarch.model.operation import Operation


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """`kind` is `machine-started`, `machine-stopped`, `operation-updated`, `template-created`, …

    `sequence` grows by one within one life of the daemon; `target` is `machine/web` or `template/bookworm`.
    """

    sequence: int
    kind: str
    target: str
    at: datetime
    fields: dict[str, str | int | None] = {}
    operation: Operation | None = None
