"""Settings as people write them: `memory=2G`, `label.role=web`. One table leads from key to field and back.

A value is text, or, where it comes from a file, a tree of text (`Written`). Reading checks it to the letter; what is
written is read back as the same settings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from triarch.errors import Invalid
from triarch.model.device import Hardware
from triarch.model.nearest import did_you_mean, nearest
from triarch.model.policy import HealthCheck, RestartPolicy, SnapshotSchedule
from triarch.model.setting_forms import (
    BOOLEAN,
    COMMAND,
    CPUS,
    DEVICE,
    FIRST_BOOT,
    HTTP,
    INTEGER,
    NAMES,
    PORTS,
    RATE,
    SIZE,
    TCP,
    TEXT,
    TIME,
    WHOLE_TIME,
    Form,
    Written,
    choice,
)
from triarch.model.settings import MERGED_KEYS, Settings

NONE_WORDS = frozenset({"none", "null", "~"})


class SettingKey(msgspec.Struct, frozen=True):
    """One key that people write. `field` is where it is in `Settings`: `memory_bytes`, `health.interval_seconds`.

    A key of several (`env.NAME`) ends with its part. `needs` completes "it needs …". With `nullable`, `none` says that
    there is no such limit or check.
    """

    name: str
    field: str
    form: Form
    needs: str = ""
    nullable: bool = False
    example: str = ""
    about: str = ""

    @property
    def top(self) -> str:
        """The field of `Settings` itself."""
        return self.field.partition(".")[0]

    @property
    def has_parts(self) -> bool:
        return self.field in MERGED_KEYS

    @property
    def wanted(self) -> str:
        return (self.needs or self.form.needs) + (", or none" if self.nullable else "")


def _limit(name: str, field: str, form: Form, needs: str, example: str, about: str) -> SettingKey:
    return SettingKey(name, field, form, needs, True, example, about)


KEYS: tuple[SettingKey, ...] = (
    _limit("cpus", "cpus", CPUS, "a number of processors above 0", "1.5", "Processors, also a fraction."),
    _limit("cpu-weight", "cpu_weight", INTEGER, "a whole number from 1 to 10000", "200", "Share of the processors."),
    _limit("cpu-set", "cpu_set", TEXT, "processors of the host such as 0-3,6", "0-1", "Processors it is pinned to."),
    _limit("memory", "memory_bytes", SIZE, "a size of at least 16M, such as 512M", "2G", "Memory."),
    _limit("swap", "swap_bytes", SIZE, "a size such as 512M, or 0", "0", "Swap on top of the memory."),
    _limit("pids", "pids", INTEGER, "a whole number from 16 to 4194304", "500", "The most processes and threads."),
    _limit("io-weight", "io_weight", INTEGER, "a whole number from 10 to 1000", "50", "Share of the disk."),
    _limit("io-read", "io_read_bytes_per_second", RATE, "", "10M", "The most it reads a second."),
    _limit("io-write", "io_write_bytes_per_second", RATE, "", "10M", "The most it writes a second."),
    _limit("network-receive", "network_receive_bytes_per_second", RATE, "", "5M", "The most it receives a second."),
    _limit("network-send", "network_send_bytes_per_second", RATE, "", "5M", "The most it sends a second."),
    SettingKey("disk", "disk_bytes", SIZE, "a size of at least 64M", False, "20G", "Room for what it writes."),
    SettingKey("env", "environment", TEXT, "", False, "env.LANG=C.UTF-8", "Environment of its commands."),
    SettingKey("label", "labels", TEXT, "printable text", False, "label.role=web", "Labels, for people and rules."),
    SettingKey("description", "description", TEXT, "at most 1000 characters", False, "shop", "A note."),
    SettingKey("network", "network", TEXT, "the name of a network, user or none", False, "front", "Its network."),
    _limit("address", "address", TEXT, "an IPv4 address", "10.9.0.7", "Its address there."),
    _limit("address6", "address6", TEXT, "an IPv6 address", "fd00::7", "Its IPv6 address there."),
    SettingKey("aliases", "aliases", NAMES, "", False, "www,shop", "Other names that lead to it."),
    SettingKey("ports", "forwards", PORTS, "", False, "8080:80", "Ports of the host that lead to it."),
    SettingKey("hardware", "hardware", choice(Hardware), "", False, "paravirt", "Virtual hardware of a VM."),
    SettingKey("device", "devices", DEVICE, "", False, "device.data=volume,path=/data", "Devices."),
    SettingKey("restart", "restart", choice(RestartPolicy), "", False, "on-failure", "Started again when it ends."),
    SettingKey("health.command", "health", COMMAND, "a command line", False, "pg_isready", "Healthy if it is 0."),
    SettingKey("health.tcp", "health", TCP, "", False, "5432", "Healthy if the port answers."),
    SettingKey("health.http", "health", HTTP, "", False, "80/ready", "Healthy if it answers below 400."),
    SettingKey("health.interval", "health.interval_seconds", TIME, "", False, "10s", "Time between two checks."),
    SettingKey("health.timeout", "health.timeout_seconds", TIME, "", False, "5s", "The longest a check may take."),
    SettingKey("health.grace", "health.grace_seconds", TIME, "", False, "1m", "Time for its start."),
    SettingKey("health.retries", "health.retries", INTEGER, "a whole number from 1 to 1000", False, "5", "In a row."),
    SettingKey("health.restart", "health.restart", BOOLEAN, "", False, "true", "Restarted when unhealthy."),
    SettingKey("stop-timeout", "stop_timeout_seconds", TIME, "a time of at most 1d", False, "30s", "Time for its end."),
    SettingKey("autostart", "autostart", BOOLEAN, "", False, "true", "Started with the host."),
    SettingKey("depends-on", "depends_on", NAMES, "", False, "db,cache", "Machines that start before it."),
    SettingKey("protected", "protected", BOOLEAN, "", False, "true", "Cannot be deleted."),
    SettingKey("snapshots.every", "snapshots.every_seconds", WHOLE_TIME, "", False, "1h", "Time between snapshots."),
    SettingKey("snapshots.expire", "snapshots.keep_seconds", WHOLE_TIME, "", True, "7d", "How long they are kept."),
    SettingKey("snapshots.keep", "snapshots.keep", INTEGER, "a whole number from 1 to 1000", False, "7", "How many."),
    SettingKey("first-boot", "first_boot", FIRST_BOOT, "", True, "", "What is done once (from a file)."),
)
# Keys that say `none` of a whole group.
GROUPS = ("health", "snapshots")
_BY_NAME = {key.name: key for key in KEYS}
_BY_TOP = {key.top: tuple(each for each in KEYS if each.top == key.top) for key in KEYS}
_BY_FIELD = {key.field: key for key in KEYS if "." not in key.field and key.field not in GROUPS}


class Named(msgspec.Struct, frozen=True):
    """A key as it was written: `label.role` is the key `label` and its part `role`. `key` is None for a whole group."""

    name: str
    key: SettingKey | None
    part: str = ""

    @property
    def top(self) -> str:
        return self.key.top if self.key is not None else self.name


def find_key(text: str) -> Named:
    """The key that `text` names, or the field's own name. Raises `Invalid` with the nearest there is."""
    if text in GROUPS:
        return Named(text, None)
    key = _BY_NAME.get(text) or _BY_FIELD.get(text)
    if key is not None:
        return Named(text, key)
    head, dot, part = text.partition(".")
    key = _BY_NAME.get(head) or _BY_FIELD.get(head)
    if dot and part and key is not None and key.has_parts:
        return Named(f"{key.name}.{part}", key, part)
    raise unknown_key(text)


