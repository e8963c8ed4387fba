"""Programs in memory that nobody can change: what is executed is what was read, whatever happens to the file."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


def sealed_copy(path: Path) -> int:
    """The descriptor (close-on-exec) of a sealed, executable copy of a program (memfd_create(2))."""
    fd = os.memfd_create(path.name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with path.open("rb") as source, os.fdopen(os.dup(fd), "wb") as copy:
            copy.write(source.read())
        os.fchmod(fd, 0o755)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd
