"""set, unset, profiles, apply and site files on the command line, against a real daemon with the fake architecture."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import msgspec
import pytest

from triarch.client import Client
from triarch.errors import NotFound, Stale, Unavailable, Unsupported
from triarch.model.machine import SetMachine
from triarch.model.network import CreateNetwork, NetworkKind
from triarch.model.settings import Profile, Settings
from triarch.testing.daemon_rig import DaemonRig

MACHINES = 4


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonRig]:
    with DaemonRig(tmp_path_factory.mktemp("instance"), machines=MACHINES) as rig:
        yield rig


@pytest.fixture
def client(rig: DaemonRig) -> Iterator[Client]:
    with rig.client() as client:
        yield client


class Out(Protocol):
    def __call__(self, *words: str, code: int = 0, input_text: str = "", **extra: str) -> str: ...


def out_of(rig: DaemonRig) -> Out:
    """Runs the command line: standard output, or standard error where the exit code is to be another one than 0."""

    def out(*words: str, code: int = 0, input_text: str = "", **extra: str) -> str:
        done = rig.run(*words, input_bytes=input_text.encode(), extra=extra)
        assert done.returncode == code, (words, done.returncode, done.stdout.decode(), done.stderr.decode())
        return (done.stdout if code == 0 else done.stderr).decode()

    return out


@pytest.fixture
def out(rig: DaemonRig) -> Out:
    return out_of(rig)


def test_set_and_unset(out: Out, client: Client) -> None:
    assert out("set", "m0001", "restart=always", "label.role=web") == "label.role: web\nrestart: always\n"
    view = client.machine("m0001")
    assert (view.labels, view.restart) == ({"role": "web"}, "always")
    told = out("set", "m0001", "memory=64M", "label.role=db", "--dry-run")
    assert told == "label.role: web → db\nmemory: not set → 64M\n"
    assert client.machine("m0001") == view
    assert out("unset", "m0001", "label.role", "restart") == "label.role: not set; restart: not set\n".replace(
        "; ", "\n"
    )
    assert client.machine("m0001").own == Settings()
    wrong = out("set", "m0001", "memroy=1G", code=2)
    assert "there is no setting 'memroy', did you mean 'memory'?" in wrong
    assert "it needs KEY=VALUE" in out("set", "m0001", "memory", code=2)
    assert "triarch unset m0001 memory" in out("unset", "m0001", "memory=1", code=2)


def test_options_of_create(out: Out, client: Client, tmp_path: Path) -> None:
    out("profile", "create", "small", "memory=64M", "label.size=small", "--description", "for tests")
    words = (
        "-P",
        "small",
        "-c",
        "restart=always",
        "--label",
        "role=web",
        "-c",
        "env.A=1",
        "-e",
        "B=2",
        "--network=none",
    )
    out("create", "tiny", "made", *words)
    view = client.machine("made")
    assert (view.labels, view.profiles, view.restart) == ({"size": "small", "role": "web"}, ("small",), "always")
    assert view.own.environment == {"A": "1", "B": "2"}
    assert view.resources.memory_bytes == 64 << 20
    assert {origin.key: origin.source for origin in view.origins}["memory_bytes"] == "small"
    assert out("info", "made", "--settings", "-o", "csv") == (
        "setting,value,from\nmemory,64M,small\nenv.A,1,machine\nenv.B,2,machine\nlabel.role,web,machine\n"
        "label.size,small,small\nnetwork,none,machine\nrestart,always,machine\n"
    )
    assert "small" in out("profile", "list") and "for tests" in out("profile", "show", "small")
    assert out("profile", "set", "small", "memory=128M") == "machine made: memory: 128M\n"
    assert client.machine("made").resources.memory_bytes == 128 << 20
    assert out("profile", "unset", "small", "label.size") == "machine made: label.size: not set\n"
    assert "profile 'small' is in use by 'made'" in out("profile", "delete", "small", code=4)
    out("delete", "made")
    assert out("profile", "delete", "small", "--dry-run") == "would delete profile small\n"
    out("profile", "delete", "small")
    with pytest.raises(NotFound):
        client.profiles.get("small")


def test_a_profile_is_edited_in_an_editor(out: Out, client: Client, tmp_path: Path) -> None:
    client.finish(client.profiles.create(Profile(name="edited", settings=Settings(autostart=True))))
    editor = tmp_path / "editor"
    editor.write_text("#!/bin/sh\necho 'memory: 64M' >> \"$1\"\nsleep 0.1; touch -d '1 minute' \"$1\"\n")
    editor.chmod(0o755)
    out("profile", "edit", "edited", EDITOR=str(editor), VISUAL=str(editor))
    assert client.profiles.get("edited").settings == Settings(autostart=True, memory_bytes=64 << 20)
    editor.write_text("#!/bin/sh\necho 'memroy: 64M' >> \"$1\"\ntouch -d '2 minutes' \"$1\"\n")
    wrong = out("profile", "edit", "edited", EDITOR=str(editor), VISUAL=str(editor), code=2)
    assert "edited, line 3: profile 'edited' has no 'memroy', did you mean 'memory'?" in wrong
    before = client.profiles.get("edited")
    client.finish(client.profiles.replace(Profile(name="edited", settings=Settings()), before.etag))
    with pytest.raises(Stale):
        client.profiles.replace(Profile(name="edited"), before.etag)
    client.finish(client.profiles.delete("edited"))


SITE = """\
site: shop
pools: [default]
templates:
  tiny: {}
