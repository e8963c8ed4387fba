"""Users of a machine, as its own passwd(5) and group(5) tell of them.

What a machine's files say is hostile input: a line that is not whole counts for nothing, and nothing in them means
anything outside the machine. `guest/init/account.c` is the same page for VMs.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from triarch.errors import Invalid

PASSWD, GROUP = "/etc/passwd", "/etc/group"
# More of a file is not read: some 10,000 users.
MAX_ACCOUNT_FILE_BYTES = 1 << 20
FALLBACK_SHELL = "/bin/sh"
_MAX_ID = (1 << 32) - 2  # the last number means "no change" to the kernel
_MAX_NAME_CHARACTERS = 256


class UserWanted(msgspec.Struct, frozen=True, kw_only=True):
    """`NAME|UID[:GROUP|GID]` taken apart. What is a number is one, whatever the machine's files call by it."""

    user: str
    group: str | None = None


class Account(msgspec.Struct, frozen=True, kw_only=True):
    """Who a command runs as. `groups` are the supplementary ones."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    name: str = ""
    home: str = "/"
    shell: str = FALLBACK_SHELL

    @property
    def environment(self) -> dict[str, str]:
        """What login(1) sets."""
        names = {"USER": self.name, "LOGNAME": self.name} if self.name else {}
        return {"HOME": self.home, "SHELL": self.shell, **names}


class NoSuchUser(Exception):
    """The machine's files know no such user or group; the message is one line for people."""


def parse_user(text: str) -> UserWanted:
    """Raises `Invalid`."""
    user, colon, group = text.partition(":")
    words = (user, group) if colon else (user,)
    for word in words:
        strange = any(not c.isprintable() or c in ":/ " for c in word)
        if not word or strange or len(word) > _MAX_NAME_CHARACTERS or (_is_number(word) and int(word) > _MAX_ID):
            raise Invalid(f"illegal user {text[:80]!r}: it needs NAME or UID, or two of them as USER:GROUP")
    return UserWanted(user=user, group=group if colon else None)


def find_account(wanted: UserWanted, passwd: bytes, group: bytes) -> Account:
    """The account that the files' contents make of `wanted`. Raises `NoSuchUser`.

    A number needs no entry: its group is then the same number, its home `/` (root's `/root`). With a group asked for,
    there are no supplementary ones.
    """
    entry = _user(wanted.user, passwd)
    if wanted.group is not None:
        return msgspec.structs.replace(entry, gid=_group_id(wanted.group, group))
    groups = dict.fromkeys(gid for _, gid, members in _groups(group) if entry.name and entry.name in members)
    return msgspec.structs.replace(entry, groups=tuple(gid for gid in groups if gid != entry.gid))


def _user(wanted: str, passwd: bytes) -> Account:
    number = int(wanted) if _is_number(wanted) else None
    for entry in _users(passwd):
        if entry.uid == number or (number is None and entry.name == wanted):
            return entry
    if number is None:
        raise NoSuchUser(f"there is no user '{wanted}' in {PASSWD}")
    return Account(uid=number, gid=number, home="/" if number else "/root")


def _group_id(wanted: str, group: bytes) -> int:
    if _is_number(wanted):
        return int(wanted)
    for name, gid, _ in _groups(group):
        if name == wanted:
            return gid
    raise NoSuchUser(f"there is no group '{wanted}' in {GROUP}")


def _users(passwd: bytes) -> Iterator[Account]:
    for line in passwd.split(b"\n"):
        name, _, uid, gid, _, home, shell = _fields(line, 7)
        if name and _is_id(uid) and _is_id(gid):
            yield Account(
                uid=int(uid),
                gid=int(gid),
                name=name,
                home=home if home.startswith("/") else "/",
                shell=shell if shell.startswith("/") else FALLBACK_SHELL,
            )


def _groups(group: bytes) -> Iterator[tuple[str, int, list[str]]]:
    for line in group.split(b"\n"):
        name, _, gid, members = _fields(line, 4)
        if name and _is_id(gid):
            yield name, int(gid), members.split(",")


def _fields(line: bytes, count: int) -> list[str]:
    """As many fields as there must be; all of them empty where the line has others, or a NUL in it."""
    fields = line.decode(errors="replace").split(":")
    return fields if len(fields) == count and b"\0" not in line else [""] * count


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdigit() and len(word) <= 20


def _is_id(word: str) -> bool:
    return _is_number(word) and int(word) <= _MAX_ID
