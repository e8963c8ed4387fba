"""Templates: immutable OS trees, content-addressed."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import datetime
from enum import StrEnum

import msgspec

from triarch.errors import Invalid
from triarch.model.names import check_template_name

_DIGEST = re.compile(r"[0-9a-f]{64}\Z")
_LEVEL = re.compile(r"[1-9][0-9]{0,5}\Z")


class Init(StrEnum):
    """What runs first in a machine: the template's own init, or one command as an OCI image says."""

    SYSTEM = "system"
    APP = "app"


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """One EROFS image. `digest` is the sha256 of the file, in lower-case hexadecimal; `size_bytes` its length."""

    digest: str
    size_bytes: int


class Template(msgspec.Struct, frozen=True, kw_only=True):
    """A named tree at one patch level.

    `digest` addresses the whole (sha256 over the layers' digests, lowest first; see `template_digest`).
    `command` is what an `app` machine runs when it is given nothing else. `cloud_init`: it carries cloud-init, which
    then does the first boot's work.
    """

    name: str
    level: int
    digest: str
    layers: tuple[Layer, ...]
    init: Init
    command: tuple[str, ...] = ()
    environment: dict[str, str] = {}
    os_name: str = ""
    cloud_init: bool = False
    created_at: datetime
    source: str = ""

    @property
    def ref(self) -> str:
        return f"{self.name}@{self.level}"

    @property
    def size_bytes(self) -> int:
        return sum(layer.size_bytes for layer in self.layers)


class TemplateRef(msgspec.Struct, frozen=True, kw_only=True):
    """What a machine stands on: the name and level for people, the digest for the truth."""

    name: str
    level: int
    digest: str

    def __str__(self) -> str:
        return f"{self.name}@{self.level}"


def template_digest(layers: Iterable[Layer]) -> str:
    """The address of a whole template: the sha256 over its layers' digests, lowest first, each ended by a newline."""
    # Slow to load, and no client needs it.
    import hashlib

    return hashlib.sha256("".join(f"{layer.digest}\n" for layer in layers).encode()).hexdigest()


def check_digest(digest: str) -> str:
    """Return `digest`, or raise `Invalid` when it is not 64 lower-case hexadecimal digits (it becomes a file name)."""
    if not _DIGEST.match(digest):
        raise Invalid(f"illegal digest {digest[:80]!r}: it needs 64 lower-case hexadecimal digits")
    return digest


def parse_template_name(text: str) -> tuple[str, int | None]:
    """Split `bookworm@3` into its name and level, `bookworm` into its name and None (the newest level)."""
    name, at, level = text.partition("@")
    check_template_name(name)
    if not at:
        return name, None
    if not _LEVEL.match(level):
        raise Invalid(f"illegal template level {level[:80]!r}: it needs a number from 1 to 999999", name=name)
    return name, int(level)
