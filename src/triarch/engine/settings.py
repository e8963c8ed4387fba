"""From profiles and a machine's own settings to the fields of its record."""

from __future__ import annotations

import msgspec
from msgspec import UNSET

from triarch.engine.records import ProfileRecords
from triarch.model.machine import Machine, SetMachine, SettingChange
from triarch.model.setting_text import find_key, forget, read_settings, write_settings
from triarch.model.settings import MACHINE_LAYER, Origin, Profile, SetProfile, Settings, add_up, origins, resources_of

# Settings that are fields of the record as they are.
SETTING_FIELDS = (
    "labels",
    "description",
    "aliases",
    "forwards",
    "hardware",
    "devices",
    "restart",
    "health",
    "stop_timeout_seconds",
    "autostart",
    "depends_on",
    "protected",
    "snapshots",
    "first_boot",
)


def materialize(machine: Machine, settings: Settings, template_environment: dict[str, str]) -> Machine:
    """The record with every field that follows from `settings`, the sum of its layers.

    Network, addresses and cards are not among them: they are chosen beside those of other machines (`resolve`).
    """
    defaults = {field.name: field for field in msgspec.structs.fields(Machine)}
    values: dict[str, object] = {}
    for key in SETTING_FIELDS:
        value = getattr(settings, key)
        field = defaults[key]
        unset = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
        values[key] = unset if value is UNSET else value
    environment = {} if settings.environment is UNSET else settings.environment
    return msgspec.structs.replace(
        machine,
        resources=resources_of(settings),
        environment={**template_environment, **environment},
        **values,
    )


def layers_of(profiles: ProfileRecords, machine: Machine, instead: Profile | None = None) -> tuple[Settings, ...]:
    """Everything that is said of a machine, what counts most last; `instead` stands for the profile of its name."""
    found = (instead if instead and instead.name == name else profiles.get(name) for name in machine.profiles)
    return (*(profile.settings for profile in found), machine.own)


def origins_of(profiles: ProfileRecords, machine: Machine) -> tuple[Origin, ...]:
    """Where the value of each setting of a machine comes from."""
    names = (*machine.profiles, MACHINE_LAYER)
    return origins(tuple(zip(names, layers_of(profiles, machine), strict=True)))


def revised(request: SetMachine | SetProfile, own: Settings, whole: Settings) -> Settings:
    """`own` after a `set`: first what is forgotten, then what is taken over. Raises `Invalid`.

    `whole` is the sum with the profiles: what one key of a group changes.
    """
    own = add_up((forget(own, request.unset), request.settings))
    return read_settings(request.values.items(), own, whole)


def changes_between(old: Settings, new: Settings, live_fields: frozenset[str]) -> tuple[SettingChange, ...]:
    """What is set otherwise in `new`; `live_fields` are the fields of `Settings` that hold at once."""
    before = {setting.key: setting.text for setting in write_settings(old)}
    after = {setting.key: setting.text for setting in write_settings(new)}
    return tuple(
        SettingChange(key=key, old=before.get(key), new=after.get(key), live=find_key(key).top in live_fields)
        for key in sorted({**before, **after})
        if before.get(key) != after.get(key)
    )
