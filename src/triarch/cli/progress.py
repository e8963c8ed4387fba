"""Waiting for an operation: one live line on a terminal, few plain ones elsewhere; Ctrl-C asks the daemon to undo."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TextIO

from triarch.cli.output import plain
from triarch.client.problems import error_of
from triarch.errors import Conflict, DaemonUnavailable, Error

if TYPE_CHECKING:
    from triarch.client import Client
    from triarch.model.operation import Operation

# Nobody wants to read about what is done before they have looked up.
QUIET_SECONDS = 0.4
PLAIN_QUIET_SECONDS = 3.0
FRAME_SECONDS = 0.12
_FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
_ASCII_FRAMES = "|/-\\"


def finish(client: Client, operation: Operation, *, cancels: bool = True) -> Operation:
    """The operation when it has succeeded. Raises the error that it ended with.

    Ctrl-C cancels the operation (with `cancels`), waits until it is undone, says so, and is passed on as
    KeyboardInterrupt; a second one does not wait. Without `cancels` it goes on, which is said too.
    """
    try:
        operation = _wait(client, operation)
    except KeyboardInterrupt:
        if cancels:
            _cancel(client, operation)
        else:
            _detach(operation)
        raise
    if operation.error is not None:
        raise error_of(operation.error)
    return operation


def each(names: Sequence[str], act: Callable[[str], object]) -> int:
    """Do it to everything named; one that fails does not keep the others from it.

    The exit code for all: that of the failures where they have one in common.
    """
    from triarch.cli import exit_codes
    from triarch.cli.app import complain

    failures: set[int] = set()
    for name in names:
        try:
            act(name)
        except Error as error:
            if len(names) == 1:
                raise
            complain(error.message, error.hint)
            failures.add(exit_codes.of(error))
    if not failures:
        return exit_codes.OK
    return failures.pop() if len(failures) == 1 else exit_codes.ERROR


def _wait(client: Client, operation: Operation) -> Operation:
    live = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    operation = client.operation(operation.id, QUIET_SECONDS if live else PLAIN_QUIET_SECONDS)
    if operation.status.ended:
        return operation
    return _wait_live(client, operation, sys.stderr) if live else _wait_plain(client, operation, sys.stderr)


def _wait_live(client: Client, operation: Operation, stream: TextIO) -> Operation:
    started = time.monotonic()
    frames = _FRAMES if (stream.encoding or "").lower().startswith("utf") else _ASCII_FRAMES
    count = 0
    stream.write("\x1b[?25l")
    try:
        while not operation.status.ended:
            seconds = int(time.monotonic() - started)
            line = f"{frames[count % len(frames)]} {_describe(operation)}{f'  {seconds}s' if seconds >= 3 else ''}"
            stream.write(f"\r\x1b[K{line[: _width(stream) - 1]}")
            stream.flush()
            count += 1
            operation = client.operation(operation.id, FRAME_SECONDS)
    finally:
        stream.write("\r\x1b[K\x1b[?25h")
        stream.flush()
    return operation


def _wait_plain(client: Client, operation: Operation, stream: TextIO) -> Operation:
    """A line whenever the operation comes to another step."""
    step = None
    while not operation.status.ended:
        if operation.progress.step != step:
            step = operation.progress.step
            print(_describe(operation), file=stream, flush=True)
        operation = client.operation(operation.id, 1.0)
    return operation


def _describe(operation: Operation) -> str:
    progress = operation.progress
    percent = "" if progress.fraction is None else f" {progress.fraction:.0%}"
    what = plain(progress.text or progress.step)
    target = operation.target.partition("/")[2]
    subject = operation.verb if operation.target.startswith("instance/") else f"{operation.verb} {target}"
    return f"{subject}: {what}{percent}" if what else f"{subject} …"


def _width(stream: TextIO) -> int:
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except OSError:
        return 80


def _cancel(client: Client, operation: Operation) -> None:
    """On a new connection: the interrupted request still occupies the old one."""
    client.close()
    what = _describe_short(operation)
    try:
        print(f"cancelling {what}, press Ctrl-C again to leave it to itself", file=sys.stderr)
        ended = client.wait(client.cancel(operation.id))
    except Conflict as error:
        print(error.message, file=sys.stderr)
        _detach(operation)
    except KeyboardInterrupt:
        _detach(operation)
    except DaemonUnavailable:
        return
    else:
        print(f"{what}: {_OUTCOMES.get(ended.status.value, ended.status.value)}", file=sys.stderr)


_OUTCOMES = {
    "cancelled": "cancelled and undone",
    "succeeded": "it was done before it could be cancelled",
    "failed": "it failed before it could be cancelled",
}


def _detach(operation: Operation) -> None:
    print(f"detached; {_describe_short(operation)} goes on: triarch wait {operation.id}", file=sys.stderr)


def _describe_short(operation: Operation) -> str:
    return f"{operation.verb} {operation.target.partition('/')[2]}"
