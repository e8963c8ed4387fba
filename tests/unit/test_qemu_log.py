"""The bound of a console log."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from triarch.drivers.qemu.log import MAX_LOG_BYTES, bound_log


def test_a_log_that_grew_too_long_begins_anew_under_the_writers_hands(tmp_path: Path) -> None:
    path, predecessor = tmp_path / "console.log", tmp_path / "console.log.1"
    writer = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(writer, b"short")
    bound_log(path)
    assert path.read_bytes() == b"short" and not predecessor.exists()
    os.write(writer, b"x" * MAX_LOG_BYTES)
    bound_log(path)
    os.write(writer, b"after")
    os.close(writer)
    assert path.read_bytes() == b"after"
    assert predecessor.read_bytes() == b"x" * MAX_LOG_BYTES
    assert stat.S_IMODE(predecessor.stat().st_mode) == 0o600
