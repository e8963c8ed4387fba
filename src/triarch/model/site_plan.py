"""What applying a site would do: the difference between what the files want and what there is. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from graphlib import CycleError, TopologicalSorter

import msgspec

from triarch.model.machine import MachineView
from triarch.model.network import DEFAULT_NETWORK, CreateNetwork, NetworkKind, NetworkView
from triarch.model.setting_forms import Written
from triarch.model.setting_text import flat, forget, write_settings
from triarch.model.settings import Profile, ProfileView, Settings, add_up
from triarch.model.site import SITE_LABEL, MachineWanted, Site, TemplateWanted, network_tree, profile_tree
from triarch.model.state import State
from triarch.model.template import Init, Template, parse_template_name


class Action(StrEnum):
    CREATE = "create"
    UPDATE = "update"
    DELETE = "delete"
    UNCHANGED = "unchanged"


class Noun(StrEnum):
    """In the order in which they are made; the other way round they are deleted."""

    POOL = "pool"
    TEMPLATE = "template"
    NETWORK = "network"
    PROFILE = "profile"
    MACHINE = "machine"


class Field(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that is otherwise; None where it is not there."""

    key: str
    old: str | None
    new: str | None


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of one object. `refusal`: it cannot be, and why. `needs` are the objects that it stands on."""

    noun: Noun
    name: str
    action: Action
    fields: tuple[Field, ...] = ()
    refusal: str | None = None
    needs: tuple[tuple[Noun, str], ...] = ()

    @property
    def changes(self) -> bool:
        return self.action is not Action.UNCHANGED or self.refusal is not None


class Present(msgspec.Struct, frozen=True, kw_only=True):
    """All that there is, from one list call each."""

    templates: tuple[Template, ...] = ()
    networks: tuple[NetworkView, ...] = ()
    profiles: tuple[ProfileView, ...] = ()
    machines: tuple[MachineView, ...] = ()
    pools: tuple[str, ...] = ("default",)


def plan(site: Site, present: Present, *, prune: bool = False) -> tuple[Change, ...]:
    """Every object of the site in the order of its making; with `prune` then what it owns and wants no more."""
    newest = _newest(present.templates)
    profiles = {profile.name: profile for profile in present.profiles}
    networks = {network.name: network for network in present.networks}
    machines = {machine.name: machine for machine in present.machines}
    changes = [
        *(_pool(name, present.pools) for name in site.pools),
        *(_template(wanted, newest) for wanted in site.templates),
        *(_network(owned_network(site, wanted), networks.get(wanted.name), site) for wanted in site.networks),
        *(_profile(owned_profile(site, wanted), profiles.get(wanted.name), site) for wanted in site.profiles),
        *(_machine(wanted, machines.get(wanted.name), site) for wanted in in_order(site)),
    ]
    return (*changes, *(_pruned(site, present) if prune and site.name else ()))


def in_order(site: Site) -> tuple[MachineWanted, ...]:
    """The machines, each after those that it depends on. What goes round stays as it is: the daemon says so."""
    profiles = {profile.name: profile.settings for profile in site.profiles}
    by_name = {machine.name: machine for machine in site.machines}
    depends = {machine.name: _depends_on(machine, profiles) for machine in site.machines}
    known = {name: [other for other in others if other in by_name] for name, others in depends.items()}
    try:
        return tuple(by_name[name] for name in TopologicalSorter(known).static_order())
    except CycleError:
        return site.machines


def _depends_on(machine: MachineWanted, profiles: Mapping[str, Settings]) -> tuple[str, ...]:
    whole = add_up([*(profiles[name] for name in machine.profiles if name in profiles), machine.settings])
    return whole.depends_on or ()


def _newest(templates: Sequence[Template]) -> dict[str, Template]:
    newest: dict[str, Template] = {}
    for template in templates:
        if template.name not in newest or template.level > newest[template.name].level:
            newest[template.name] = template
    return newest


# -- ownership


def owned_settings(site: Site, settings: Settings) -> Settings:
    return add_up((settings, Settings(labels={SITE_LABEL: site.name}))) if site.name else settings


def owned_network(site: Site, network: CreateNetwork) -> CreateNetwork:
    return msgspec.structs.replace(network, labels={**network.labels, **_owner(site)})


def owned_profile(site: Site, profile: Profile) -> Profile:
    return msgspec.structs.replace(profile, labels={**profile.labels, **_owner(site)})


def _owner(site: Site) -> dict[str, str]:
    return {SITE_LABEL: site.name} if site.name else {}


def _unowned(labels: Mapping[str, str], site: Site) -> dict[str, str]:
    """A file without a site's name neither takes nor gives up what another site owns."""
    return {key: value for key, value in labels.items() if key != SITE_LABEL or site.name}


