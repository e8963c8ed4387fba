"""Which hardware a container sees: the host's own, through the host's own kernel."""

from __future__ import annotations

import os

from triarch.model.device import HardwareInfo


def hardware_of_host() -> HardwareInfo:
    """Nothing between the machine's processes and the kernel is virtual."""
    kernel = os.uname()
    return HardwareInfo(
        kernel=("shared",), drivers=("host",), detail=f"the host's {kernel.sysname} {kernel.release} and its drivers"
    )
