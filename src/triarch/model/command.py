"""What a command, its environment and a request to run it may hold, checked at every border."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from triarch.errors import Invalid
from triarch.model.account import parse_user
from triarch.model.driver import ExecRequest

MAX_TIMEOUT_SECONDS = 30 * 86400.0
MAX_TERMINAL_SIZE = (1 << 16) - 1


def check_command(command: Sequence[str], environment: Mapping[str, str]) -> None:
    """Raise `Invalid` for what execve(2) cannot pass on: empty names of programs and variables, NULs, `=` in a name.

    Control characters in a variable's name are refused too: nobody means them.
    """
    if command and not command[0]:
        raise Invalid("illegal command: the program's name is empty")
    for word in command:
        if "\0" in word:
            raise Invalid(f"illegal command: the word {word[:80]!r} holds a NUL character")
    for name, value in environment.items():
        if not name or "=" in name or not name.isprintable():
            raise Invalid(
                f"illegal environment variable {name[:80]!r}: it needs a name without '=' or control characters"
            )
        if "\0" in value:
            raise Invalid(f"illegal environment variable '{name[:80]}': its value holds a NUL character")


def check_exec(machine: str, request: ExecRequest) -> None:
    """Raise `Invalid` for a request that no machine can be given."""
    if request.login and request.command:
        raise Invalid("a login shell takes no command", hint=f"triarch exec {machine} -- {request.command[0]}")
    if not request.command and not request.login:
        raise Invalid(f"exec in machine '{machine}' needs a command", hint=f"triarch exec {machine} -- sh")
    check_command(request.command, request.environment)
    parse_user(request.user)
    if request.directory is not None and (not request.directory.startswith("/") or "\0" in request.directory):
        raise Invalid(f"illegal directory {request.directory[:80]!r}: it needs a whole path that begins with '/'")
    if not all(1 <= size <= MAX_TERMINAL_SIZE for size in (request.columns, request.rows)):
        raise Invalid(f"illegal terminal size {request.columns}x{request.rows}: it needs 1 to {MAX_TERMINAL_SIZE}")
    if request.timeout_seconds is not None and not 0 < request.timeout_seconds <= MAX_TIMEOUT_SECONDS:
        raise Invalid(f"illegal timeout of {request.timeout_seconds:g} s: it needs more than 0, and at most 30 days")
