"""What every store demands of keys, values and transactions."""

from __future__ import annotations

import re
from collections.abc import Sequence

from triarch.errors import Invalid, Stale
from triarch.store.base import Compare, Put, Write

MAX_KEY_CHARACTERS = 512
MAX_VALUE_BYTES = 1 << 20
_PRINTABLE = re.compile(r"[!-~]*\Z")


def check_prefix(prefix: str) -> str:
    """Return `prefix`, or raise `Invalid` for what no key can begin with. Empty means all keys."""
    if len(prefix) > MAX_KEY_CHARACTERS or not _PRINTABLE.match(prefix):
        raise Invalid(
            f"illegal key {prefix[:80]!r}: it needs at most {MAX_KEY_CHARACTERS} ASCII characters without spaces"
        )
    return prefix


def check_key(key: str) -> str:
    """Return `key`, or raise `Invalid` that states the rule."""
    if not key:
        raise Invalid("illegal key '': it needs at least one character")
    return check_prefix(key)


def check_transaction(compares: Sequence[Compare], writes: Sequence[Write]) -> None:
    """Raise `Invalid` for an illegal key, a value that is too long, or a key that is written twice."""
    for compare in compares:
        check_key(compare.key)
    seen: set[str] = set()
    for write in writes:
        if check_key(write.key) in seen:
            raise Invalid(f"the key '{write.key}' is written twice in one transaction")
        seen.add(write.key)
        if isinstance(write, Put) and len(write.value) > MAX_VALUE_BYTES:
            size = len(write.value)
            raise Invalid(f"the value of '{write.key}' has {size} bytes; {MAX_VALUE_BYTES} is the most")


def check_revision(compare: Compare, revision: int) -> None:
    """Raise `Stale` when the key's revision (0: absent) is not the expected one."""
    if revision != compare.revision:
        raise Stale(
            f"the key '{compare.key}' is at revision {revision}; {compare.revision} was expected",
            key=compare.key,
            revision=revision,
            expected=compare.revision,
        )
