"""Machines: a template, a delta, and everything else a person chose."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

import msgspec

from triarch.model.device import Device, Hardware
from triarch.model.network import DEFAULT_NETWORK, Forward, Nic
from triarch.model.policy import FirstBoot, Health, HealthCheck, RestartPolicy, SnapshotSchedule
from triarch.model.resources import Resources
from triarch.model.settings import Origin, Settings
from triarch.model.state import State
from triarch.model.template import Init, TemplateRef


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
    from it. `desired` is what the operator last asked for, or stopped once a run has ended for good. `restarts` counts
    the starts since then that nobody asked for. `ephemeral` machines are deleted when they stop.

    `profiles` and `own` are what people said; the fields from `environment` to `first_boot` are what follows from both
    (`engine.settings.materialize`), and all that a driver reads. `nics` are those of its devices of kind `nic`, by
    name.
    `running_resources` are the limits of the present run where they are not `resources`, which hold from the next start
    on. `first_booted`: the first boot's work is done. `restored` names the restore that brought its disks, if any did.
    """

    name: str
    uuid: str
    index: int
    template: TemplateRef
    architecture: str
    init: Init
    command: tuple[str, ...] = ()
    profiles: tuple[str, ...] = ()
    own: Settings = Settings()
    environment: dict[str, str] = {}
    labels: dict[str, str] = {}
    description: str = ""
    resources: Resources = Resources()
    running_resources: Resources | None = None
    network: str = DEFAULT_NETWORK
    nic: Nic | None = None
    aliases: tuple[str, ...] = ()
    forwards: tuple[Forward, ...] = ()
    hardware: Hardware = Hardware.PARAVIRT
    devices: dict[str, Device] = {}
    nics: dict[str, Nic] = {}
    restart: RestartPolicy = RestartPolicy.NO
    health: HealthCheck | None = None
    stop_timeout_seconds: float = 60.0
    autostart: bool = False
    depends_on: tuple[str, ...] = ()
    protected: bool = False
    snapshots: SnapshotSchedule | None = None
    first_boot: FirstBoot | None = None
    first_booted: bool = False
    restored: str = ""
    ids: IdRange
    state: State = State.STOPPED
    desired: State = State.STOPPED
    restarts: int = 0
    last_exit: Exit | None = None
    ephemeral: bool = False
    created_at: datetime
    started_at: datetime | None = None


class CreateMachine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a person asks for. Whatever is None or not set is chosen by the profiles, in order, or by the engine.

    `template` is `NAME` or `NAME@LEVEL`; `start` starts the machine too (that is `launch`).
    """

    template: str
    name: str | None = None
    architecture: str | None = None
    init: Init | None = None
    command: tuple[str, ...] = ()
    profiles: tuple[str, ...] = ()
    settings: Settings = Settings()
    ephemeral: bool = False
    start: bool = False


class MachineView(msgspec.Struct, frozen=True, kw_only=True):
    """A machine as lists and `info` show it: the record, and the operation that is changing it now, if any.

    `next_start_at` is there while a machine that ended waits for its next start.
    `health` is there while a machine with a health check runs. `own` and `origins` say what was set, and where.
    """

    name: str
    uuid: str
    state: State
    desired: State
    health: Health | None = None
    architecture: str
    template: TemplateRef
    init: Init
    address: str | None
    address6: str | None = None
    mac: str | None
    resources: Resources
    network: str
    nics: dict[str, Nic] = {}
    aliases: tuple[str, ...] = ()
    forwards: tuple[Forward, ...] = ()
    hardware: Hardware = Hardware.PARAVIRT
    devices: dict[str, Device] = {}
    command: tuple[str, ...]
    labels: dict[str, str] = {}
    description: str = ""
    profiles: tuple[str, ...] = ()
    own: Settings = Settings()
    origins: tuple[Origin, ...] = ()
    restart: RestartPolicy = RestartPolicy.NO
    autostart: bool = False
    depends_on: tuple[str, ...] = ()
    protected: bool = False
    ephemeral: bool
    snapshot_count: int = 0
    restarts: int = 0
    next_start_at: datetime | None = None
    last_exit: Exit | None
    created_at: datetime
    started_at: datetime | None
    operation: str | None
    etag: str


Seconds = Annotated[float, msgspec.Meta(ge=0, le=86400)]


class StopMachine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of stop and restart. A graceful stop that takes longer is `TimedOut` unless `force` then kills.

    Without a timeout the machine's own counts.
    """

    timeout_seconds: Seconds | None = None
    force: bool = False


class RenameMachine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of rename."""

    name: str


class SwitchMachine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of switch. `check` only says whether it would be possible."""

    architecture: str
    check: bool = False
    timeout_seconds: Seconds = 60.0


class SetMachine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of set: keys to forget, after which profiles count again, and settings to take over.

    `values` are settings as people write them (`memory`: `2G`, `label.role`: `web`), `unset` their keys. One key of a
    group (`health.interval`) changes the group as it is with the profiles. `profiles` replaces the list of profiles
    where it is given. `check` changes nothing.
    """

    settings: Settings = Settings()
    values: dict[str, str] = {}
    unset: tuple[str, ...] = ()
    profiles: tuple[str, ...] | None = None
    check: bool = False


class SettingChange(msgspec.Struct, frozen=True, kw_only=True):
    """A setting of a machine before and after, as people write it; None where it is not set.

    `live`: it holds at once and not only from the next start on.
    """

    key: str
    old: str | None
    new: str | None
    live: bool
