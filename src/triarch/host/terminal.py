"""Pseudo-terminals (pty(7), ioctl_tty(2))."""

from __future__ import annotations

import fcntl
import struct
import termios
from contextlib import suppress


def set_window_size(terminal_fd: int, columns: int, rows: int) -> None:
    """The size that programs on this terminal see. A terminal that is gone is ignored."""
    with suppress(OSError):
        fcntl.ioctl(terminal_fd, termios.TIOCSWINSZ, struct.pack("=HHHH", rows, columns, 0, 0))