def unknown_key(text: str) -> Invalid:
    near = nearest(text, [*_BY_NAME, *_BY_FIELD, *GROUPS], 0.5)
    meant = did_you_mean(_BY_FIELD[near].name if near in _BY_FIELD else near)
    return Invalid(f"there is no setting '{text[:80]}'{meant}", hint="triarch set --help", key=text[:80])


# -- reading


def read_settings(
    written: Iterable[tuple[str, Written]], own: Settings | None = None, whole: Settings | None = None
) -> Settings:
    """`own` (none: nothing) with what is written taken over, key by key. Raises `Invalid` that names the key.

    One key of a group (`health.interval`) changes the group as it stands in `whole`, the sum with the profiles, where
    `own` does not have it.
    """
    values: dict[str, Any] = dict(msgspec.to_builtins(own or Settings()))
    ground: dict[str, Any] = dict(msgspec.to_builtins(whole or Settings()))
    touched: dict[str, str] = {}
    for text, value in written:
        named = find_key(text)
        _take(values, ground, named, value)
        touched[named.top] = named.name
    for field, name in touched.items():
        _check(name, field, values)
    return msgspec.convert(values, Settings)


def _take(values: dict[str, Any], ground: Mapping[str, Any], named: Named, value: Written) -> None:
    key = named.key
    if key is None:
        _take_group(values, ground, named.name, value)
    elif key.has_parts:
        _take_parts(values, key, named.part, value)
    elif key.top in GROUPS:
        group = dict(values.get(key.top) or ground.get(key.top) or {})
        read = _read(key, named.name, value)
        values[key.top] = {**group, **(read if key.field in GROUPS else {key.field.partition(".")[2]: read})}
    else:
        values[key.field] = _read(key, named.name, value)