def _pruned(site: Site, present: Present) -> Iterable[Change]:
    """Owned by the site by its label, and not in it. A protected machine stays."""
    wanted = {
        noun: {each.name for each in getattr(site, f"{noun.value}s")}
        for noun in (Noun.NETWORK, Noun.PROFILE, Noun.MACHINE)
    }
    owner = (SITE_LABEL, site.name)
    for machine in present.machines:
        if owner in machine.labels.items() and machine.name not in wanted[Noun.MACHINE] and not machine.protected:
            state = (Field(key="state", old=machine.state.value, new=None),)
            yield Change(noun=Noun.MACHINE, name=machine.name, action=Action.DELETE, fields=state)
    for profile in present.profiles:
        if owner in profile.labels.items() and profile.name not in wanted[Noun.PROFILE]:
            yield Change(noun=Noun.PROFILE, name=profile.name, action=Action.DELETE)
    for network in present.networks:
        if owner in network.labels.items() and network.name not in wanted[Noun.NETWORK]:
            yield Change(noun=Noun.NETWORK, name=network.name, action=Action.DELETE)


# -- one object


def _change(noun: Noun, name: str, fields: Sequence[Field], **more: object) -> Change:
    action = Action.UPDATE if fields else Action.UNCHANGED
    return Change(noun=noun, name=name, action=action, fields=tuple(fields), **more)  # type: ignore[arg-type]


def _pool(name: str, pools: Sequence[str]) -> Change:
    refusal = (
        None if name in pools else f"there is no pool '{name}': there is {', '.join(pools)}, and no other is made yet"
    )
    return Change(noun=Noun.POOL, name=name, action=Action.UNCHANGED, refusal=refusal)


def _template(wanted: TemplateWanted, newest: Mapping[str, Template]) -> Change:
    if wanted.name in newest:
        return Change(noun=Noun.TEMPLATE, name=wanted.name, action=Action.UNCHANGED)
    source = wanted.archive or (f"build of {wanted.build.suite}" if wanted.build is not None else None)
    return Change(
        noun=Noun.TEMPLATE,
        name=wanted.name,
        action=Action.CREATE,
        fields=(Field(key="source", old=None, new=source),) if source else (),
        refusal=None if source else f"there is no template '{wanted.name}', and the file does not say how to make it",
    )


def _differences(old: Mapping[str, str], new: Mapping[str, str]) -> tuple[Field, ...]:
    keys = sorted({**old, **new}, key=lambda key: (key not in new, key))
    return tuple(Field(key=key, old=old.get(key), new=new.get(key)) for key in keys if old.get(key) != new.get(key))


def _flat(tree: Mapping[str, Written]) -> dict[str, str]:
    return {key: flat(value) for key, value in tree.items()}


def _network(wanted: CreateNetwork, network: NetworkView | None, site: Site) -> Change:
    new = _flat(network_tree(wanted))
    if network is None and wanted.name == DEFAULT_NETWORK:
        # It is made when it is first needed, and by an edit.
        return _change(Noun.NETWORK, wanted.name, _differences({"kind": NetworkKind.NAT.value}, new))
    if network is None:
        return Change(noun=Noun.NETWORK, name=wanted.name, action=Action.CREATE, fields=_differences({}, new))
    has = network_wanted(network)
    old = _flat(network_tree(msgspec.structs.replace(has, labels=_unowned(has.labels, site))))
    # Chosen by the daemon where the file leaves them out.
    for key in ("ipv4", "ipv6"):
        if key not in new:
            old.pop(key, None)
    fields = _differences(old, new)
    fixed = [field for field in fields if field.key in ("kind", "ipv4", "ipv6", "parent")]
    refusal = None
    if fixed:
        refusal = f"{_shown(fixed)}: that is a network's own; delete it and make it anew"
    return _change(Noun.NETWORK, wanted.name, fields, refusal=refusal)


