"""Site files: what is written is read back, and what there is applies to no change."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec.inspect as mi
from hypothesis import given, settings
from hypothesis import strategies as st
from test_model_round_trips import TEXT, values_of
from test_setting_text import WORDS, any_settings

from triarch.errors import Invalid
from triarch.model.machine import MachineView
from triarch.model.network import AclRule, CreateNetwork, NetworkKind, NetworkView
from triarch.model.request import BuildTemplate
from triarch.model.resources import Resources
from triarch.model.settings import Profile, ProfileView
from triarch.model.site import MachineWanted, Site, TemplateWanted, read_site, site_tree
from triarch.model.site_plan import Action, Present, plan, site_of
from triarch.model.state import State
from triarch.model.template import Init, Template, TemplateRef
from triarch.model.yaml_tree import read_file, write_yaml

AT = datetime(2026, 1, 1, tzinfo=UTC)
RULES = st.lists(values_of(mi.type_info(AclRule)), max_size=2).map(tuple)
TEMPLATES = st.one_of(
    st.builds(TemplateWanted, name=WORDS),
    st.builds(TemplateWanted, name=WORDS, archive=st.from_regex(r"[a-z]{1,8}\.tar", fullmatch=True)),
    st.builds(
        lambda name, packages: TemplateWanted(name=name, build=BuildTemplate(name=name, packages=packages)),
        WORDS,
        st.lists(WORDS).map(tuple),
    ),
)
NETWORKS = st.builds(
    CreateNetwork, name=WORDS, kind=st.sampled_from(NetworkKind), acl=RULES, description=TEXT, dhcp=st.booleans()
)
PROFILES = st.builds(Profile, name=WORDS, description=TEXT, settings=any_settings())
MACHINES = st.builds(
    MachineWanted,
    name=WORDS,
    template=WORDS,
    architecture=st.none() | WORDS,
    init=st.none() | st.sampled_from(Init),
    command=st.none() | st.lists(TEXT, min_size=1, max_size=3).map(tuple),
    profiles=st.lists(WORDS, max_size=2).map(tuple),
    settings=any_settings(),
    running=st.none() | st.booleans(),
)


def named(values: st.SearchStrategy[object]) -> st.SearchStrategy[tuple[object, ...]]:
    return st.lists(values, max_size=2, unique_by=lambda value: value.name).map(tuple)  # type: ignore[attr-defined]


SITES = st.builds(
    Site,
    name=st.just("") | WORDS,
    pools=st.lists(WORDS, max_size=2, unique=True).map(tuple),
    templates=named(TEMPLATES),
    networks=named(NETWORKS),
    profiles=named(PROFILES),
    machines=named(MACHINES),
)


@settings(max_examples=40, deadline=None)
@given(SITES)
def test_what_is_written_is_read_back(site: Site) -> None:
    text = write_yaml(site_tree(site))
    assert read_site([read_file("x", text.encode())]) == site, text


@st.composite
def presents(draw: st.DrawFn) -> Present:
    template = Template(
        name="tiny", level=draw(st.integers(1, 2)), digest="", layers=(), init=Init.SYSTEM, created_at=AT
    )
    older = Template(name="tiny", level=3, digest="", layers=(), init=Init.SYSTEM, created_at=AT)
    profiles = draw(st.lists(PROFILES, max_size=2, unique_by=lambda profile: profile.name))
    networks = draw(st.lists(NETWORKS, max_size=2, unique_by=lambda network: network.name))
    names = draw(st.lists(WORDS, max_size=3, unique=True))
    return Present(
        templates=(template, older),
        profiles=tuple(ProfileView(name=p.name, description=p.description, settings=p.settings) for p in profiles),
        networks=tuple(
            NetworkView(
                name=n.name, index=1, kind=n.kind, acl=n.acl, dhcp=n.dhcp, description=n.description, created_at=AT
            )
            for n in networks
        ),
        machines=tuple(
            draw(st.builds(lambda own, name=name: machine(name, template, own), any_settings())) for name in names
        ),
    )


def machine(name: str, template: Template, own: object) -> MachineView:
    return MachineView(
        name=name,
        uuid=name,
        state=State.RUNNING,
        desired=State.RUNNING,
        architecture="fake",
        template=TemplateRef(name=template.name, level=template.level, digest=""),
        init=Init.SYSTEM,
        address=None,
        mac=None,
        resources=Resources(),
        network="nat",
        command=(),
        own=own,  # type: ignore[arg-type]
        ephemeral=False,
        last_exit=None,
        created_at=AT,
        started_at=None,
        operation=None,
        etag="1",
    )


@settings(max_examples=40, deadline=None)
@given(presents())
def test_what_there_is_applies_to_no_change(present: Present) -> None:
    site = site_of(present)
    text = write_yaml(site_tree(site))
    read = read_site([read_file("x", text.encode())])
    changed = [change for change in plan(read, present, prune=True) if change.changes]
    assert changed == [], text
    assert all(change.action is Action.UNCHANGED for change in plan(read, present))


LINES = """machines: {
machines:
  web:
    template: tiny
    memory: 1G
    env: {A: [1]}
    health: {http: 80}
    first-boot: {users: [{name: x}]}
profiles:
  base: {}
networks: {a: {kind: nat}}
templates: [a]
site: x
- x
?
:
\t
"""


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(LINES.splitlines()) | st.text(max_size=12), max_size=8))
def test_any_text_is_read_or_refused_with_its_line(lines: list[str]) -> None:
    text = "\n".join(lines).encode(errors="replace")
    try:
        read_site([read_file("x", text)])
    except Invalid as error:
        assert error.message.startswith("x")
