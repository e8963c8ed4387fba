"""What a command and its environment may hold, checked at every border."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from triarch.errors import Invalid


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
