"""One change of a site after another, through the client."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import msgspec

from triarch.cli.progress import finish
from triarch.errors import Invalid
from triarch.model.machine import CreateMachine, SetMachine, StopMachine, SwitchMachine
from triarch.model.network import EditNetwork
from triarch.model.site import MachineWanted, Site
from triarch.model.site_plan import (
    Action,
    Change,
    Noun,
    Present,
    owned_network,
    owned_profile,
    owned_settings,
    settings_change,
)
from triarch.model.template import parse_template_name

if TYPE_CHECKING:
    from triarch.client import Client

_HEAD = ("as", "running")


class _Named(Protocol):
    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=_Named)


def _named(wanted: Iterable[T], name: str) -> T:
    return next(each for each in wanted if each.name == name)


class SiteChanges:
    """Bound to what was there when the plan was made: templates are pinned to the level that they had then."""

    def __init__(self, client: Client, site: Site, present: Present, base: Path) -> None:
        """`base` is where the paths of the file begin."""
        self._client = client
        self._site = site
        self._base = base
        self._machines = {machine.name: machine for machine in present.machines}
        self._levels: dict[str, int] = {}
        for template in present.templates:
            self._levels[template.name] = max(template.level, self._levels.get(template.name, 0))
        self._used: dict[str, int] = {}

    def carry_out(self, change: Change) -> str:
        """Make it so; what is worth telling. Raises what went wrong."""
        match change.noun:
            case Noun.TEMPLATE:
                return self._template(change.name)
            case Noun.NETWORK:
                return self._network(change)
            case Noun.PROFILE:
                return self._profile(change)
            case Noun.MACHINE if change.action is Action.CREATE:
                return self._create_machine(_named(self._site.machines, change.name))
            case Noun.MACHINE if change.action is Action.UPDATE:
                return self._update_machine(_named(self._site.machines, change.name), change)
            case Noun.MACHINE:
                finish(self._client, self._client.delete(change.name, force=True))
        return ""

    def moved(self) -> list[str]:
        """Templates that got a newer level while machines were made on the one before."""
        if not self._used:
            return []
        newest = {template.name: template.level for template in self._client.templates()}
        return [
            f"template {name} is at level {newest[name]} by now; machines were made on {name}@{level}"
            for name, level in self._used.items()
            if newest.get(name, level) > level
        ]

    def _template(self, name: str) -> str:
        wanted = _named(self._site.templates, name)
        if wanted.build is not None:
            operation = self._client.build_template(wanted.build)
        else:
            assert wanted.archive is not None
            path = self._base / wanted.archive
            if not path.is_file():
                raise Invalid(f"there is no file {path} to import")
            operation = self._client.import_template(name, path)
        finish(self._client, operation)
        self._levels[name] = self._client.template(name).level
        return ""

    def _network(self, change: Change) -> str:
        networks = self._client.networks
        if change.action is Action.DELETE:
            finish(self._client, networks.delete(change.name))
            return ""
        wanted = owned_network(self._site, _named(self._site.networks, change.name))
        if change.action is Action.CREATE:
            finish(self._client, networks.create(wanted))
            return ""
        request = EditNetwork(acl=wanted.acl, description=wanted.description, labels=wanted.labels)
        if wanted.gateway is None and wanted.nameserver is None:
            request = msgspec.structs.replace(request, dhcp=wanted.dhcp, dns=wanted.dns)
        finish(self._client, networks.edit(change.name, request))
        return ""

    def _profile(self, change: Change) -> str:
        profiles = self._client.profiles
        if change.action is Action.DELETE:
            finish(self._client, profiles.delete(change.name))
            return ""
        wanted = owned_profile(self._site, _named(self._site.profiles, change.name))
        if change.action is Action.CREATE:
            finish(self._client, profiles.create(wanted))
            return ""
        present = profiles.get(change.name)
        if not self._site.name:
            wanted = msgspec.structs.replace(wanted, labels=present.labels)
        told = finish(self._client, profiles.replace(wanted, present.etag)).result or ""
        return "; ".join(line for line in told.splitlines() if ": " in line)

    # -- machines

    def _create_machine(self, wanted: MachineWanted) -> str:
        name, level = parse_template_name(wanted.template)
        if level is None and name in self._levels:
            level = self._used[name] = self._levels[name]
        request = CreateMachine(
            template=name if level is None else f"{name}@{level}",
            name=wanted.name,
            architecture=wanted.architecture,
            init=wanted.init,
            command=wanted.command or (),
            profiles=wanted.profiles,
            settings=owned_settings(self._site, wanted.settings),
            start=wanted.running is not False,
        )
        finish(self._client, self._client.create(request))
        return ""

    def _update_machine(self, wanted: MachineWanted, change: Change) -> str:
        """What stops it comes first and what starts it last, so that it starts as it should be."""
        client, keys = self._client, {field.key for field in change.fields}
        if wanted.running is False and "running" in keys:
            finish(client, client.stop(wanted.name, StopMachine()))
        note = ""
        if keys - set(_HEAD):
            settings, gone = settings_change(self._site, wanted, self._machines[wanted.name].own)
            request = SetMachine(settings=settings, unset=gone, profiles=wanted.profiles)
            told = finish(client, client.set(wanted.name, request)).result or ""
            note = "; ".join(part for part in told.split("; ") if "next start" in part)
        if "as" in keys and wanted.architecture is not None:
            operation = client.switch(wanted.name, SwitchMachine(architecture=wanted.architecture))
            if operation is not None:
                finish(client, operation)
        if wanted.running and "running" in keys:
            finish(client, client.start(wanted.name))
        return note