def network_wanted(network: NetworkView) -> CreateNetwork:
    """The request that would make it."""
    served = network.kind in (NetworkKind.NAT, NetworkKind.ISOLATED)
    is_own = network.name != DEFAULT_NETWORK
    return CreateNetwork(
        name=network.name,
        kind=network.kind,
        ipv4=network.ipv4 if is_own else None,
        ipv6=(network.ipv6 or ("none" if served else None)) if is_own else None,
        parent=network.parent,
        gateway=network.gateway,
        nameserver=network.nameserver,
        dhcp=network.dhcp or not served,
        dns=network.dns or not served,
        acl=network.acl,
        description=network.description,
        labels=network.labels,
    )


def _shown(fields: Sequence[Field]) -> str:
    return ", ".join(f"{field.key}: {field.old or 'not set'} → {field.new or 'not set'}" for field in fields)


def _labelled(tree: dict[str, Written], labels: Mapping[str, str]) -> dict[str, str]:
    shown = _flat(tree)
    return {**shown, **{f"own label {key}": value for key, value in labels.items()}}


def _profile(wanted: Profile, profile: ProfileView | None, site: Site) -> Change:
    new = _labelled(_by_key(wanted), wanted.labels)
    needs = ((Noun.NETWORK, wanted.settings.network),) if wanted.settings.network else ()
    if profile is None:
        fields = _differences({}, new)
        return Change(noun=Noun.PROFILE, name=wanted.name, action=Action.CREATE, fields=fields, needs=needs)
    old = _labelled(_by_key(profile), _unowned(profile.labels, site))
    return _change(Noun.PROFILE, wanted.name, _differences(old, new), needs=needs)


def _by_key(profile: Profile) -> dict[str, Written]:
    about = {key: value for key, value in profile_tree(profile).items() if key == "about"}
    return {**about, **{setting.key: setting.value for setting in write_settings(profile.settings)}}


def _machine(wanted: MachineWanted, machine: MachineView | None, site: Site) -> Change:
    settings = owned_settings(site, wanted.settings)
    new = {setting.key: setting.text for setting in write_settings(settings)}
    needs = _needs(wanted)
    if machine is None:
        whole = _head(wanted) | new
        fields = _differences({}, whole)
        return Change(noun=Noun.MACHINE, name=wanted.name, action=Action.CREATE, fields=fields, needs=needs)
    own = machine.own if site.name else disowned_settings(machine.own)
    old = {setting.key: setting.text for setting in write_settings(own)}
    fields = (*_head_differences(wanted, machine), *_differences(old, new))
    return _change(Noun.MACHINE, wanted.name, fields, refusal=_fixed(wanted, machine), needs=needs)


def _needs(wanted: MachineWanted) -> tuple[tuple[Noun, str], ...]:
    network = wanted.settings.network
    return (
        (Noun.TEMPLATE, parse_template_name(wanted.template)[0]),
        *(((Noun.NETWORK, network),) if network else ()),
        *((Noun.PROFILE, name) for name in wanted.profiles),
        *((Noun.MACHINE, name) for name in wanted.settings.depends_on or ()),
    )


def _head(wanted: MachineWanted) -> dict[str, str]:
    head = {
        "template": wanted.template,
        "as": wanted.architecture,
        "command": " ".join(wanted.command or ()) or None,
        "profiles": ",".join(wanted.profiles) or None,
        "running": "false" if wanted.running is False else "true",
    }
    return {key: value for key, value in head.items() if value is not None}


