"""Telling when files in a directory change (inotify(7))."""

from __future__ import annotations

import ctypes
import os
import struct

_IN_MODIFY, _IN_MOVED_TO, _IN_CREATE, _IN_ONLYDIR = 0x2, 0x80, 0x100, 0x01000000
_EVENT = struct.Struct("=iIII")  # watch, mask, cookie, length of the name that follows
_READ_BYTES = 65536

_libc = ctypes.CDLL(None, use_errno=True)


class Inotify:
    """One queue of changes; `fd` is readable when there are some."""

    def __init__(self) -> None:
        self.fd = _checked(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC), "inotify_init1")

    def watch_directory(self, path: str) -> int:
        """Report writes to the files in `path` under the number that this returns."""
        mask = _IN_MODIFY | _IN_MOVED_TO | _IN_CREATE | _IN_ONLYDIR
        return _checked(_libc.inotify_add_watch(self.fd, os.fsencode(path), mask), f"watch {path}")

    def forget(self, watch: int) -> None:
        """Stop reporting. The directory may be gone already."""
        _libc.inotify_rm_watch(self.fd, watch)

    def read(self) -> frozenset[int]:
        """The watches that saw a change since the last call."""
        found: set[int] = set()
        try:
            data = os.read(self.fd, _READ_BYTES)
        except BlockingIOError:
            return frozenset()
        offset = 0
        while offset < len(data):
            watch, _, _, length = _EVENT.unpack_from(data, offset)
            found.add(watch)
            offset += _EVENT.size + length
        return frozenset(found)

    def close(self) -> None:
        os.close(self.fd)


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result
