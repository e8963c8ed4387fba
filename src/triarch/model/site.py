"""Site files: what a person wants there to be, read from YAML and written so that it applies to no change.

site: shop
pools: [default]
templates: {bookworm: {build: {suite: bookworm, packages: [nginx]}}, alpine: {import: alpine.tar.gz}}
networks: {front: {kind: nat, ipv4: 10.9.0.0/24}}
profiles: {small: {memory: 512M}}
machines: {web: {template: bookworm, as: container, profiles: [small], network: front, label: {role: web}}}
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec

from triarch.errors import Invalid
from triarch.model.names import MACHINE_NAME_PATTERN, check_machine_name
from triarch.model.nearest import did_you_mean, nearest
from triarch.model.network import CreateNetwork
from triarch.model.request import BuildTemplate
from triarch.model.setting_forms import BOOLEAN, COMMAND, NAMES, Form, Written, with_truths
from triarch.model.setting_text import GROUPS, KEYS, read_settings, settings_tree
from triarch.model.settings import Profile, Settings
from triarch.model.template import Init, parse_template_name
from triarch.model.yaml_tree import File, Node, find, written

SITE_LABEL = "triarch.site"
NOUNS = ("site", "pools", "templates", "networks", "profiles", "machines")
_TRUTHS = frozenset({"allow", "dhcp", "dns"})
_OWN_KEYS = ("template", "as", "init", "command", "profiles", "running")
_SETTING_NAMES = (*(key.name for key in KEYS), *GROUPS, "labels", "environment", "devices")

T = TypeVar("T", bound=msgspec.Struct)


class TemplateWanted(msgspec.Struct, frozen=True, kw_only=True):
    """A template and how to make it where it is not there; `archive` is a path beside the file. Else it has to be."""

    name: str
    build: BuildTemplate | None = None
    archive: str | None = None


class MachineWanted(msgspec.Struct, frozen=True, kw_only=True):
    """A machine. What is None is left as it is, or to the daemon where the machine is made; made, it is started."""

    name: str
    template: str
    architecture: str | None = None
    init: Init | None = None
    command: tuple[str, ...] | None = None
    profiles: tuple[str, ...] = ()
    settings: Settings = Settings()
    running: bool | None = None


class Site(msgspec.Struct, frozen=True, kw_only=True):
    """All that the files want. `name` owns what is made with it; "" owns nothing."""

    name: str = ""
    pools: tuple[str, ...] = ()
    templates: tuple[TemplateWanted, ...] = ()
    networks: tuple[CreateNetwork, ...] = ()
    profiles: tuple[Profile, ...] = ()
    machines: tuple[MachineWanted, ...] = ()


def read_site(files: Sequence[File]) -> Site:
    """What the files say together. Raises `Invalid` that names file, line and, for a mistyped key, what was meant."""
    sites = [_Reader(file).site() for file in files]
    names = {site.name for site in sites if site.name}
    if len(names) > 1:
        raise Invalid(f"the files are of several sites: {', '.join(sorted(names))}; apply them one by one")
    whole: dict[str, Any] = {"name": names.pop() if names else ""}
    for noun in NOUNS[1:]:
        whole[noun] = tuple(wanted for site in sites for wanted in getattr(site, noun))
        _check_once(noun, [wanted if isinstance(wanted, str) else wanted.name for wanted in whole[noun]])
    return Site(**whole)


def _check_once(noun: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise Invalid(f"{noun.removesuffix('s')} '{name}' is in two files; it needs to be in one")


def profile_at(file: File, name: str) -> Profile:
    """The profile whose settings are the whole of the file."""
    return _Reader(file).profile(name, file.root)


class _Reader:
    """One file."""

    def __init__(self, file: File) -> None:
        self._file = file

    def _fail(self, node: Node, reason: str, hint: str | None = None) -> Invalid:
        return Invalid(f"{self._file.at(node)}: {reason}", hint=hint)

    def site(self) -> Site:
        fields = self._fields(self._file.root, NOUNS, "a site file")
        return Site(
            name=self._site_name(fields["site"]) if "site" in fields else "",
            pools=self._pools(fields.get("pools")),
            templates=self._all(fields.get("templates"), self._template),
            networks=self._all(fields.get("networks"), self._network),
            profiles=self._all(fields.get("profiles"), self.profile),
            machines=self._all(fields.get("machines"), self._machine),
        )

    # -- pieces

    def _fields(self, node: Node, known: Sequence[str], what: str) -> dict[str, Node]:
        """The node's mapping, whose keys are all known."""
        if node.is_empty:
            return {}
        if node.fields is None:
            raise self._fail(node, f"{what} needs to be a mapping")
        for key, inner in node.fields.items():
            if key not in known and not key.startswith(("label.", "env.", "device.", "health.", "snapshots.")):
                raise self._fail(inner, _unknown(key, known, what))
        return node.fields

    def _all(self, node: Node | None, read: Callable[[str, Node], T]) -> tuple[T, ...]:
        if node is None or node.is_empty:
            return ()
        if node.fields is None:
            raise self._fail(node, "it needs to be a mapping of names")
        return tuple(read(name, inner) for name, inner in node.fields.items())

    def _form(self, node: Node, form: Form) -> Any:
        try:
            return form.read(written(node))
        except (ValueError, Invalid) as error:
            raise self._fail(node, f"it needs {form.needs}") from error

    def _name(self, name: str, node: Node, check: Callable[[str], object] = check_machine_name) -> str:
        try:
            check(name)
        except Invalid as error:
            raise self._fail(node, error.message) from error
        return name

    def _site_name(self, node: Node) -> str:
        if node.text is None or not re.match(MACHINE_NAME_PATTERN[:-1] + r"\Z", node.text):
            raise self._fail(node, "a site's name needs lower-case letters, digits and '-'")
        return node.text

    def _settings(self, fields: dict[str, Node]) -> Settings:
        """Every key that is a setting, all in one; only where that fails one after another, to find the line."""
        words = [(key, written(node)) for key, node in fields.items()]
        with contextlib.suppress(Invalid):
            return read_settings(words)
        settings = Settings()
        for key, value in words:
            try:
                settings = read_settings([(key, value)], settings)
            except Invalid as error:
                path = str(error.fields.get("path") or error.fields.get("key") or "").removeprefix(f"{key}.")
                raise self._fail(find(fields[key], path), error.message, error.hint) from error
        return settings

    def _struct(self, node: Node, kind: type[T], what: str, **given: Any) -> T:
        """A struct with `-` for `_` in its keys."""
        known = {field.replace("_", "-"): field for field in kind.__struct_fields__ if field not in given}
        fields = self._fields(node, tuple(known), what)
        values = {known[key]: written(inner) for key, inner in fields.items()}
        try:
            return msgspec.convert({**with_truths(values, _TRUTHS), **given}, kind, strict=False)
        except msgspec.ValidationError as error:
            reason, _, where = str(error).partition(" - at `$.")
            path = re.sub(r"\[(\d+|\.\.\.)\]", r".\1", where.rstrip("`")).replace("_", "-")
            at = find(node, path) if path else node
            raise self._fail(at, f"{path or what}: {reason[:1].lower()}{reason[1:]}") from error

    # -- nouns

    def _pools(self, node: Node | None) -> tuple[str, ...]:
        if node is None or node.is_empty:
            return ()
        if node.fields is not None:
            for name, inner in node.fields.items():
                if not inner.is_empty and inner.fields != {}:
                    raise self._fail(inner, f"pool '{name}' is as it is: nothing of a pool can be changed yet")
            return tuple(node.fields)
        return tuple(self._form(node, NAMES))

    def _template(self, name: str, node: Node) -> TemplateWanted:
        self._name(name, node, parse_template_name)
        if "@" in name:
            raise self._fail(node, f"template '{name}' has a level; it needs a name alone")
        fields = self._fields(node, ("build", "import"), f"template '{name}'")
        if len(fields) > 1:
            raise self._fail(node, f"template '{name}' is built or imported, not both")
        build = archive = None
        if "build" in fields:
            build = self._struct(fields["build"], BuildTemplate, f"build of template '{name}'", name=name)
        if "import" in fields:
            archive = fields["import"].text
            if not archive:
                raise self._fail(fields["import"], "it needs the path of an archive")
        return TemplateWanted(name=name, build=build, archive=archive)

    def _network(self, name: str, node: Node) -> CreateNetwork:
        return self._struct(node, CreateNetwork, f"network '{name}'", name=name, force=False)

    def profile(self, name: str, node: Node) -> Profile:
        self._name(name, node)
        fields = dict(self._fields(node, ("about", *_SETTING_NAMES), f"profile '{name}'"))
        note = fields.pop("about", None)
        return Profile(
            name=name,
            description="" if note is None else note.text or "",
            settings=self._settings(fields),
        )

    def _machine(self, name: str, node: Node) -> MachineWanted:
        self._name(name, node)
        fields = dict(self._fields(node, (*_OWN_KEYS, *_SETTING_NAMES), f"machine '{name}'"))
        own = {key: fields.pop(key) for key in _OWN_KEYS if key in fields}
        if "template" not in own:
            raise self._fail(node, f"machine '{name}' has no template")
        template = self._name(own["template"].text or "", own["template"], parse_template_name)
        if "init" in own and own["init"].text not in [init.value for init in Init]:
            raise self._fail(own["init"], "init needs to be system or app")
        return MachineWanted(
            name=name,
            template=template,
            architecture=(own["as"].text or None) if "as" in own else None,
            init=Init(own["init"].text or "") if "init" in own else None,
            command=tuple(self._form(own["command"], COMMAND)["command"]) if "command" in own else None,
            profiles=tuple(self._form(own["profiles"], NAMES)) if "profiles" in own else (),
            settings=self._settings(fields),
            running=self._form(own["running"], BOOLEAN) if "running" in own else None,
        )


