"""Points in time as people write them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from triarch.errors import Invalid
from triarch.model.setting_forms import read_time


def parse_moment(text: str, now: datetime) -> datetime:
    """`10m` (that long ago), or a date and time as ISO 8601 has it; without a zone it is UTC. Raises `Invalid`."""
    if text[:1].isdigit() and "-" not in text:
        try:
            return now - timedelta(seconds=read_time(text))
        except (Invalid, ValueError, OverflowError) as error:
            raise _illegal(text) from error
    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError) as error:
        raise _illegal(text) from error


def _illegal(text: str) -> Invalid:
    return Invalid(f"illegal time {text[:80]!r}: it needs a span such as 10m or 2h, or a date as 2026-01-31T12:30:00")
