"""QEMU's monitor: one short QMP session per question, so that nothing has to be kept alive or taken up again."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from qemu.qmp import ExecuteError, QMPClient, QMPError

from triarch.errors import Failed, TimedOut, Unavailable

_TIMEOUT_SECONDS = 30.0

# The package's own complaints would come beside our errors, which say the same.
_QUIET = logging.getLogger("triarch.drivers.qemu.qmp")
_QUIET.disabled = True


@asynccontextmanager
async def monitor(path: Path, name: str, timeout_seconds: float = _TIMEOUT_SECONDS) -> AsyncIterator[QMPClient]:
    """A negotiated session. QEMU serves one at a time: others wait their turn.

    Raises `Unavailable` when QEMU is not there or goes away, `TimedOut` when it does not answer, `Failed` when it
    refuses a command.
    """
    client = QMPClient()
    client.logger = _QUIET
    try:
        async with asyncio.timeout(timeout_seconds):
            await client.connect(str(path))
            yield client
    except TimeoutError as error:
        raise TimedOut(f"QEMU of machine '{name}' did not answer within {timeout_seconds:.0f} s") from error
    except ExecuteError as error:
        raise Failed(f"QEMU of machine '{name}' refused a command: {error}") from error
    except (QMPError, OSError, EOFError) as error:
        raise Unavailable(f"QEMU of machine '{name}' is not reachable: {error}") from error
    finally:
        with suppress(QMPError, OSError, EOFError):
            await client.disconnect()


async def is_paused(path: Path, name: str) -> bool:
    """Whether QEMU says that the guest stands still."""
    async with monitor(path, name) as client:
        answer = await client.execute("query-status")
    return isinstance(answer, dict) and answer.get("status") == "paused"