profiles:
  base:
    about: what all have
    label: {tier: front}
    restart: on-failure
machines:
  web:
    template: tiny
    as: fake
    network: none
    profiles: [base]
    memory: 64M
    env: {LANG: C.UTF-8, VERSION: 1.10}
    depends-on: [db]
    health: {command: [test, -e, /x], interval: 5s, grace: 1h}
  db:
    template: tiny@1
    as: fake
    network: none
    running: false
    snapshots: {every: 1h, keep: 7}
    protected: yes
"""


def test_a_site_is_applied_and_then_it_is_as_it_should_be(out: Out, client: Client, tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(SITE.replace("running: false", "running: true"))
    before = client.machines()
    dry = out("apply", "-f", str(path), "--dry-run")
    assert "+ machine web" in dry and "    memory: 64M" in dry and "3 to create, 2 unchanged" in dry
    assert client.machines() == before
    told = out("apply", "-f", str(path))
    assert told.index("created machine db") < told.index("created machine web") > told.index("created profile base")
    web, db = client.machine("web"), client.machine("db")
    assert (web.state, db.state, web.labels) == ("running", "running", {"tier": "front", "triarch.site": "shop"})
    assert web.own.environment == {"LANG": "C.UTF-8", "VERSION": "1.10"}
    assert db.protected and db.own.snapshots is not None
    assert out("apply", "-f", str(path)) == "5 unchanged\n"
    assert client.machine("web") == web

    path.write_text(SITE.replace("memory: 64M", "memory: 128M").replace("restart: on-failure", "restart: always"))
    told = out("apply", "-f", str(path))
    assert "~ machine web\n    memory: 64M → 128M\n" in told
    assert "~ profile base\n    restart: on-failure → always\n" in told
    assert "running: true → false" in told and "3 to update, 2 unchanged" in told
    assert client.machine("db").state == "stopped"
    assert client.machine("web").resources.memory_bytes == 128 << 20
    assert client.machine("web").restart == "always"
    assert out("apply", "-f", "-", input_text=path.read_text()) == "5 unchanged\n"

    # What is said no more is forgotten.
    path.write_text(path.read_text().replace("    env: {LANG: C.UTF-8, VERSION: 1.10}\n", ""))
    assert "    env.LANG: C.UTF-8 → not set\n" in out("apply", "-f", str(path))
    assert client.machine("web").own.environment in (msgspec.UNSET, {})

    # An owner deletes what it wants no more, and never what is protected.
    path.write_text("site: shop\nprofiles:\n  base: {}\n")
    assert "- machine web" in out("apply", "-f", str(path), "--prune", "--dry-run")
    assert "needs --yes" in out("apply", "-f", str(path), "--prune", code=2)
    told = out("apply", "-f", str(path), "--prune", "-y")
    assert "deleted machine web" in told and "machine db" not in told and "m0001" not in told
    client.finish(client.set("db", SetMachine(values={"protected": "false"})))
    path.write_text("site: shop\n")
    told = out("apply", "-f", str(path), "--prune", "-y")
    assert told.index("deleted machine db") < told.index("deleted profile base")
    assert client.profiles.list() == () and len(client.machines()) == MACHINES


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "machines:\n  web:\n    template: tiny\n    memroy: 1G\n",
            "line 4: machine 'web' has no 'memroy', did you mean 'memory'?",
        ),
        (
            "machines:\n  web:\n    template: tiny\n    memory: 1\n",
            "line 4: illegal memory: it needs a size of at least 16M",
        ),
        ("machines:\n  web: {memory: 1G}\n", "line 2: machine 'web' has no template"),
        ("machines:\n  Web: {template: tiny}\n", "line 2: illegal machine name 'Web'"),
        (
            "machines:\n  web:\n    template: tiny\n    health:\n      intervall: 5s\n",
            "line 5: there is no setting 'health.intervall'",
        ),
        ("machines:\n- web\n", "line 1: it needs to be a mapping of names"),
        ("machnes: {}\n", "line 1: a site file has no 'machnes', did you mean 'machines'?"),
        ("networks:\n  front:\n    kind: natt\n", "line 3: kind: invalid enum value 'natt'"),
        (
            "networks:\n  front:\n    acl:\n    - {direction: ingress, allow: maybe}\n",
            "line 4: acl.0.allow: expected `bool`",
        ),
        (
            "machines:\n  web:\n    template: tiny\n    first-boot:\n      users:\n      - nmae: joe\n",
            "line 6: first-boot: there is no 'users.0.nmae', did you mean 'name'?",
        ),
        ("templates: {x: {build: {suite: sid, packges: [a]}}}", "has no 'packges', did you mean 'packages'?"),
        ("a: &x [1]\nb: *x\n", "line 1: anchors and aliases are not taken"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(out: Out, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(text)
    told = out("apply", "-f", str(path), code=2)
    assert f"{path}, " in told and message in told


def test_endless_input_is_not_read_to_its_end(out: Out) -> None:
    assert "is too long" in out("apply", "-f", "/dev/zero", code=2)


def test_one_that_fails_keeps_only_those_that_need_it(rig: DaemonRig, out: Out, client: Client, tmp_path: Path) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(
        "templates: {absent: {}}\nmachines:\n"
        "  a: {template: absent, network: none}\n"
        "  b: {template: tiny, as: fake, network: none, env: {fake.fail-start: no disk}}\n"
        "  c: {template: tiny, as: fake, network: none, running: false}\n"
        "  m0001: {template: app}\n"
    )
    done = rig.run("apply", "-f", str(path))
    assert done.returncode == 1
    errors, told = done.stderr.decode(), done.stdout.decode()
    assert "template absent: there is no template 'absent', and the file does not say how to make it" in errors
    assert "machine a: it needs template absent, which failed" in errors
    assert "machine b: cannot start machine 'b': no disk" in errors
    assert "machine m0001: template: tiny@1 → app: that is a machine's own" in errors
    assert "created machine c" in told
    client.finish(client.delete("c"))
    assert "there is no pool 'fast'" in out("apply", "-f", "-", code=1, input_text="pools: [fast]")


def test_the_export_of_the_present_state_applies_to_no_change(out: Out, client: Client, tmp_path: Path) -> None:
    out("apply", "-f", "-", input_text=SITE)
    key = tmp_path / "key.pub"
    key.write_text("ssh-ed25519 AAAA joe@example\n")
    out(
        "create",
        "tiny",
        "odd",
        "--ssh-key",
        str(key),
        "--network",
        "none",
        "-c",
        "description=a: b #c",
        "--",
        "sleep",
        "1",
    )
    exported = out("site", "export")
    told = out("apply", "-f", "-", "--dry-run", input_text=exported)
    assert told.count("\n") == 1 and told.endswith(" unchanged\n"), told + exported
    assert out("site", "apply", "-f", "-", input_text=exported) == told
    assert out("export", "-o", "yaml") == exported
    assert "it needs NAME and FILE" in out("export", "web", code=2).replace("export needs", "it needs")
    some = out("site", "export", "web", "db")
    assert some.startswith("site: shop\n") and "odd" not in some
    told = out("apply", "-f", "-", "--dry-run", "--prune", input_text=some)
    assert "unchanged" in told.splitlines()[-1] and "to update" not in told and "to create" not in told
    for name in ("web", "odd"):
        client.finish(client.delete(name, force=True))
    client.finish(client.set("db", SetMachine(values={"protected": "false"})))
    client.finish(client.delete("db", force=True))
    client.finish(client.profiles.delete("base"))


def test_two_hundred_unchanged_machines_take_half_a_second(tmp_path: Path) -> None:
    with DaemonRig(tmp_path / "many", machines=200) as rig:
        out = out_of(rig)
        exported = tmp_path / "site.yaml"
        exported.write_text(out("site", "export"))
        best = 9.0
        for _ in range(5):
            started = time.monotonic()
            assert out("apply", "-f", str(exported)) == "202 unchanged\n"
            best = min(best, time.monotonic() - started)
        # The machine that tests run on is shared; the promise is measured by the bench.
        assert best < 2.0, best
        if os.environ.get("TRIARCH_SHOW"):
            print(f"apply of 200 unchanged machines: {best * 1000:.0f} ms")


def test_networks_of_a_site(out: Out, client: Client) -> None:
    try:
        client.finish(client.networks.create(CreateNetwork(name="probe", kind=NetworkKind.ISOLATED)))
    except (Unavailable, Unsupported) as error:
        pytest.skip(error.message)
    client.finish(client.networks.delete("probe"))
    text = """\