def _unknown(key: str, known: Sequence[str], what: str) -> str:
    near = nearest(key, known, 0.5)
    shown = did_you_mean(near)
    if not near and len(known) < 10:
        shown = f", it has {', '.join(known)}"
    return f"{what} has no '{key[:80]}'{shown}"


# -- writing


def profile_tree(profile: Profile) -> dict[str, Written]:
    """As the file has it below the profile's name."""
    note: dict[str, Written] = {"about": profile.description} if profile.description else {}
    return {**note, **settings_tree(profile.settings)}


def machine_tree(machine: MachineWanted) -> dict[str, Written]:
    tree: dict[str, Written] = {"template": machine.template}
    if machine.architecture is not None:
        tree["as"] = machine.architecture
    if machine.init is not None:
        tree["init"] = machine.init.value
    if machine.command:
        tree["command"] = list(machine.command)
    if machine.profiles:
        tree["profiles"] = list(machine.profiles)
    if machine.running is not None:
        tree["running"] = "true" if machine.running else "false"
    return {**tree, **settings_tree(machine.settings)}


def network_tree(network: CreateNetwork) -> dict[str, Written]:
    defaults = {field.name: field.default for field in msgspec.structs.fields(CreateNetwork)}
    values = msgspec.to_builtins(network)
    return {
        field.replace("_", "-"): _text_tree(value)
        for field, value in values.items()
        if field == "kind" or (field not in ("name", "force") and value not in ([], (), {}, None, defaults[field]))
    }


