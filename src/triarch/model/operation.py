"""Operations: long-running changes that are journalled, can be cancelled, and are finished or undone after a crash."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

import msgspec

from triarch.errors import Error


class OperationStatus(StrEnum):
    RUNNING = "running"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        return self not in (OperationStatus.RUNNING, OperationStatus.CANCELLING)


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """An error as the API shows it (the members of RFC 9457 plus Triarch's own)."""

    code: str
    status: int
    message: str
    hint: str | None = None
    retryable: bool = False
    fields: dict[str, str | int | None] = {}

    @classmethod
    def of(cls, error: Error) -> Problem:
        return cls(
            code=error.code,
            status=error.status,
            message=error.message,
            hint=error.hint,
            retryable=error.retryable,
            fields=dict(error.fields),
        )


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """Where an operation is: the step's name, what it says now, and how far it is (0 … 1, None when unknown)."""

    step: str = ""
    text: str = ""
    fraction: float | None = None


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One change. `target` is `machine/web` or `template/bookworm`; `result` is the verb's own answer as text."""

    id: str
    verb: str
    target: str
    status: OperationStatus = OperationStatus.RUNNING
    progress: Progress = Progress()
    result: str | None = None
    error: Problem | None = None
    created_at: datetime
    ended_at: datetime | None = None
