"""Names: one rule for machines, one for templates, checked at every border."""

from __future__ import annotations

import re
from collections.abc import Sequence

from triarch.errors import Invalid

MACHINE_NAME_PATTERN = r"^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$"
TEMPLATE_NAME_PATTERN = r"^[a-z]([a-z0-9.-]{0,61}[a-z0-9])?$"

MAX_NETWORK_NAME = 32

_MACHINE = re.compile(MACHINE_NAME_PATTERN[:-1] + r"\Z")
_TEMPLATE = re.compile(TEMPLATE_NAME_PATTERN[:-1] + r"\Z")

MACHINE_NAME_RULE = (
    "1 to 63 characters, lower-case letters, digits and '-', first a letter, last a letter or digit (it is a DNS label)"
)
TEMPLATE_NAME_RULE = (
    "1 to 63 characters, lower-case letters, digits, '-' and '.', first a letter, last a letter or digit"
)


def check_machine_name(name: str) -> str:
    """Return `name`, or raise `Invalid` that states the rule (RFC 1123 label that starts with a letter)."""
    if not _MACHINE.match(name):
        raise Invalid(f"illegal machine name {name[:80]!r}: it needs {MACHINE_NAME_RULE}", name=name[:80])
    return name


def check_template_name(name: str) -> str:
    """Return `name`, or raise `Invalid` that states the rule."""
    if not _TEMPLATE.match(name) or ".." in name:
        raise Invalid(f"illegal template name {name[:80]!r}: it needs {TEMPLATE_NAME_RULE}", name=name[:80])
    return name


def check_network_name(name: str) -> str:
    """Return `name`, or raise `Invalid` that states the rule: as for machines, and at most 32 characters."""
    if not _MACHINE.match(name) or len(name) > MAX_NETWORK_NAME:
        rule = MACHINE_NAME_RULE.replace("63", str(MAX_NETWORK_NAME))
        raise Invalid(f"illegal network name {name[:80]!r}: it needs {rule}", name=name[:80])
    return name


def some_of(names: Sequence[str]) -> str:
    """Names as an error message shows them: the first five, and whether there are more."""
    return ", ".join(f"'{name}'" for name in names[:5]) + (" …" if len(names) > 5 else "")
