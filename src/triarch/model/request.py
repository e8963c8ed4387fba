"""Bodies of requests about templates, and what `doctor` answers."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from triarch.model.template import Init


class BuildTemplate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Build a Debian tree with mmdebstrap. `packages` come on top of what a system machine needs."""

    name: str
    suite: str = "bookworm"
    packages: tuple[str, ...] = ()
    mirror: str | None = None
    init: Init = Init.SYSTEM


class CheckStatus(StrEnum):
    PASS = "pass"
    WARN = "warn"
    FAIL = "fail"


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One line of `doctor`: what was tried, what came of it, and the command or setting that mends it.

    `needed_for` names the architecture or part that is lost without it.
    """

    name: str
    status: CheckStatus
    detail: str
    fix: str | None = None
    needed_for: str = ""
