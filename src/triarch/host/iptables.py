"""Letting our traffic through a host's own iptables filter (Docker and ufw set its policy to DROP).

An accept in one nftables table does not overrule a drop in another, so the rules must stand in the host's own chains.
iptables is asked only where it is in use, and marked rules are all that is ever removed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from triarch.errors import CommandFailed, MissingProgram
from triarch.host.nft import table_exists
from triarch.host.process import run

_LEGACY_TABLES = Path("/proc/net/ip_tables_names")
_CHAINS = ("FORWARD", "INPUT")


def in_use() -> bool:
    """Whether an iptables filter table exists, of either implementation."""
    try:
        legacy = "filter" in _LEGACY_TABLES.read_text().split()
    except OSError:
        legacy = False
    return legacy or table_exists("ip", "filter")


def dropping_chains() -> tuple[str, ...]:
    """Those of FORWARD and INPUT whose policy is DROP (blocking); none where iptables is not in use."""
    try:
        return tuple(chain for chain in _CHAINS if in_use() and f"-P {chain} DROP" in _list_rules(chain))
    except MissingProgram:
        return ()


def allow(mark: str, rules: Sequence[tuple[str, ...]]) -> None:
    """Put `rules` (chain, then matches) before all others as ACCEPTs that carry `mark`; earlier ones are replaced.

    Only chains whose policy is DROP get any (blocking).
    """
    remove(mark)
    dropping = dropping_chains()
    for chain, *matches in reversed(rules):
        if chain in dropping:
            run(["iptables", "-w", "-I", chain, *matches, "-m", "comment", "--comment", mark, "-j", "ACCEPT"])


def remove(mark: str) -> None:
    """Remove every rule that carries `mark` (blocking). None, or no iptables, is success."""
    if not in_use():
        return
    for chain in _CHAINS:
        try:
            rules = _list_rules(chain)
        except (MissingProgram, CommandFailed):
            continue
        for rule in rules:
            words = rule.split()
            if words[:1] == ["-A"] and _carries(words, mark):
                run(["iptables", "-w", "-D", *words[1:]])


def _carries(words: Sequence[str], mark: str) -> bool:
    return any(pair == ("--comment", mark) for pair in pairwise(words))


def _list_rules(chain: str) -> list[str]:
    return run(["iptables", "-w", "-S", chain]).decode(errors="replace").splitlines()
