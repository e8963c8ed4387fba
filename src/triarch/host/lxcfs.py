"""lxcfs(1): a filesystem whose files of /proc tell a container of its own limits and not of the host's hardware."""

from __future__ import annotations

import os
from collections.abc import Mapping

ROOT = "/var/lib/lxcfs"
# What it has for a container, and where that goes.
_FILES = (
    "proc/cpuinfo",
    "proc/diskstats",
    "proc/loadavg",
    "proc/meminfo",
    "proc/stat",
    "proc/swaps",
    "proc/uptime",
    "sys/devices/system/cpu/online",
)


def own_view(pid: int | None = None, root: str = ROOT) -> Mapping[str, str]:
    """Files to mount over those of a container, by their place there; none where lxcfs does not run.

    `pid` is the process that will mount them: only what is mounted in its namespace counts.
    """
    seen = root if pid is None else f"/proc/{pid}/root{root}"
    try:
        # A directory that nothing is mounted on, and one whose program has ended (ENOTCONN), are no view.
        if os.stat(seen).st_dev == os.stat(os.path.dirname(seen)).st_dev:  # noqa: PTH116, PTH120
            return {}
        return {f"/{name}": f"{root}/{name}" for name in _FILES if os.access(f"{seen}/{name}", os.R_OK)}
    except OSError:
        return {}
