"""What a daemon says of itself."""

from __future__ import annotations

import msgspec


class ServerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of GET /1: which daemon is this? `tag` and `state_dir` are its instance's."""

    version: str
    tag: str
    state_dir: str
    pid: int
