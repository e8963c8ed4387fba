"""Settings: what a person may say of a machine, in profiles or of the machine itself, and how layers add up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import UNSET, UnsetType

from triarch.model.device import Device, DeviceName, Hardware
from triarch.model.network import Forward, IPv4Text, IPv6Text
from triarch.model.policy import FirstBoot, HealthCheck, RestartPolicy, SnapshotSchedule
from triarch.model.resources import (
    Cpus,
    CpuSet,
    CpuWeight,
    DiskBytes,
    IoWeight,
    MemoryBytes,
    Pids,
    RateBytesPerSecond,
    Resources,
    SwapBytes,
)

LABEL_PATTERN = r"^[a-z0-9]([a-z0-9._/-]{0,61}[a-z0-9])?$(?!\n)"
LabelName = Annotated[str, msgspec.Meta(pattern=LABEL_PATTERN)]
LabelValue = Annotated[str, msgspec.Meta(max_length=255, pattern=r"^[^\x00-\x1f\x7f]*$(?!\n)")]
StopSeconds = Annotated[float, msgspec.Meta(ge=0, le=86_400)]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Every setting is UNSET (absent in JSON) where nothing is said of it; None says: no limit, no check, none.

    Layers add up in order: a later one wins key by key; `environment`, `labels` and `devices` add up name by name.
    """

    cpus: Cpus | UnsetType | None = UNSET
    cpu_weight: CpuWeight | UnsetType | None = UNSET
    cpu_set: CpuSet | UnsetType | None = UNSET
    memory_bytes: MemoryBytes | UnsetType | None = UNSET
    swap_bytes: SwapBytes | UnsetType | None = UNSET
    pids: Pids | UnsetType | None = UNSET
    io_weight: IoWeight | UnsetType | None = UNSET
    io_read_bytes_per_second: RateBytesPerSecond | UnsetType | None = UNSET
    io_write_bytes_per_second: RateBytesPerSecond | UnsetType | None = UNSET
    network_receive_bytes_per_second: RateBytesPerSecond | UnsetType | None = UNSET
    network_send_bytes_per_second: RateBytesPerSecond | UnsetType | None = UNSET
    disk_bytes: DiskBytes | UnsetType = UNSET
    environment: dict[str, str] | UnsetType = UNSET
    labels: dict[LabelName, LabelValue] | UnsetType = UNSET
    description: Annotated[str, msgspec.Meta(max_length=1000)] | UnsetType = UNSET
    network: str | UnsetType = UNSET
    address: IPv4Text | UnsetType | None = UNSET
    address6: IPv6Text | UnsetType | None = UNSET
    aliases: tuple[str, ...] | UnsetType = UNSET
    forwards: tuple[Forward, ...] | UnsetType = UNSET
    hardware: Hardware | UnsetType = UNSET
    devices: dict[DeviceName, Device] | UnsetType = UNSET
    restart: RestartPolicy | UnsetType = UNSET
    health: HealthCheck | UnsetType | None = UNSET
    stop_timeout_seconds: StopSeconds | UnsetType = UNSET
    autostart: bool | UnsetType = UNSET
    depends_on: tuple[str, ...] | UnsetType = UNSET
    protected: bool | UnsetType = UNSET
    snapshots: SnapshotSchedule | UnsetType | None = UNSET
    first_boot: FirstBoot | UnsetType | None = UNSET


KEYS = Settings.__struct_fields__
MERGED_KEYS = frozenset({"environment", "labels", "devices"})
RESOURCE_KEYS = Resources.__struct_fields__


# The layer that is nobody's profile, in `Origin.source`.
MACHINE_LAYER = "machine"


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """Settings under a name, which is what a machine's could be. `labels` are the profile's own, not its machines'."""

    name: str
    description: Annotated[str, msgspec.Meta(max_length=1000)] = ""
    labels: dict[LabelName, LabelValue] = {}
    settings: Settings = Settings()


class ProfileView(Profile, frozen=True, kw_only=True):
    """A profile as lists and `profile show` have it. `used_by` are machines; `etag` is for If-Match."""

    used_by: tuple[str, ...] = ()
    etag: str = ""


class SetProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of a profile's set: keys to forget and settings to take over, as in `SetMachine`."""

    settings: Settings = Settings()
    values: dict[str, str] = {}
    unset: tuple[str, ...] = ()
    description: str | None = None


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """Where the value of a setting comes from: a profile's name or `machine`. `key` may be `labels.role`."""

    key: str
    source: str


def add_up(layers: Sequence[Settings]) -> Settings:
    """One value of many layers, the last of which counts most."""
    values: dict[str, object] = {}
    for layer in layers:
        for key in KEYS:
            value = getattr(layer, key)
            if value is UNSET:
                continue
            before = values.get(key)
            values[key] = {**before, **value} if key in MERGED_KEYS and isinstance(before, dict) else value
    return Settings(**values)  # type: ignore[arg-type]


def origins(layers: Sequence[tuple[str, Settings]]) -> tuple[Origin, ...]:
    """Which of the named layers each setting that is set comes from, sorted by key."""
    found: dict[str, str] = {}
    for name, layer in layers:
        for key in KEYS:
            value = getattr(layer, key)
            if isinstance(value, dict) and key in MERGED_KEYS:
                found.update({f"{key}.{part}": name for part in value})
            elif value is not UNSET:
                found[key] = name
    return tuple(Origin(key=key, source=found[key]) for key in sorted(found))


def resources_of(settings: Settings) -> Resources:
    """The limits that are set; the others are what `Resources` says by itself."""
    given = ((key, getattr(settings, key)) for key in RESOURCE_KEYS)
    return Resources(**{key: value for key, value in given if value is not UNSET})