site: shop
networks:
  front:
    kind: isolated
    description: for customers
    acl:
    - {direction: ingress, allow: yes, protocol: tcp, ports: [80, 443]}
    - {direction: ingress, allow: no, peer: 10.0.0.0/8}
machines:
  gate: {template: tiny, as: fake, network: front, running: false}
"""
    told = out("apply", "-f", "-", input_text=text)
    assert told.index("created network front") < told.index("created machine gate")
    network = client.networks.get("front")
    assert (len(network.acl), network.acl[0].ports, network.labels) == (2, (80, 443), {"triarch.site": "shop"})
    assert out("apply", "-f", "-", input_text=text) == "2 unchanged\n"
    assert out("apply", "-f", "-", "--dry-run", input_text=out("site", "export", "gate")).count("\n") == 1
    told = out("apply", "-f", "-", input_text=text.replace("for customers", "for all").replace("[80, 443]", "[80]"))
    assert "description: for customers → for all" in told and "updated network front" in told
    assert client.networks.get("front").acl[0].ports == (80,)
    wrong = out("apply", "-f", "-", code=1, input_text=text.replace("isolated", "nat"))
    assert "kind: isolated → nat: that is a network's own" in wrong
    told = out("apply", "-f", "-", "--prune", "-y", input_text="site: shop\n")
    assert told.index("deleted machine gate") < told.index("deleted network front")
