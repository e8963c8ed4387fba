"""The daemon's end of the freezer: hold the filesystems in some files still, and let go of them."""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
import sys
from collections.abc import Sequence
from pathlib import Path

from triarch.errors import Failed, TimedOut
from triarch.host.freezer import FAILED, FROZEN, THAWED
from triarch.host.process import program_environment

# How long the program may take for writing everything out.
_PATIENCE_SECONDS = 60.0
_LOOP_GET_STATUS64 = 0x4C05
_INFO_BYTES = 232
_MODULE = "triarch.host.freezer"


def loop_devices_of(files: Sequence[Path]) -> tuple[str, ...]:
    """The loop devices that show one of these files now (`linux/loop.h`), as paths."""
    wanted = {(status.st_dev, status.st_ino) for path in files if (status := _stat(path)) is not None}
    found = []
    for entry in sorted(Path("/sys/block").glob("loop*/loop/backing_file")):
        device = f"/dev/{entry.parts[3]}"
        if _backing(device) in wanted:
            found.append(device)
    return tuple(found)


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _backing(device: str) -> tuple[int, int] | None:
    """Device and inode of the file that a loop device shows."""
    status = bytearray(_INFO_BYTES)
    try:
        fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.ioctl(fd, _LOOP_GET_STATUS64, status)
    except OSError:
        return None
    finally:
        os.close(fd)
    device_number, inode = struct.unpack_from("=QQ", status)
    return device_number, inode


class Freeze:
    """Filesystems that stand still. Made by `begin`; ends with `end`, or by itself after `limit_seconds`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    @classmethod
    async def begin(cls, devices: Sequence[str], limit_seconds: float) -> Freeze:
        """Return when what was written is on the devices and nothing more is. Raises `Failed` or `TimedOut`."""
        freeze = cls(await _start(limit_seconds, "freeze", devices))
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                said = await freeze._line()
        except BaseException as error:
            await asyncio.shield(freeze._close())
            if isinstance(error, TimeoutError):
                raise TimedOut("the filesystem could not be frozen in time: it has too much to write out") from error
            raise
        if said != FROZEN:
            await freeze._close()
            raise Failed(f"cannot freeze the filesystem: {_reason(said)}")
        return freeze

    @property
    def lasts(self) -> bool:
        """Whether it still stands still, as far as is known."""
        return self._process.returncode is None

    async def go_on(self) -> None:
        """Another `limit_seconds` from now. Raises `TimedOut` when it has ended by itself."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(b"+")
            await self._process.stdin.drain()
        except ConnectionError as error:
            raise TimedOut("the filesystem was not held still for long enough") from error

    async def end(self) -> float:
        """Let writes go on; return for how long none went. Raises `TimedOut` when it had ended by itself before."""
        assert self._process.stdin is not None
        ended_before = self._process.returncode is not None
        self._process.stdin.close()
        said = await self._line()
        await self._process.wait()
        if ended_before or not said.startswith(THAWED):
            raise TimedOut("the filesystem was not held still for long enough")
        return float(said[len(THAWED) :])

    async def _line(self) -> bytes:
        assert self._process.stdout is not None
        return await self._process.stdout.readline()

    async def _close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()


async def thaw(devices: Sequence[str]) -> None:
    """End a freeze whose program was killed. Devices that are not frozen are success. Raises `Failed`."""
    process = await _start(0.0, "thaw", devices)
    said, _ = await process.communicate()
    if not said.startswith(THAWED):
        raise Failed(f"cannot thaw the filesystem: {_reason(said)}")


def _reason(said: bytes) -> str:
    text = said.removeprefix(FAILED).decode(errors="replace").strip().lower()
    return text or "the program that does it ended without a word"


async def _start(limit_seconds: float, verb: str, devices: Sequence[str]) -> asyncio.subprocess.Process:
    """In a session of its own: whatever ends the daemon must not end this before it has thawed."""
    return await asyncio.create_subprocess_exec(
        sys.executable,
        *("-I", "-m", _MODULE, str(limit_seconds), verb, *devices),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env=program_environment(),
        start_new_session=True,
    )
