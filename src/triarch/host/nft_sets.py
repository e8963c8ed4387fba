"""Elements of nftables sets, changed in one transaction without a process: a start of a machine changes a few.

Wire format: `linux/netfilter/nfnetlink.h`, `linux/netfilter/nf_tables.h`. A key is what the set's type says, each part
of it padded to four bytes; an interface name takes 16.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from triarch.host.netlink_wire import ACKNOWLEDGE, NetlinkSocket, attribute, translate

_NETLINK_NETFILTER, _SUBSYSTEM = 12, 10
_BATCH_BEGIN, _BATCH_END = 0x10, 0x11
_NEW_ELEMENTS, _DELETE_ELEMENTS = (_SUBSYSTEM << 8) | 12, (_SUBSYSTEM << 8) | 14
_CREATE = 0x400
_LIST_TABLE, _LIST_SET, _LIST_ELEMENTS, _ELEMENT, _KEY, _VALUE = 1, 2, 3, 1, 1, 1
_FAMILIES = {"inet": 1, "bridge": 7}
_INTERFACE_NAME_BYTES = 16
# One message of elements stays well below what the length of an attribute can say.
_ELEMENTS_IN_A_MESSAGE = 500

Keys = Mapping[str, Iterable[bytes]]


def key(interface: str, value: bytes = b"") -> bytes:
    """Of a set whose type is an interface name, or that and one more part."""
    return os.fsencode(interface).ljust(_INTERFACE_NAME_BYTES, b"\0") + value + bytes(-len(value) % 4)


def change_elements(family: str, table: str, added: Keys, removed: Keys) -> None:
    """Remove and add elements of sets (by name) of a table: all or nothing (blocking).

    Raises `NotFound` where table, set or element is missing, `Exists`, `Denied` or `Failed`.
    """
    generic = bytes((_FAMILIES[family], 0, 0, 0))
    messages = [
        (kind, flags, generic + _elements(table, name, keys))
        for kind, flags, sets in ((_DELETE_ELEMENTS, 0, removed), (_NEW_ELEMENTS, _CREATE, added))
        for name, every in sets.items()
        for keys in _portions(every)
    ]
    if not messages:
        return
    mark = bytes((0, 0, 0, _SUBSYSTEM))
    try:
        asked = NetlinkSocket(_NETLINK_NETFILTER)
        try:
            last = [(kind, flags | ACKNOWLEDGE, body) for kind, flags, body in messages]
            asked.transact([(_BATCH_BEGIN, 0, mark), *last, (_BATCH_END, 0, mark)])
        finally:
            asked.close()
    except OSError as error:
        raise translate(error, f"change the sets of nftables table '{family} {table}'") from error


def _portions(keys: Iterable[bytes]) -> Iterable[list[bytes]]:
    every = sorted(keys)
    for start in range(0, len(every), _ELEMENTS_IN_A_MESSAGE):
        yield every[start : start + _ELEMENTS_IN_A_MESSAGE]


def _elements(table: str, name: str, keys: list[bytes]) -> bytes:
    elements = b"".join(attribute(_ELEMENT, attribute(_KEY, attribute(_VALUE, value))) for value in keys)
    return (
        attribute(_LIST_TABLE, table.encode() + b"\0")
        + attribute(_LIST_SET, name.encode() + b"\0")
        + attribute(_LIST_ELEMENTS, elements)
    )
