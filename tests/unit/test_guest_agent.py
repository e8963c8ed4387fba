"""An agent that a hostile guest has put its own program in the place of."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from triarch.errors import Failed, TimedOut
from triarch.guest import agent as module
from triarch.guest.agent import Agent, Answer
from triarch.guest.keys import AgentKeys


async def _obey(process: asyncssh.SSHServerProcess[bytes]) -> None:
    match process.command:
        case "flood":
            for _ in range(64 << 4):
                process.stdout.write(bytes(64 << 10))
                await process.stdout.drain()
        case "hang":
            await process.wait_closed()
        case _:
            process.stdout.write(await process.stdin.read())
            process.stderr.write(b"said")
    process.exit(3)


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[Agent]:
    host, client = (asyncssh.generate_private_key("ssh-ed25519") for _ in range(2))
    public = client.export_public_key("openssh").decode()
    (tmp_path / "authorized").write_text(public)
    keys = AgentKeys(
        host_key=b"",
        host_public_key=host.export_public_key("openssh").decode(),
        client_key=client.export_private_key("openssh").decode(),
        client_public_key=public,
    )
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "agent"))
    authorized: Any = str(tmp_path / "authorized")
    server = await asyncssh.listen(
        sock=listener,
        server_host_keys=[host],
        authorized_client_keys=authorized,
        process_factory=_obey,
        encoding=None,
    )
    bound = Agent(tmp_path / "agent", keys)
    yield bound
    await bound.close()
    server.close()


async def test_an_answer_is_what_was_said_and_how_it_ended(agent: Agent) -> None:
    assert await agent.ask("echo", b"input") == Answer(code=3, output=b"input", errors=b"said")


async def test_a_flood_is_no_answer(agent: Agent) -> None:
    with pytest.raises(Failed, match="says more"):
        await agent.ask("flood")


async def test_no_answer_is_not_waited_for_without_end(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ASK_SECONDS", 0.5)
    with pytest.raises(TimedOut):
        await asyncio.wait_for(agent.ask("hang"), 20)