def _text_tree(value: Any) -> Written:
    if isinstance(value, dict):
        return {key: _text_tree(inner) for key, inner in value.items() if inner not in (None, [], ())}
    if isinstance(value, list | tuple):
        return [_text_tree(inner) for inner in value]
    return str(value).lower() if isinstance(value, bool) else str(value)


def site_tree(site: Site) -> dict[str, Written]:
    """The whole file, as `read_site` reads it."""
    tree: dict[str, Written] = {}
    if site.name:
        tree["site"] = site.name
    if site.pools:
        tree["pools"] = list(site.pools)
    nouns: dict[str, dict[str, Written]] = {
        "templates": {template.name: _template_tree(template) for template in site.templates},
        "networks": {network.name: network_tree(network) for network in site.networks},
        "profiles": {profile.name: profile_tree(profile) for profile in site.profiles},
        "machines": {machine.name: machine_tree(machine) for machine in site.machines},
    }
    return {**tree, **{noun: named for noun, named in nouns.items() if named}}


def _template_tree(template: TemplateWanted) -> Written:
    if template.archive is not None:
        return {"import": template.archive}
    if template.build is None:
        return {}
    build = {key: _text_tree(value) for key, value in msgspec.to_builtins(template.build).items() if value is not None}
    del build["name"]
    return {"build": build}
