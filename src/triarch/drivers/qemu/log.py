"""The console log of a VM, which QEMU appends to without end."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

MAX_LOG_BYTES = 16 << 20


def bound_log(path: Path) -> None:
    """Begin a log that has grown too long anew, and keep what it held as its one predecessor, `NAME.1`.

    QEMU's descriptor appends, so that its next write goes to the new beginning; what it writes between the copy and the
    cut is lost. Raises `OSError`.
    """
    if path.stat().st_size <= MAX_LOG_BYTES:
        return
    # Never more than was too long, whatever the guest said while no daemon looked.
    with path.open("rb") as log, path.with_name(f"{path.name}.1").open("wb") as predecessor:
        os.fchmod(predecessor.fileno(), 0o600)
        log.seek(-MAX_LOG_BYTES, os.SEEK_END)
        shutil.copyfileobj(log, predecessor, 1 << 20)
    os.truncate(path, 0)
