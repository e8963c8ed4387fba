"""nf_tables: our own tables, replaced as a whole in one transaction (nft(8))."""

from __future__ import annotations

import errno
import struct

import msgspec

from triarch.host.netlink_wire import ACKNOWLEDGE, NetlinkSocket, attribute, translate
from triarch.host.process import run

_NETLINK_NETFILTER = 12
_GET_TABLE = (10 << 8) | 1  # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETTABLE
_TABLE_NAME = 1
_FAMILIES = {"inet": 1, "ip": 2}  # NFPROTO_*
_GENERIC = struct.Struct(">BBH")  # nfgenmsg: family, version, resource


def replace_table(name: str, chains: str) -> None:
    """Make the table `inet NAME` hold exactly `chains`, in one transaction (blocking).

    Raises `MissingProgram` without nft, `CommandFailed` when the kernel refuses.
    """
    run(["nft", "-f", "-"], input_bytes=_replacement(name, chains))


def check_table(name: str, chains: str) -> None:
    """As `replace_table`, but the kernel only says whether it could (blocking)."""
    run(["nft", "--check", "-f", "-"], input_bytes=_replacement(name, chains))


def delete_table(name: str) -> None:
    """Remove the table `inet NAME` (blocking). Absent is success."""
    if table_exists("inet", name):
        run(["nft", "-f", "-"], input_bytes=_removal(name).encode())


def table_exists(family: str, name: str) -> bool:
    """Ask the kernel, without a process: a start of a machine asks each time. False too where there is no nf_tables.

    Raises `Denied` without the right to ask.
    """
    body = _GENERIC.pack(_FAMILIES[family], 0, 0) + attribute(_TABLE_NAME, name.encode() + b"\0")
    try:
        asked = NetlinkSocket(_NETLINK_NETFILTER)
        try:
            asked.exchange(_GET_TABLE, ACKNOWLEDGE, body)
        finally:
            asked.close()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.EPROTONOSUPPORT, errno.EINVAL):
            return False
        raise translate(error, f"look up nftables table '{family} {name}'") from error
    return True


def _replacement(name: str, chains: str) -> bytes:
    return f"{_removal(name)}table inet {name} {{\n{chains}}}\n".encode()


def _removal(name: str) -> str:
    # Deleting what is not there would fail: it is declared first.
    return f"table inet {name}\ndelete table inet {name}\n"


def foreign_tables_that_drop(own_prefix: str) -> tuple[str, ...]:
    """Tables of others that drop forwarded or incoming packets unless one of their rules accepts (blocking).

    An accept of ours does not overrule them. firewalld's counts too, which rejects by rules. Raises `MissingProgram`
    or `CommandFailed`.
    """
    found: dict[str, None] = {}
    for item in msgspec.json.decode(run(["nft", "-j", "list", "chains"]), type=_Listing).nftables:
        chain = item.chain
        if chain is None or chain.hook not in ("forward", "input") or chain.table.startswith(own_prefix):
            continue
        if chain.policy == "drop" or chain.table == "firewalld":
            found[f"{chain.family} {chain.table}"] = None
    return tuple(found)


class _Chain(msgspec.Struct, frozen=True):
    family: str
    table: str
    hook: str = ""
    policy: str = ""


class _Item(msgspec.Struct, frozen=True):
    chain: _Chain | None = None


class _Listing(msgspec.Struct, frozen=True):
    nftables: list[_Item]
