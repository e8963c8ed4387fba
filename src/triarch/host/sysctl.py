"""Kernel settings under /proc/sys, by their dotted names."""

from __future__ import annotations

import os
from pathlib import Path

from triarch.errors import Denied


def _path(name: str) -> Path:
    return Path("/proc/sys") / name.replace(".", "/")


def read(name: str) -> str | None:
    """The value, or None where this kernel has no such setting (or hides it)."""
    try:
        return _path(name).read_text().strip()
    except OSError:
        return None


def write(name: str, value: str) -> None:
    """Raises `Denied` where it cannot be changed from here."""
    try:
        _path(name).write_text(value)
    except OSError as error:
        raise Denied(f"cannot set {name} to {value}: {error.strerror}", hint=f"sysctl -w {name}={value}") from error


def can_be(name: str, value: str) -> bool:
    """Whether it has this value, or could be given it."""
    return read(name) == value or os.access(_path(name), os.W_OK)
