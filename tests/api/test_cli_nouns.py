"""Commands of snapshots, networks and files that nothing else runs, on the fake architecture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from triarch.testing.daemon_rig import DaemonRig


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonRig]:
    with DaemonRig(tmp_path_factory.mktemp("instance")) as rig:
        assert rig.run("create", "tiny", "web", "--network", "none").returncode == 0
        yield rig


def out(rig: DaemonRig, *words: str, code: int = 0) -> str:
    done = rig.run(*words)
    assert done.returncode == code, done.stderr.decode()
    return done.stdout.decode()


def test_snapshots(rig: DaemonRig) -> None:
    out(rig, "snapshot", "create", "web", "before", "--description", "all is well")
    out(rig, "snapshot", "new", "web", "after")
    assert out(rig, "snapshot", "list", "web", "-q").split() == ["before", "after"]
    assert out(rig, "snapshot", "ls", "web", "be*", "--columns", "name,description", "-o", "csv").splitlines() == [
        "name,description",
        "before,all is well",
    ]
    assert json.loads(out(rig, "snapshot", "info", "web", "before", "-o", "json"))["description"] == "all is well"
    out(rig, "snapshot", "rename", "web", "after", "later")
    assert "would delete snapshot later of web" in out(rig, "snapshot", "delete", "web", "later", "--dry-run")
    assert out(rig, "list", "web", "--columns", "snapshots", "-o", "csv") == "snapshots\n2\n"
    out(rig, "snapshot", "delete", "web", "later")
    out(rig, "snapshot", "info", "web", "later", code=3)
    out(rig, "set", "web", "protected=true")
    out(rig, "restore", "web", "before", code=5)
    out(rig, "delete", "--force", "web", code=5)
    out(rig, "set", "web", "protected=false")
    out(rig, "restore", "web", "before")


def test_networks(rig: DaemonRig) -> None:
    out(rig, "network", "create", "back", "--kind", "isolated")
    assert out(rig, "network", "list", "kind=isolated", "-q") == "back\n"
    out(rig, "network", "edit", "back", "--description", "databases")
    assert json.loads(out(rig, "network", "info", "back", "-o", "json"))["description"] == "databases"
    out(rig, "network", "acl", "add", "back", "deny", "ingress", "--peer", "10.0.0.0/8")
    assert "10.0.0.0/8" in out(rig, "network", "acl", "list", "back")
    out(rig, "network", "acl", "remove", "back", "1")
    assert "10.0.0.0/8" not in out(rig, "network", "acl", "list", "back")
    assert "back" in out(rig, "network", "delete", "back", "--dry-run")
    out(rig, "network", "delete", "back")


def test_devices(rig: DaemonRig, tmp_path: Path) -> None:
    out(rig, "device", "add", "web", "src", "folder", f"source={tmp_path}", "path=/srv")
    assert out(rig, "device", "ls", "web", "kind=folder", "-q") == "src\n"
    assert out(rig, "device", "list", "web", "kind=disk", "-q") == ""
    assert out(rig, "device", "remove", "web", "src", "--dry-run") == "would remove device src of web (folder)\n"
    out(rig, "device", "remove", "web", "nothing", "--dry-run", code=3)
    out(rig, "device", "rm", "web", "src")
    assert out(rig, "device", "list", "web", "-q") == ""
