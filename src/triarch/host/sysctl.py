"""Kernel settings under /proc/sys, by their dotted names."""

from __future__ import annotations

import os
from pathlib import Path

from triarch.errors import Denied

# In a dotted name a slash stands for a dot, as sysctl(8) has it: interfaces may have dots in their names.
_SWAPPED = str.maketrans("./", "/.")


def _path(name: str) -> Path:
    return Path("/proc/sys") / name.translate(_SWAPPED)


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


def interfaces(setting: str) -> tuple[str, ...]:
    """The names of every interface that has the setting (`net.ipv6.conf.*.accept_ra`); `all` and `default` are none."""
    head, _, tail = setting.partition("*")
    base = _path(head.rstrip("."))
    names = sorted(path.name for path in base.iterdir() if path.is_dir()) if base.is_dir() else []
    return tuple(name for name in names if name not in ("all", "default") and (base / name / tail.strip(".")).exists())


def of_interface(setting: str, interface: str) -> str:
    """The name of an interface's own setting. Its dots are slashes here, as sysctl(8) has it."""
    return setting.replace("*", interface.replace(".", "/"))
