"""What a command's exit code means. Stable: scripts count on it."""

from __future__ import annotations

from triarch.errors import (
    Cancelled,
    Conflict,
    Denied,
    DriverUnavailable,
    Error,
    Exhausted,
    Invalid,
    NotFound,
    TimedOut,
    Unavailable,
    Unsupported,
)

OK = 0
ERROR = 1
USAGE = 2
NOT_FOUND = 3
CONFLICT = 4
DENIED = 5
CANNOT = 6
UNAVAILABLE = 7
TIMED_OUT = 124
OWN_FAILURE = 125
INTERRUPTED = 130
BROKEN_PIPE = 141

MEANINGS: dict[int, str] = {
    OK: "It is done.",
    ERROR: "An error of no other kind: it was tried and did not work. Of several things, some did not.",
    USAGE: "The command line, or what it asks for, can never succeed as it stands.",
    NOT_FOUND: "There is no such machine, template or other object.",
    CONFLICT: "The object is not in a state that allows it: it runs, is busy, exists already, or is needed by another.",
    DENIED: "Not allowed: the caller has no right to it, or the machine is protected.",
    CANNOT: "This architecture, or this host, cannot do it.",
    UNAVAILABLE: "Something that is needed is not there now: the daemon, a program, disk, memory, addresses.",
    TIMED_OUT: "It did not happen in the stated time.",
    OWN_FAILURE: "exec, run and shell: Triarch itself failed, so that there is no exit code of the command's own.",
    INTERRUPTED: "Ctrl-C. Standard error says whether the operation was cancelled and undone, or goes on.",
    BROKEN_PIPE: "Whoever read the output has gone.",
}

# The first class that an error is an instance of decides.
_OF: tuple[tuple[type[Error], int], ...] = (
    (Invalid, USAGE),
    (NotFound, NOT_FOUND),
    (Conflict, CONFLICT),
    (Denied, DENIED),
    (Unsupported, CANNOT),
    (DriverUnavailable, CANNOT),
    (TimedOut, TIMED_OUT),
    (Unavailable, UNAVAILABLE),
    (Exhausted, UNAVAILABLE),
    (Cancelled, INTERRUPTED),
)


class OwnFailure(Exception):
    """Triarch's own failure in a command that otherwise exits with the code of what it ran."""

    def __init__(self, error: Error) -> None:
        super().__init__(error.message)
        self.error = error


def of(error: Error) -> int:
    """The exit code of a command that ends with this error."""
    return next((code for kind, code in _OF if isinstance(error, kind)), ERROR)