def _head_differences(wanted: MachineWanted, machine: MachineView) -> tuple[Field, ...]:
    """What `switch`, `set profiles=`, `start` and `stop` change."""
    on = machine.state in (State.RUNNING, State.PAUSED)
    pairs = [
        ("as", machine.architecture, wanted.architecture or machine.architecture),
        ("profiles", ",".join(machine.profiles), ",".join(wanted.profiles)),
        ("running", _flag(on), _flag(on if wanted.running is None else wanted.running)),
    ]
    return tuple(Field(key=key, old=old or None, new=new or None) for key, old, new in pairs if old != new)


def _flag(value: bool) -> str:
    return "true" if value else "false"


def _fixed(wanted: MachineWanted, machine: MachineView) -> str | None:
    """What a machine is made with and keeps."""
    name, level = parse_template_name(wanted.template)
    fixed = []
    if name != machine.template.name or (level is not None and level != machine.template.level):
        fixed.append(f"template: {machine.template} → {wanted.template}")
    if wanted.command is not None and wanted.command != machine.command:
        fixed.append(f"command: {' '.join(machine.command) or 'none'} → {' '.join(wanted.command)}")
    init = Init.APP if wanted.init is None and wanted.command else wanted.init
    if init is not None and init is not machine.init:
        fixed.append(f"init: {machine.init.value} → {init.value}")
    return f"{', '.join(fixed)}: that is a machine's own; delete it and make it anew" if fixed else None


# -- the other way round


def site_of(present: Present, names: Sequence[str] = ()) -> Site:
    """The site that applies to no change. With `names` only those machines, and what they stand on.

    It has a name where all of it is owned by one site.
    """
    machines = [view for view in present.machines if not view.ephemeral and (not names or view.name in names)]
    networks = [network for network in present.networks if _is_said(network)]
    profiles = list(present.profiles)
    if names:
        networks = [network for network in networks if network.name in {view.network for view in machines}]
        profiles = [profile for profile in profiles if any(profile.name in view.profiles for view in machines)]
    labels = [view.own.labels or {} for view in machines]
    labels += [network.labels for network in networks] + [profile.labels for profile in profiles]
    owners = {each.get(SITE_LABEL, "") for each in labels}
    newest = _newest(present.templates)
    return Site(
        name=owners.pop() if len(owners) == 1 else "",
        pools=present.pools,
        templates=tuple(TemplateWanted(name=each) for each in sorted({view.template.name for view in machines})),
        networks=tuple(
            msgspec.structs.replace(network_wanted(network), labels=_disowned(network.labels)) for network in networks
        ),
        profiles=tuple(
            Profile(
                name=profile.name,
                description=profile.description,
                labels=_disowned(profile.labels),
                settings=profile.settings,
            )
            for profile in profiles
        ),
        machines=tuple(_wanted(view, newest) for view in machines),
    )


def _disowned(labels: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in labels.items() if key != SITE_LABEL}


def _is_said(network: NetworkView) -> bool:
    """The built-in network is there anyway."""
    return network.name != DEFAULT_NETWORK or bool(network.acl or network.labels)


def _wanted(view: MachineView, newest: Mapping[str, Template]) -> MachineWanted:
    template = newest.get(view.template.name)
    is_newest = template is not None and template.level == view.template.level
    inherent = template.init if template is not None else None
    return MachineWanted(
        name=view.name,
        template=view.template.name if is_newest else str(view.template),
        architecture=view.architecture,
        init=None if view.init is inherent or view.command else view.init,
        command=view.command or None,
        profiles=view.profiles,
        settings=disowned_settings(view.own),
        running=view.state in (State.RUNNING, State.PAUSED),
    )


def disowned_settings(settings: Settings) -> Settings:
    return forget(settings, (f"label.{SITE_LABEL}",))


def settings_change(site: Site, wanted: MachineWanted, own: Settings) -> tuple[Settings, tuple[str, ...]]:
    """What `set` takes over and forgets so that `own` becomes what the site wants."""
    settings = owned_settings(site, wanted.settings)
    kept = {setting.key for setting in write_settings(settings)}
    had = own if site.name else disowned_settings(own)
    return settings, tuple(setting.key for setting in write_settings(had) if setting.key not in kept)
