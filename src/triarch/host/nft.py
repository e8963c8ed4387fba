"""nf_tables: our own tables, replaced as a whole in one transaction (nft(8))."""

from __future__ import annotations

import errno
import struct
from dataclasses import dataclass

import msgspec

from triarch.errors import CommandFailed
from triarch.host.netlink_wire import ACKNOWLEDGE, NetlinkSocket, attribute, attributes, translate
from triarch.host.process import run

_NETLINK_NETFILTER = 12
_GET_TABLE = (10 << 8) | 1  # NFNL_SUBSYS_NFTABLES, NFT_MSG_GETTABLE
_TABLE_NAME = 1
_GET_GENERATION = (10 << 8) | 16  # NFT_MSG_GETGEN
_GENERATION_ID = 1
_FAMILIES = {"inet": 1, "ip": 2, "bridge": 7}  # NFPROTO_*
_GENERIC = struct.Struct(">BBH")  # nfgenmsg: family, version, resource


@dataclass(frozen=True, slots=True)
class Table:
    """A table of ours: `chains` are all that it holds."""

    family: str
    name: str
    chains: str

    @property
    def text(self) -> str:
        return f"{_removal(self.family, self.name)}table {self.family} {self.name} {{\n{self.chains}}}\n"


def replace_tables(*tables: Table) -> None:
    """Make each of `tables` hold exactly its chains, all in one transaction (blocking).

    Raises `MissingProgram` without nft, `CommandFailed` when the kernel refuses.
    """
    run(["nft", "-f", "-"], input_bytes="".join(table.text for table in tables).encode())


def check_tables(*tables: Table) -> None:
    """As `replace_tables`, but the kernel only says whether it could (blocking)."""
    run(["nft", "--check", "-f", "-"], input_bytes="".join(table.text for table in tables).encode())


def delete_table(name: str, family: str = "inet") -> None:
    """Remove a table (blocking). Absent is success."""
    if table_exists(family, name):
        run(["nft", "-f", "-"], input_bytes=_removal(family, name).encode())


def listing(*tables: tuple[str, str]) -> str | None:
    """What tables (family, name) hold now, without counters and elements of sets (blocking); None if one is gone.

    It is the same text for as long as nobody changed a rule.
    """
    try:
        return "".join(
            run(["nft", "--stateless", "--terse", "list", "table", *table]).decode(errors="replace") for table in tables
        )
    except CommandFailed:
        return None


def generation() -> int:
    """A number that changes with every change of any nftables rule of this network namespace; 0 without nf_tables."""
    try:
        asked = NetlinkSocket(_NETLINK_NETFILTER)
        try:
            replies = asked.exchange(_GET_GENERATION, ACKNOWLEDGE, _GENERIC.pack(0, 0, 0))
        finally:
            asked.close()
    except OSError:
        return 0
    for reply in replies:
        found = dict(attributes(reply, _GENERIC.size)).get(_GENERATION_ID)
        if found is not None:
            return int.from_bytes(found, "big")
    return 0


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


def _removal(family: str, name: str) -> str:
    # Deleting what is not there would fail: it is declared first.
    return f"table {family} {name}\ndelete table {family} {name}\n"


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
