"""Console output: from conmon's file, in which each line has a date and a stream before it, to `log_path`, as it was.

conmon writes whether a daemon is there or not. A daemon copies what is new as it comes, and catches up when it starts.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import msgspec

from triarch.errors import Exhausted
from triarch.host.console_log import ConsoleLog, Mark
from triarch.host.inotify import Inotify

_READ_BYTES = 256 << 10
# Many writes in a row become one copy, and one turn copies so much at most, of all machines together: where that is too
# little for a machine that talks without end, conmon begins its file anew and what was not copied is lost.
_GATHER_SECONDS = 0.01
_TURN_BYTES = 1 << 20
_PAUSE_SECONDS = 0.05
_SECOND = len("2026-01-02T03:04:05")


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
        self._log = ConsoleLog(Path(log_path))

    def prepare(self) -> None:
        """Before a start: copy what an earlier run left, and begin an empty file."""
        self.copy()
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.source.unlink(missing_ok=True)
        self._position.unlink(missing_ok=True)
        self.source.touch(mode=0o600)

    def copy(self, limit_bytes: int | None = None) -> int:
        """Append all new whole lines to `log_path`, or some more than `limit_bytes` of them; how much that was.

        What a crash interrupts may appear twice, never not at all.
        """
        try:
            source_fd = os.open(self.source, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return 0
        copied = 0
        try:
            inode = os.fstat(source_fd).st_ino
            offset = self._offset_in(inode)
            while (limit_bytes is None or copied <= limit_bytes) and (data := os.pread(source_fd, _READ_BYTES, offset)):
                whole = data[: data.rfind(b"\n") + 1]
                if not whole:
                    break
                self._log.append(*plain(whole))
                offset += len(whole)
                copied += len(whole)
                self._position.write_bytes(msgspec.json.encode(Position(inode=inode, offset_bytes=offset)))
        finally:
            os.close(source_fd)
        return copied

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


def plain(lines: bytes) -> tuple[bytes, tuple[Mark, ...]]:
    """The output in whole lines of a k8s-file, and when it was written, to the second (pure).

    A line is `DATE STREAM F|P TEXT`, where P says that no newline followed.
    """
    out: list[bytes] = []
    marks: list[Mark] = []
    size, second = 0, b""
    for line in lines.split(b"\n")[:-1]:
        parts = line.split(b" ", 3)
        if len(parts) < 4:
            continue
        if parts[0][:_SECOND] != second:
            with suppress(ValueError):
                marks.append(Mark(size, datetime.fromisoformat(parts[0].decode("ascii", "replace")).timestamp()))
                second = parts[0][:_SECOND]
        out.append(parts[3] if parts[2].startswith(b"P") else parts[3] + b"\n")
        size += len(out[-1])
    return b"".join(out), tuple(marks)


class LogPump:
    """Copies the output of all machines of one driver as it comes."""

    def __init__(self) -> None:
        self._inotify: Inotify | None = None
        self._logs: dict[int, RunLog] = {}
        self._gathering: asyncio.TimerHandle | None = None
        self._changed: set[int] = set()

    def follow(self, log: RunLog) -> None:
        """Begin, with what is there already. A log that is followed already is not followed twice.

        Raises `Exhausted` where the kernel has no queue for it.
        """
        if self._inotify is None:
            try:
                self._inotify = Inotify()
            except OSError as error:
                raise Exhausted(
                    f"cannot follow what machines say: {(error.strerror or str(error)).lower()}",
                    hint="sysctl fs.inotify.max_user_instances",
                ) from error
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
        room = _TURN_BYTES
        for watch in changed:
            if room <= 0:
                # These first, the next time.
                self._changed.add(watch)
            elif watch in self._logs:
                # A full disk must not end the pump: the rest is copied when there is room.
                with suppress(OSError):
                    copied = self._logs[watch].copy(min(room, _TURN_BYTES // len(changed)))
                    room -= copied
                    if copied > _TURN_BYTES // len(changed):
                        self._changed.add(watch)
        if self._changed:
            self._gathering = asyncio.get_running_loop().call_later(_PAUSE_SECONDS, self._copy_changed)
