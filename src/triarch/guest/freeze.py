"""Holding a VM's filesystems still from within, through its agent (`init/freeze.c`)."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING

from triarch.errors import Failed, TimedOut, Unavailable
from triarch.guest.agent import Agent, connection_errors

if TYPE_CHECKING:
    from asyncssh import SSHClientProcess

# A guest that still boots, or is busy to its ears, is not waited for: a copy can be had without it.
_ANSWER_SECONDS = 15.0
_THAW_SECONDS = 30.0
_MAX_LINE_BYTES = 100


class GuestFreeze:
    """Filesystems that stand still in a guest. Made by `begin`; ends with `end`, or in the guest by itself."""

    def __init__(self, process: SSHClientProcess[bytes], begun: float) -> None:
        self._process = process
        self._begun = begun

    @classmethod
    async def begin(cls, agent: Agent, limit_seconds: float) -> GuestFreeze:
        """Return when nothing is written any more. Raises `TimedOut` or `Unavailable` when the guest does not answer,
        `Failed` when it cannot.
        """
        process: SSHClientProcess[bytes] | None = None
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                process = await agent.request(f"f:{limit_seconds:.0f}")
                said = await _line(process)
                begun = time.monotonic()
                if said == b"freezing\n":
                    said = await _line(process)
        except TimeoutError as error:
            _hang_up(process)
            raise TimedOut(f"the guest did not freeze its filesystems within {_ANSWER_SECONDS:g} s") from error
        except BaseException:
            _hang_up(process)
            raise
        if said != b"frozen\n":
            _hang_up(process)
            raise Failed(
                f"the guest cannot freeze its filesystems: {said[:_MAX_LINE_BYTES].decode(errors='replace')!r}"
            )
        return cls(process, begun)

    async def go_on(self) -> None:
        """Another limit from now. Raises `TimedOut` when it has ended."""
        with contextlib.suppress(*connection_errors()):
            if not self._process.is_closing() and self._process.exit_status is None:
                self._process.stdin.write(b"+")
                await self._process.stdin.drain()
                return
        raise TimedOut("the guest's filesystems were not held still for long enough")

    async def end(self) -> float:
        """Let writes go on; return for how long none went, as seen from here.

        Raises `TimedOut` when it had ended by itself, or when the guest does not answer.
        """
        ended_before = self._process.exit_status is not None
        try:
            async with asyncio.timeout(_THAW_SECONDS):
                self._process.stdin.write_eof()
                said = await _line(self._process)
                seconds = time.monotonic() - self._begun
        except (TimeoutError, Unavailable, OSError) as error:
            raise TimedOut("the guest does not say that its filesystems go on") from error
        finally:
            _hang_up(self._process)
        if ended_before or said != b"thawed\n":
            raise TimedOut("the guest's filesystems were not held still for long enough")
        return seconds


async def set_clock(agent: Agent) -> None:
    """Tell the guest what time it is. Raises `Unavailable` when it does not listen."""
    # Connected first, because that may take a while.
    await agent.wait_ready(_ANSWER_SECONDS)
    process = await agent.request(f"t:{time.time():.9f}")
    try:
        async with asyncio.timeout(_ANSWER_SECONDS):
            await process.wait_closed()
    except TimeoutError as error:
        raise Unavailable("the guest's clock could not be set") from error


async def _line(process: SSHClientProcess[bytes]) -> bytes:
    """What a guest says is hostile: no more than a short line of it is kept."""
    said = b""
    while not said.endswith(b"\n") and len(said) < _MAX_LINE_BYTES:
        try:
            piece = await process.stdout.read(1)
        except connection_errors() as error:
            raise Unavailable("the guest's agent hung up") from error
        if not piece:
            break
        said += piece
    return said


def _hang_up(process: SSHClientProcess[bytes] | None) -> None:
    if process is not None:
        process.close()
