"""Snapshots, differences, copies and backups of a real container, by the command line, over real connections."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from container_rig import archive_of, busybox_tree, skip_without_busybox
from crash_rig import CrashRig, real_daemon

from triarch.errors import DaemonUnavailable

SLEEP = "trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done"
STATUS = "Package: demo\nStatus: install ok installed\nArchitecture: all\nVersion: {}\n"


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CrashRig]:
    skip_without_busybox()
    directory = tmp_path_factory.mktemp("snapshots")
    tree = directory / "tree"
    busybox_tree(tree)
    (tree / "var/lib/dpkg/info").mkdir(parents=True)
    (tree / "var/lib/dpkg/status").write_text(STATUS.format("1.0"))
    (tree / "var/lib/dpkg/info/demo.list").write_text("/.\n/etc\n/etc/demo\n")
    (tree / "etc/demo").write_text("1.0")
    with real_daemon(directory / "root") as rig:
        out(rig, "template", "import", "tiny", str(archive_of(tree)))
        out(rig, "launch", "tiny", "web", "--as", "container", "--network", "none", "--", "sh", "-c", SLEEP)
        yield rig


def out(rig: CrashRig, *words: str) -> str:
    done = rig.run(*words)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def say(rig: CrashRig, name: str, script: str) -> str:
    return out(rig, "exec", name, "--", "sh", "-c", script).strip()


def test_a_difference_names_files_and_packages(rig: CrashRig) -> None:
    out(rig, "snapshot", "create", "web", "before")
    status = STATUS.format("2.0")
    say(rig, "web", f"printf '{status}' > /var/lib/dpkg/status; echo 2.0 > /etc/demo; echo x > /new; rm /bin/yes")
    found = json.loads(out(rig, "snapshot", "diff", "web", "before", "-o", "json"))
    assert found["packages"] == [{"name": "demo", "old_version": "1.0", "new_version": "2.0"}]
    files = {each["path"]: (each["change"], each["package"]) for each in found["files"]}
    assert files == {
        "/etc/demo": ("changed", "demo"),
        "/new": ("added", ""),
        "/bin/yes": ("removed", ""),
        "/var/lib/dpkg/status": ("changed", ""),
    }
    shown = out(rig, "snapshot", "diff", "web", "before")
    assert "package demo: 1.0 -> 2.0" in shown and "+ /new" in shown and "- /bin/yes" in shown
    out(rig, "restore", "web", "before")
    assert say(rig, "web", "cat /etc/demo; ls /bin/yes") == "1.0/bin/yes"
    assert json.loads(out(rig, "snapshot", "diff", "web", "before", "-o", "json"))["packages"] == []


def test_a_copy_of_a_running_machine_has_an_identity_of_its_own(rig: CrashRig) -> None:
    say(rig, "web", "echo 0123456789abcdef0123456789abcdef > /etc/machine-id; echo kept > /note")
    out(rig, "copy", "web", "twin", "--start")
    assert say(rig, "twin", "cat /note") == "kept"
    assert say(rig, "twin", "cat /etc/machine-id") != say(rig, "web", "cat /etc/machine-id")
    out(rig, "delete", "--force", "twin")


def test_a_backup_is_taken_up_where_it_broke_off(rig: CrashRig, tmp_path: Path) -> None:
    say(rig, "web", "dd if=/dev/urandom of=/big bs=1M count=8 2>/dev/null; sum=1; echo carried > /note")
    file = tmp_path / "web.triarch"
    out(rig, "export", "web", str(file), "--with-template")
    with rig.client() as client:
        backup_id = client.finish(client.backups.export("web")).result or ""

        def break_off(done: int, total: int) -> None:
            if done > total // 2:
                raise KeyboardInterrupt

        second = tmp_path / "second.triarch"
        with pytest.raises(KeyboardInterrupt):
            client.backups.download(backup_id, second, break_off)
        part = Path(f"{second}.part").stat().st_size
        assert part > 0
        client.close()
    with rig.client() as client:
        begun: list[int] = []
        client.backups.download(backup_id, second, lambda done, total: begun.append(done))
        assert min(begun) > part
        with pytest.raises(KeyboardInterrupt):
            client.backups.upload(second, break_off)
        client.close()
    with rig.client() as client:
        begun.clear()
        client.backups.upload(second, lambda done, total: begun.append(done))
        assert begun and min(begun) > 1 << 20
        client.backups.delete(backup_id)
    out(rig, "import", str(file), "back", "--start")
    assert say(rig, "back", "cat /note") == "carried"
    out(rig, "delete", "--force", "back")


def test_a_daemon_that_is_killed_while_a_machine_is_frozen_leaves_it_going(rig: CrashRig) -> None:
    from crash_rig import Point

    rig.restart(Point("snapshot", "seal", "before"))
    with rig.client() as client, pytest.raises((DaemonUnavailable, OSError)):
        client.wait(client.snapshots.create("web"))
    assert rig.died(30)
    rig.restart()
    assert say(rig, "web", "echo on > /note; cat /note") == "on"
