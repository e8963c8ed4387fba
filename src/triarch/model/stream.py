"""The messages of a stream (exec, console, run) between client and daemon.

The client's first message is JSON: `ExecRequest`, `RunRequest` or `ConsoleRequest`. After it, binary messages carry
data: their first byte is the channel, the rest the bytes. Text messages are JSON: `Control` from the client, `Ending`
once from the daemon, which then closes.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from triarch.model.driver import Resize
from triarch.model.machine import CreateMachine, Exit
from triarch.model.operation import Problem

STDIN, STDOUT, STDERR = 0, 1, 2

# Close codes (RFC 6455, 7.4): an ordinary end, a daemon that ends, a client that reads events too slowly.
NORMAL, RESTARTING, TOO_SLOW = 1000, 1012, 1013

# Longer input is cut into several messages; the daemon refuses longer ones.
MAX_DATA_BYTES = 64 << 10
MAX_MESSAGE_BYTES = 1 << 20

# What a console shows of the past.
HISTORY_BYTES = 64 << 10
MAX_HISTORY_BYTES = 32 << 20


class RunRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Start a throw-away machine attached; `terminal` is the size of the terminal it gets, None for plain streams."""

    machine: CreateMachine
    terminal: Resize | None = None


class FilesRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Speak with the file server in a machine (`model.file_protocol`) over channels 0 and 1.

    With `direct` the daemon's first message, on channel 2, is the path of a socket, which takes one connection: the
    same is spoken there, without the daemon in between where that can be. The stream stays open and ends as ever.
    """

    direct: bool = False


class ConsoleRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Attach to a machine's console: `history_bytes` of what it said before come first, from the beginning of a line.

    Any number may be attached; all of them see what it says, and all may type but those with `read_only`.
    """

    history_bytes: Annotated[int, msgspec.Meta(ge=0, le=MAX_HISTORY_BYTES)] = HISTORY_BYTES
    read_only: bool = False


class Control(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """From the client: the terminal's new size, or the end of its input. Exactly one of the two."""

    resize: Resize | None = None
    eof: bool = False


class Ending(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """From the daemon, last: how the command ended, or why it could not be run. A console ends with neither."""

    exit: Exit | None = None
    error: Problem | None = None