def _take_group(values: dict[str, Any], ground: Mapping[str, Any], name: str, value: Written) -> None:
    if isinstance(value, str) and value in NONE_WORDS:
        values[name] = None
    elif isinstance(value, dict):
        # A tree says all of the group.
        values[name] = {}
        for part, inner in value.items():
            _take(values, {}, find_key(f"{name}.{part}"), inner)
    else:
        known = ", ".join(key.name for key in KEYS if key.top == name)
        raise Invalid(f"illegal {name}: it needs none, or one of {known}", key=name)


def _take_parts(values: dict[str, Any], key: SettingKey, part: str, value: Written) -> None:
    if part:
        values[key.field] = {**values.get(key.field, {}), part: _read(key, f"{key.name}.{part}", value)}
    elif isinstance(value, dict):
        values.setdefault(key.field, {})
        for name, inner in value.items():
            _take_parts(values, key, name, inner)
    else:
        raise Invalid(f"illegal {key.name}: it needs a name, such as {key.example}", key=key.name)


def _read(key: SettingKey, name: str, value: Written) -> Any:
    if key.nullable and isinstance(value, str) and value in NONE_WORDS:
        return None
    try:
        return key.form.read(value)
    except ValueError as error:
        raise _illegal(name, value, key.wanted) from error
    except Invalid as error:
        raise Invalid(f"{name}: {error.message}", hint=error.hint, key=name, path=error.fields.get("path")) from error


def _illegal(name: str, value: Written, wanted: str) -> Invalid:
    shown = f" '{value[:80]}'" if isinstance(value, str) else ""
    return Invalid(f"illegal {name}{shown}: it needs {wanted}", key=name)


def _check(name: str, field: str, values: Mapping[str, Any]) -> None:
    """Limits of the field itself, and what makes a group whole."""
    value = values[field]
    try:
        msgspec.convert({field: value}, Settings)
    except msgspec.ValidationError as error:
        if field == "snapshots" and "every_seconds" not in value:
            raise Invalid("snapshots need the time between two of them: snapshots.every=1h", key=name) from error
        key = _BY_NAME.get(name) or _BY_FIELD.get(field)
        wanted = f"{key.wanted} ({_reason(error)})" if key is not None else _reason(error)
        raise Invalid(f"illegal {name}: it needs {wanted}", key=name) from error
    if field == "health" and value is not None and not (value.get("command") or value.get("port")):
        raise Invalid("a health check needs health.command, health.tcp or health.http", key=name)


