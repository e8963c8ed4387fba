"""From profiles and a machine's own settings to the fields of its record."""

from __future__ import annotations

import msgspec
from msgspec import UNSET

from triarch.model.machine import Machine
from triarch.model.settings import Settings, resources_of

# Settings that are fields of the record as they are.
_FIELDS = (
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
    for key in _FIELDS:
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
