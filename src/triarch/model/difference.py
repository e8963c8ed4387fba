"""What changed between two moments of a machine."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Change(StrEnum):
    ADDED = "added"
    CHANGED = "changed"
    REMOVED = "removed"


class FileChange(msgspec.Struct, frozen=True, kw_only=True):
    """An object in the machine's tree. `kind` is `f`, `d`, `l`, `h` (one more name), `p`, `c`, `b` or `s`.

    `package` is the one that the file belongs to, empty where it is none's. Sizes are those of ordinary files.
    """

    path: str
    change: Change
    kind: str
    old_bytes: int | None = None
    new_bytes: int | None = None
    package: str = ""


class PackageChange(msgspec.Struct, frozen=True, kw_only=True):
    """A package of dpkg, apk or rpm; a version is None where it is not installed."""

    name: str
    old_version: str | None
    new_version: str | None


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """From snapshot `old` to snapshot `new`; an empty `new` is the machine as it is now."""

    old: str
    new: str
    files: tuple[FileChange, ...]
    packages: tuple[PackageChange, ...]