def _reason(error: msgspec.ValidationError) -> str:
    text = str(error).partition(" - at `")[0]
    return text[:1].lower() + text[1:]


def forget(settings: Settings, names: Sequence[str]) -> Settings:
    """`settings` without the named keys; one that is not set is forgotten already. Raises `Invalid`."""
    values: dict[str, Any] = dict(msgspec.to_builtins(settings))
    for text in names:
        named = find_key(text)
        held = values.get(named.top)
        if named.part:
            values[named.top] = {part: value for part, value in (held or {}).items() if part != named.part}
        elif named.key is not None and "." in named.key.field and isinstance(held, dict):
            inner = named.key.field.partition(".")[2]
            values[named.top] = {part: value for part, value in held.items() if part != inner}
        else:
            values.pop(named.top, None)
        if values.get(named.top) == {} and named.top in MERGED_KEYS:
            del values[named.top]
        if named.top in GROUPS and values.get(named.top) is not None:
            _check(named.name, named.top, values)
    return msgspec.convert(values, Settings)


# -- writing


class Setting(msgspec.Struct, frozen=True):
    """One setting that is set: `label.role` and its value as a file has it."""

    key: str
    value: Written

    @property
    def text(self) -> str:
        return flat(self.value)


def flat(value: Written) -> str:
    """A value on one line."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return ",".join(flat(item) for item in value)
    return msgspec.json.encode(value).decode()


def write_settings(settings: Settings) -> tuple[Setting, ...]:
    """Every setting that is set, in the order of the table, parts in order of their names."""
    values: dict[str, Any] = msgspec.to_builtins(settings)
    return tuple(
        setting
        for top, keys in _BY_TOP.items()
        if top in values
        for key in keys
        for setting in _write(key, top, values[top])
    )


def _write(key: SettingKey, top: str, value: Any) -> Iterable[Setting]:
    if top in MERGED_KEYS:
        for part in sorted(value):
            yield Setting(f"{key.name}.{part}", key.form.write(value[part]))
    elif top in GROUPS:
        yield from _write_group(key, top, value)
    else:
        yield Setting(key.name, "none" if value is None else key.form.write(value))


def _write_group(key: SettingKey, top: str, group: Mapping[str, Any] | None) -> Iterable[Setting]:
    if group is None:
        # Once for all keys of the group.
        if key is _BY_TOP[top][0]:
            yield Setting(top, "none")
        return
    if key.field in GROUPS:
        if group.get("probe", "command") == key.name.partition(".")[2]:
            yield Setting(key.name, key.form.write(group))
        return
    inner = key.field.partition(".")[2]
    value = group.get(inner)
    if value is not None and value != _DEFAULTS[top].get(inner):
        yield Setting(key.name, key.form.write(value))


def _defaults_of(group: str) -> dict[str, object]:
    kinds: dict[str, type[msgspec.Struct]] = {"health": HealthCheck, "snapshots": SnapshotSchedule}
    return {field.name: field.default for field in msgspec.structs.fields(kinds[group])}


_DEFAULTS: Mapping[str, Mapping[str, object]] = {group: _defaults_of(group) for group in GROUPS}


def settings_tree(settings: Settings) -> dict[str, Written]:
    """All settings as the tree of a file: `env`, `label`, `health` and their like as mappings."""
    tree: dict[str, Written] = {}
    for setting in write_settings(settings):
        head, dot, part = setting.key.partition(".")
        if dot:
            inner = tree.setdefault(head, {})
            assert isinstance(inner, dict)
            inner[part] = setting.value
        else:
            tree[head] = setting.value
    return tree


def written_of(field_key: str) -> str:
    """What people write for a key of `Origin`: `labels.role` is `label.role`."""
    head, dot, part = field_key.partition(".")
    key = _BY_FIELD.get(head)
    return f"{key.name if key is not None else head}{dot}{part}"
