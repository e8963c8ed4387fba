"""Every exception that Triarch raises on purpose.

    Error                     code, HTTP status, retryable, optional hint
    ├── Invalid          400  the request can never succeed as it stands
    ├── Denied           403  the caller may not do this
    ├── NotFound         404  the named object does not exist
    ├── Conflict         409  the object is not in a state that allows this
    │   ├── Exists            the name is taken
    │   ├── WrongState        the verb needs another state
    │   ├── Busy              another operation holds the object
    │   ├── InUse             something still needs the object
    │   └── Stale             it changed since the caller read it
    ├── Unsupported      422  this architecture or host cannot do it
    ├── Failed           500  it was tried and did not work
    │   ├── CommandFailed     a program ended with a non-zero code
    │   ├── Damaged           stored bytes are not what they were
    │   ├── MachineFailed     a machine did not start or ended by itself
    │   └── Cancelled         the operation was cancelled and undone
    ├── Unavailable      503  something that is needed is not there now
    │   ├── MissingProgram    a program is not installed
    │   ├── DriverUnavailable an architecture cannot run on this host
    │   └── DaemonUnavailable the daemon does not answer
    ├── TimedOut         504  it did not happen in the stated time
    └── Exhausted        507  disk, memory, addresses or ids ran out

A message is one line in lower case: it names the object, what is, and what was needed.
A hint is the exact next command.
"""

from __future__ import annotations

from collections.abc import Sequence


class Error(Exception):
    """The root. `code` is stable and part of the API; `fields` are the typed facts behind the message."""

    code = "error"
    status = 500
    retryable = False

    def __init__(self, message: str, *, hint: str | None = None, **fields: str | int | None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.fields = fields


class Invalid(Error):
    """The request can never succeed as it stands."""

    code, status = "invalid", 400


class Denied(Error):
    """The caller, or this daemon's own rights, do not allow it."""

    code, status = "denied", 403


class NotFound(Error):
    """The named object does not exist."""

    code, status = "not-found", 404


class Conflict(Error):
    """The object is not in a state that allows this."""

    code, status = "conflict", 409


class Exists(Conflict):
    """The name is taken."""

    code = "exists"


class WrongState(Conflict):
    """The verb needs another state."""

    code = "wrong-state"


class Busy(Conflict):
    """Another operation holds the object; its id is in `fields["operation"]`."""

    code, retryable = "busy", True


class InUse(Conflict):
    """Something still needs the object."""

    code = "in-use"


class Stale(Conflict):
    """The object changed since the caller read it."""

    code, retryable = "stale", True


class Unsupported(Error):
    """This architecture or this host cannot do it."""

    code, status = "unsupported", 422


class Failed(Error):
    """It was tried and did not work."""

    code, status = "failed", 500


class CommandFailed(Failed):
    """A program ended with a non-zero code. Keeps argv, the code and the end of its standard error."""

    code = "command-failed"

    def __init__(self, argv: Sequence[str], returncode: int, stderr_tail: str) -> None:
        self.argv = tuple(argv)
        self.returncode = returncode
        self.stderr_tail = stderr_tail.strip()
        how = f"exit code {returncode}" if returncode >= 0 else f"signal {-returncode}"
        lines = self.stderr_tail.splitlines()
        super().__init__(
            f"{self.argv[0]} failed ({how}){': ' + lines[-1].strip() if lines else ''}",
            program=self.argv[0],
            returncode=returncode,
        )


class Damaged(Failed):
    """Stored bytes are not what they were when they were written."""

    code = "damaged"


class MachineFailed(Failed):
    """A machine did not start, or ended by itself."""

    code = "machine-failed"


class Cancelled(Failed):
    """The operation was cancelled and undone."""

    code = "cancelled"


class Unavailable(Error):
    """Something that is needed is not there now."""

    code, status, retryable = "unavailable", 503, True


class MissingProgram(Unavailable):
    """A program is not installed; names the Debian package that brings it."""

    code = "missing-program"

    def __init__(self, program: str, package: str) -> None:
        super().__init__(
            f"the program '{program}' is not installed",
            hint=f"apt-get install {package}",
            program=program,
            package=package,
        )


class DriverUnavailable(Unavailable):
    """An architecture cannot run on this host; the message is the reason."""

    code, retryable = "driver-unavailable", False


class DaemonUnavailable(Unavailable):
    """The daemon does not answer on its socket."""

    code = "daemon-unavailable"


class TimedOut(Error):
    """It did not happen in the stated time."""

    code, status, retryable = "timed-out", 504, True


class Exhausted(Error):
    """Disk, memory, addresses or ids ran out."""

    code, status = "exhausted", 507
