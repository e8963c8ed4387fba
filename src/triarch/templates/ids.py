"""System users: which ids a template's may have, and which a machine gives to its own.

    0 … 99       fixed by the distribution
    100 … 499    the template's: dynamic users and groups of its packages, at every patch level
    500 … 999    the machine's: what its own packages and its administrator add

A machine's delta outlives many levels of its template. If both drew from 100 … 999, as Debian does, a user that a later
level brings would sooner or later have the id of another one that the machine made. So a built tree is renumbered into
its range (postinst scripts offer no hook for that: adduser counts up from 100, systemd-sysusers and useradd down from
999, and sysusers ignores every configuration when it is given a file), and adduser, useradd and sysusers inside a
machine are told theirs. Users that an imported archive brings keep their ids: files elsewhere may know them.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable

from triarch.errors import Invalid
from triarch.templates.tree import Kind, Node, Tree

TEMPLATE_IDS = range(100, 500)
MACHINE_IDS = range(500, 1000)

Read = Callable[[Node], bytes]

_ACL_NAMES = (b"system.posix_acl_access", b"system.posix_acl_default")
# linux/posix_acl_xattr.h: a version, then (tag, permissions, id); only these two tags name an id.
_ACL_ENTRY = struct.Struct("<HHI")
_ACL_USER, _ACL_GROUP = 0x02, 0x08


def file_at(tree: Tree, path: str) -> Node | None:
    """The regular file that a path means inside the tree, or None."""
    node = tree.find(path)
    return node if node is not None and node.kind is Kind.FILE else None


def reserve_machine_ids(tree: Tree, read: Read) -> None:
    """Tell adduser, useradd and systemd-sysusers inside a machine to take ids of the machine's range."""
    first, last = MACHINE_IDS[0], MACHINE_IDS[-1]
    _set(tree, read, "etc/adduser.conf", "=", ("FIRST_SYSTEM_UID", "LAST_SYSTEM_UID"))
    _set(tree, read, "etc/adduser.conf", "=", ("FIRST_SYSTEM_GID", "LAST_SYSTEM_GID"))
    _set(tree, read, "etc/login.defs", " ", ("SYS_UID_MIN", "SYS_UID_MAX"))
    _set(tree, read, "etc/login.defs", " ", ("SYS_GID_MIN", "SYS_GID_MAX"))
    if tree.find("usr/lib/sysusers.d") is not None:
        tree.put("etc/sysusers.d/triarch.conf", f"r - {first}-{last}\n".encode())


def _set(tree: Tree, read: Read, path: str, separator: str, keys: tuple[str, str]) -> None:
    """Give `keys` the bounds of the machine's range in a file of settings, where there is such a file."""
    node = file_at(tree, path)
    if node is None:
        return
    text = read(node)
    for key, value in zip(keys, (MACHINE_IDS[0], MACHINE_IDS[-1]), strict=True):
        text = re.sub(rb"(?m)^[ \t]*" + key.encode() + rb"[ \t=].*\n?", b"", text)
        text = (text if text.endswith(b"\n") else text + b"\n") + f"{key}{separator}{value}\n".encode()
    node.content = text


def renumber_system_ids(tree: Tree, read: Read) -> dict[int, int]:
    """Move the dynamic users and groups of a built tree into the template's range; returns old id -> new id.

    One map serves users and groups, so that a user and its own group keep equal ids. It covers passwd, group, every
    owner and every POSIX ACL. Raises `Invalid` when the range is too small.
    """
    passwd, group = file_at(tree, "etc/passwd"), file_at(tree, "etc/group")
    if passwd is None or group is None:
        return {}
    accounts = [line.split(b":") for line in read(passwd).split(b"\n")]
    groups = [line.split(b":") for line in read(group).split(b"\n")]
    used = {int(n) for line in accounts for n in line[2:4] if n.isdigit()} | {
        int(line[2]) for line in groups if len(line) > 2 and line[2].isdigit()
    }
    moving = sorted(used & set(MACHINE_IDS))
    free = [number for number in TEMPLATE_IDS if number not in used]
    if len(moving) > len(free):
        raise Invalid(
            f"the tree has {len(moving)} system ids too many: {TEMPLATE_IDS[0]} … {TEMPLATE_IDS[-1]} are full"
        )
    moved = dict(zip(moving, free, strict=False))
    passwd.content = _replace(accounts, (2, 3), moved)
    group.content = _replace(groups, (2,), moved)
    for _, node in tree.walk():
        node.uid, node.gid = moved.get(node.uid, node.uid), moved.get(node.gid, node.gid)
        for name in _ACL_NAMES:
            if name in node.xattrs:
                node.xattrs = node.xattrs | {name: _renumber_acl(node.xattrs[name], moved)}
    return moved


def _replace(lines: list[list[bytes]], columns: tuple[int, ...], moved: dict[int, int]) -> bytes:
    for line in lines:
        for column in columns:
            if len(line) > column and line[column].isdigit():
                line[column] = str(moved.get(int(line[column]), int(line[column]))).encode()
    return b"\n".join(b":".join(line) for line in lines)


def _renumber_acl(value: bytes, moved: dict[int, int]) -> bytes:
    head, body = value[:4], value[4:]
    if len(body) % _ACL_ENTRY.size:
        return value
    entries = [
        (tag, permissions, moved.get(number, number) if tag in (_ACL_USER, _ACL_GROUP) else number)
        for tag, permissions, number in _ACL_ENTRY.iter_unpack(body)
    ]
    return head + b"".join(_ACL_ENTRY.pack(*entry) for entry in entries)
