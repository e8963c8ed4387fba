"""Console output: from conmon's file, in which each line has a date and a stream before it, to `log_path`, as it was.

conmon writes whether a daemon is there or not. A daemon copies what is new as it comes, and catches up when it starts.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from pathlib import Path

import msgspec

from triarch.host.inotify import Inotify

MAX_LOG_BYTES = 16 << 20
_READ_BYTES = 1 << 20
# Many writes in a row become one copy.
_GATHER_SECONDS = 0.01


class Position(msgspec.Struct, frozen=True, kw_only=True):
    """Up to where conmon's file has been copied; the file is another one once conmon has started it anew."""

    inode: int
    offset_bytes: int


class RunLog:
    """One machine's output. `follow` must have been called on a `LogPump` for it to come by itself."""

    def __init__(self, state_dir: str, log_path: str) -> None:
        self.directory = Path(state_dir) / "conmon"
        self.source = self.directory / "console"
        # Not in the directory that is watched: each copy would wake its own watcher.
        self._position = Path(state_dir) / "conmon.position"
        self._target = Path(log_path)

    def prepare(self) -> None:
        """Before a start: copy what an earlier run left, and begin an empty file."""
        self.copy()
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.source.unlink(missing_ok=True)
        self._position.unlink(missing_ok=True)
        self.source.touch(mode=0o600)

    def copy(self) -> None:
        """Append all new whole lines to `log_path`. What a crash interrupts may appear twice, never not at all."""
        try:
            source_fd = os.open(self.source, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return
        try:
            inode = os.fstat(source_fd).st_ino
            offset = self._offset_in(inode)
            while data := os.pread(source_fd, _READ_BYTES, offset):
                whole = data[: data.rfind(b"\n") + 1]
                if not whole:
                    break
                self._append(plain(whole))
                offset += len(whole)
                self._position.write_bytes(msgspec.json.encode(Position(inode=inode, offset_bytes=offset)))
        finally:
            os.close(source_fd)

    def finish(self) -> None:
        """After the end of a run: copy the rest, and remove conmon's file."""
        self.copy()
        for path in (self.source, self._position):
            path.unlink(missing_ok=True)
        with suppress(OSError):
            self.directory.rmdir()

    def _offset_in(self, inode: int) -> int:
        with suppress(FileNotFoundError, msgspec.DecodeError):
            position = msgspec.json.decode(self._position.read_bytes(), type=Position)
            if position.inode == inode:
                return position.offset_bytes
        return 0

    def _append(self, data: bytes) -> None:
        if self._target.exists() and self._target.stat().st_size + len(data) > MAX_LOG_BYTES:
            # One predecessor is kept: a machine that talks without end must not fill the host's disk.
            self._target.replace(self._target.with_suffix(".log.1"))
        target_fd = os.open(self._target, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(target_fd, "wb") as target:
            target.write(data)


def plain(lines: bytes) -> bytes:
    """The output in whole lines of a k8s-file: `DATE STREAM F|P TEXT`, where P says that no newline followed (pure)."""
    out = []
    for line in lines.split(b"\n")[:-1]:
        parts = line.split(b" ", 3)
        if len(parts) < 4:
            continue
        out.append(parts[3] if parts[2].startswith(b"P") else parts[3] + b"\n")
    return b"".join(out)


class LogPump:
    """Copies the output of all machines of one driver as it comes."""

    def __init__(self) -> None:
        self._inotify: Inotify | None = None
        self._logs: dict[int, RunLog] = {}
        self._gathering: asyncio.TimerHandle | None = None
        self._changed: set[int] = set()

    def follow(self, log: RunLog) -> None:
        """Begin, with what is there already. A log that is followed already is not followed twice."""
        if self._inotify is None:
            self._inotify = Inotify()
            asyncio.get_running_loop().add_reader(self._inotify.fd, self._notice)
        with suppress(FileNotFoundError):
            self._logs[self._inotify.watch_directory(str(log.directory))] = log
        log.copy()

    def leave(self, log: RunLog) -> None:
        for watch, known in list(self._logs.items()):
            if known.source == log.source:
                del self._logs[watch]
                if self._inotify is not None:
                    self._inotify.forget(watch)

    def close(self) -> None:
        if self._gathering is not None:
            self._gathering.cancel()
        if self._inotify is not None:
            asyncio.get_running_loop().remove_reader(self._inotify.fd)
            self._inotify.close()
            self._inotify = None
        self._logs.clear()

    def _notice(self) -> None:
        assert self._inotify is not None
        self._changed |= self._inotify.read()
        if self._gathering is None:
            self._gathering = asyncio.get_running_loop().call_later(_GATHER_SECONDS, self._copy_changed)

    def _copy_changed(self) -> None:
        self._gathering = None
        changed, self._changed = self._changed, set()
        for watch in changed:
            if watch in self._logs:
                # A full disk must not end the pump: the rest is copied when there is room.
                with suppress(OSError):
                    self._logs[watch].copy()
