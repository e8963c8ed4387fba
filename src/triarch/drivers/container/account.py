"""Whom a command in a container runs as, and what a login shell is there."""

from __future__ import annotations

import asyncio
from pathlib import PurePosixPath

import msgspec

from triarch.host.inside import directory_inside, program_inside, read_inside
from triarch.host.pidfd import ProcessId
from triarch.model.account import (
    FALLBACK_SHELL,
    GROUP,
    MAX_ACCOUNT_FILE_BYTES,
    PASSWD,
    Account,
    NoSuchUser,
    find_account,
    parse_user,
)
from triarch.model.driver import ExecRequest, MachineSpec

# Shells that can put another name before a program (`exec -a`); busybox too, whatever it is called.
_RENAMING_SHELLS = frozenset({"ash", "bash", "busybox", "ksh93", "mksh", "zsh"})
# A file that the machine's own kernel services hold up must not hold the daemon up for ever.
_READ_SECONDS = 10.0


async def look_up(first: ProcessId, spec: MachineSpec, request: ExecRequest) -> tuple[Account, ExecRequest]:
    """The account that `request` wants, and the request with its command and directory filled in.

    `first` is the machine's first process. Raises `NoSuchUser`, and `Invalid` for an illegal user.
    """
    try:
        async with asyncio.timeout(_READ_SECONDS):
            return await asyncio.to_thread(_look_up, first, spec, request)
    except (TimeoutError, ProcessLookupError) as error:
        raise NoSuchUser(f"{PASSWD} cannot be read") from error


def _look_up(first: ProcessId, spec: MachineSpec, request: ExecRequest) -> tuple[Account, ExecRequest]:
    passwd = read_inside(first, PASSWD, MAX_ACCOUNT_FILE_BYTES)
    account = find_account(parse_user(request.user), passwd, read_inside(first, GROUP, MAX_ACCOUNT_FILE_BYTES))
    count = spec.machine.ids.count
    if max(account.uid, account.gid) >= count:
        raise NoSuchUser(f"user '{request.user}' is {account.uid}:{account.gid}; a container has ids below {count}")
    account = msgspec.structs.replace(account, groups=tuple(gid for gid in account.groups if gid < count))
    if not request.login:
        return account, request
    program = program_inside(first, account.shell)
    if program is None:
        program = program_inside(first, FALLBACK_SHELL) or ""
        account = msgspec.structs.replace(account, shell=FALLBACK_SHELL)
    home = account.home if directory_inside(first, account.home) else "/"
    return account, msgspec.structs.replace(
        request, command=login_command(account.shell, program), directory=request.directory or home
    )


def login_command(shell: str, program: str) -> tuple[str, ...]:
    """The argv of a login shell: under the name `-NAME` where `program`, which it really is, can do that, else `-l`.

    crun looks for a program under the very name that it passes to it.
    """
    if program in _RENAMING_SHELLS:
        return (shell, "-c", 'exec -a "$0" "$1"', f"-{PurePosixPath(shell).name}", shell)
    return (shell, "-l")
