"""Machines: a template, a delta, and everything else a person chose."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

import msgspec

from triarch.model.network import Forward, Nic
from triarch.model.resources import Resources
from triarch.model.state import State
from triarch.model.template import Init, TemplateRef

NetworkMode = Literal["nat", "user", "none"]


class IdRange(msgspec.Struct, frozen=True, kw_only=True):
    """Host user and group ids that ids 0 … count-1 of a container stand for. On disk nothing is shifted."""

    base: int
    count: int = 65536


class Exit(msgspec.Struct, frozen=True, kw_only=True):
    """How a machine's last run ended. `code` is the exit code, 128 + N after signal N, None when nobody knows."""

    code: int | None
    reason: str = ""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """The stored record of one machine.

    `index` is its slot in the instance, from 1, never shared by two machines: ids, address and interface names follow
    from it. `desired` is what the operator last asked for. `ephemeral` machines are deleted when they stop.
    """

    name: str
    uuid: str
    index: int
    template: TemplateRef
    architecture: str
    init: Init
    command: tuple[str, ...] = ()
    environment: dict[str, str] = {}
    resources: Resources = Resources()
    network: NetworkMode = "nat"
    nic: Nic | None = None
    forwards: tuple[Forward, ...] = ()
    ids: IdRange
    state: State = State.STOPPED
    desired: State = State.STOPPED
    last_exit: Exit | None = None
    ephemeral: bool = False
    created_at: datetime
    started_at: datetime | None = None


class CreateMachine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a person asks for. Whatever is None is chosen by the engine.

    `template` is `NAME` or `NAME@LEVEL`; `start` starts the machine too (that is `launch`).
    """

    template: str
    name: str | None = None
    architecture: str | None = None
    init: Init | None = None
    command: tuple[str, ...] = ()
    environment: dict[str, str] = {}
    resources: Resources = Resources()
    network: NetworkMode | None = None
    forwards: tuple[Forward, ...] = ()
    ephemeral: bool = False
    start: bool = False


class MachineView(msgspec.Struct, frozen=True, kw_only=True):
    """A machine as lists and `info` show it: the record, and the operation that is changing it now, if any."""

    name: str
    uuid: str
    state: State
    desired: State
    architecture: str
    template: TemplateRef
    init: Init
    address: str | None
    mac: str | None
    resources: Resources
    network: NetworkMode
    command: tuple[str, ...]
    ephemeral: bool
    last_exit: Exit | None
    created_at: datetime
    started_at: datetime | None
    operation: str | None
    etag: str


Seconds = Annotated[float, msgspec.Meta(ge=0, le=86400)]


class StopMachine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of stop and restart. A graceful stop that takes longer is `TimedOut` unless `force` then kills."""

    timeout_seconds: Seconds = 60.0
    force: bool = False


class RenameMachine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of rename."""

    name: str


class SwitchMachine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of switch. `check` only says whether it would be possible."""

    architecture: str
    check: bool = False
    timeout_seconds: Seconds = 60.0
