"""What keeps a machine as its operator wants it: restarts, health checks, scheduled snapshots, the first boot."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec

from triarch.model.network import Port

CheckSeconds = Annotated[float, msgspec.Meta(ge=0.1, le=86_400)]
Count = Annotated[int, msgspec.Meta(ge=1, le=1000)]


class RestartPolicy(StrEnum):
    """When a machine that ended by itself is started again, after a delay that grows from 1 s to 60 s."""

    NO = "no"
    ON_FAILURE = "on-failure"
    ALWAYS = "always"


class Probe(StrEnum):
    """How a health check asks."""

    COMMAND = "command"
    TCP = "tcp"
    HTTP = "http"


class HealthCheck(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Ask every `interval_seconds`; after `retries` bad answers in a row the machine is unhealthy.

    `command` runs in the machine and must end with 0. `tcp` connects to `port` at the machine's address, `http` asks
    for `path` there and wants a status below 400. Bad answers in the first `grace_seconds` of a run do not count. An
    unhealthy machine is restarted if `restart` says so.
    """

    probe: Probe = Probe.COMMAND
    command: tuple[str, ...] = ()
    port: Port | None = None
    path: str = "/"
    interval_seconds: CheckSeconds = 30.0
    timeout_seconds: CheckSeconds = 10.0
    grace_seconds: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 30.0
    retries: Count = 3
    restart: bool = False


class Health(StrEnum):
    """What the checks say of a running machine; `starting` until the first good answer or enough bad ones."""

    STARTING = "starting"
    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"


class SnapshotSchedule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A snapshot every `every_seconds` of a machine that runs or changed; each expires after `keep_seconds`.

    Independently of that, at most `keep` of them are kept.
    """

    every_seconds: Annotated[int, msgspec.Meta(ge=60, le=366 * 86_400)]
    keep_seconds: Annotated[int, msgspec.Meta(ge=60, le=3660 * 86_400)] | None = None
    keep: Count = 10


class FirstUser(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A user that the first boot makes."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[a-z_][a-z0-9_-]{0,31}$(?!\n)")]
    ssh_keys: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    shell: str = ""
    sudo: bool = False
    password_hash: str = ""


class FirstFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file that the first boot writes; `mode` is octal text as `chmod` takes it, `owner` `USER[:GROUP]`."""

    path: Annotated[str, msgspec.Meta(pattern=r"^/[^\x00\n]{1,1023}$(?!\n)")]
    content: str
    mode: Annotated[str, msgspec.Meta(pattern=r"^[0-7]{3,4}$(?!\n)")] = "0644"
    owner: str = "root"


class FirstBoot(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a machine does once, before its first ordinary run is called running.

    A template that carries cloud-init gets `user_data` (or what follows from the other fields) as a NoCloud seed. In
    any other the fields are carried out directly; `user_data` then is refused.
    """

    users: tuple[FirstUser, ...] = ()
    ssh_keys: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    files: tuple[FirstFile, ...] = ()
    commands: tuple[tuple[str, ...], ...] = ()
    user_data: str = ""
