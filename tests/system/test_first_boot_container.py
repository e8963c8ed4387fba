"""The first boot in real containers: a BusyBox tree, and a tree whose `cloud-init` only says what it was given."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from container_rig import archive_of, busybox_tree, skip_without_busybox
from crash_rig import CrashRig, Point, real_daemon, settled

from triarch.client import Client
from triarch.errors import Error, MachineFailed
from triarch.model.machine import CreateMachine
from triarch.model.policy import FirstBoot, FirstFile, FirstUser
from triarch.model.settings import Settings

KEY = "ssh-ed25519 AAAAC3Nza joe@example"
# What the seed held when the machine started, as a cloud-init that can do nothing else shows it.
CLOUD_INIT = """#!/bin/sh
[ "$*" = "status --wait --long" ] || exit 64
cp /var/lib/cloud/seed/nocloud/user-data /root/user-data
grep -q '"runcmd":\\[\\["false"\\]\\]' /root/user-data && { echo "status: error"; exit 1; }
exit 2
"""


def archive(directory: Path, *, cloud_init: bool) -> Path:
    tree = directory / f"tree-{cloud_init}"
    busybox_tree(tree)
    # BusyBox of Debian has no adduser: passwd is written line by line.
    for applet in ("cut", "dirname"):
        (tree / "bin" / applet).symlink_to("busybox")
    (tree / "etc/group").write_text("root:x:0:\nwheel:x:10:other")
    (tree / "etc/shadow").write_text("root:*:19000:0:99999:7:::\n")
    (tree / "etc/shadow").chmod(0o640)
    if cloud_init:
        (tree / "usr/bin").mkdir(parents=True)
        (tree / "usr/bin/cloud-init").write_text(CLOUD_INIT)
        (tree / "usr/bin/cloud-init").chmod(0o755)
    return archive_of(tree)


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CrashRig]:
    skip_without_busybox()
    directory = tmp_path_factory.mktemp("first")
    with real_daemon(directory / "root") as rig:
        with rig.client() as client:
            for name, cloud_init in (("plain", False), ("cloudy", True)):
                client.finish(client.import_template(name, archive(directory, cloud_init=cloud_init)))
        yield rig


@pytest.fixture
def client(rig: CrashRig) -> Iterator[Client]:
    with rig.client() as client:
        yield client
        for view in client.machines():
            client.finish(client.delete(view.name, force=True))


def launch(client: Client, first_boot: FirstBoot, template: str = "plain", *, name: str = "web") -> None:
    settings = Settings(network="none", first_boot=first_boot)
    request = CreateMachine(
        template=template,
        name=name,
        architecture="container",
        init="system",
        settings=settings,
        start=True,  # type: ignore[arg-type]
    )
    client.finish(client.create(request))


def said(client: Client, *command: str) -> str:
    done = client.execute("web", *command)
    assert done.exit.code == 0, done
    return done.stdout.decode()


FULL = FirstBoot(
    users=(
        FirstUser(name="joe", ssh_keys=(KEY,), groups=("wheel", "staff"), sudo=True, password_hash="$6$salt$hash."),
    ),
    ssh_keys=(KEY,),
    files=(
        FirstFile(path="/etc/app/conf", content="a 'quoted' $line\n\ttab\n", mode="0640", owner="joe:wheel"),
        FirstFile(path="/-odd name", content="", mode="4755"),
    ),
    commands=(("sh", "-c", "echo $((6 * 7)) > /root/answer; cat /etc/app/conf >> /root/answer"),),
)


def check_full(client: Client) -> None:
    assert "joe:x:1000:1000::/home/joe:/bin/sh" in said(client, "cat", "/etc/passwd").splitlines()
    assert said(client, "cat", "/etc/group").splitlines() == [
        "root:x:0:",
        "wheel:x:10:other,joe",
        "joe:x:1000:",
        "staff:x:1001:joe",
    ]
    assert "joe:$6$salt$hash.:" in said(client, "cat", "/etc/shadow")
    assert said(client, "stat", "-c", "%a %u:%g", "/etc/app/conf", "/-odd name", "/home/joe/.ssh/authorized_keys") == (
        "640 1000:10\n4755 0:0\n600 1000:1000\n"
    )
    assert said(client, "cat", "/home/joe/.ssh/authorized_keys", "/root/.ssh/authorized_keys") == f"{KEY}\n" * 2
    assert said(client, "cat", "/etc/sudoers.d/90-joe") == "joe ALL=(ALL) NOPASSWD:ALL\n"
    assert said(client, "cat", "/root/answer") == "42\na 'quoted' $line\n\ttab\n"


def test_users_keys_files_and_commands_in_a_tree_without_any_tools(client: Client) -> None:
    launch(client, FULL)
    check_full(client)
    client.finish(client.restart("web"))
    check_full(client)


def test_a_template_without_a_package_manager_says_so(client: Client) -> None:
    with pytest.raises(MachineFailed, match=r"failed at packages nginx \(exit code 69\):\nno package manager is in"):
        launch(client, FirstBoot(packages=("nginx",)))
    assert client.machine("web").state == "failed"


def test_what_a_machine_says_last_is_told(client: Client) -> None:
    with pytest.raises(MachineFailed, match=r"failed at command echo .* \(exit code 7\):\nfirst\nsecond"):
        launch(client, FirstBoot(commands=(("sh", "-c", "echo first; echo second >&2; exit 7"),)))


def test_cloud_init_finds_its_seed_and_is_waited_for(client: Client) -> None:
    assert (client.template("cloudy").cloud_init, client.template("plain").cloud_init) == (True, False)
    launch(client, FirstBoot(ssh_keys=(KEY,), commands=(("true",),)), "cloudy")
    assert said(client, "cat", "/root/user-data").startswith("#cloud-config\n") and KEY in said(
        client, "cat", "/root/user-data"
    )
    seed = "/var/lib/cloud/seed/nocloud"
    assert f'"instance-id":"{client.machine("web").uuid}"' in said(client, "cat", f"{seed}/meta-data")
    assert said(client, "stat", "-c", "%a %u:%g", "/var/lib", seed, f"{seed}/user-data") == (
        "755 0:0\n755 0:0\n600 0:0\n"
    )
    assert "config: disabled" in said(client, "cat", "/etc/cloud/cloud.cfg.d/95-triarch.cfg")


def test_user_data_goes_to_cloud_init_as_it_is_and_its_failure_is_the_machines(client: Client) -> None:
    launch(client, FirstBoot(user_data="#!/bin/sh\nexit 0\n"), "cloudy")
    assert said(client, "cat", "/root/user-data") == "#!/bin/sh\nexit 0\n"
    client.finish(client.delete("web", force=True))
    with pytest.raises(MachineFailed, match=r"failed at cloud-init \(exit code 1\):\nstatus: error"):
        launch(client, FirstBoot(commands=(("false",),)), "cloudy")


@pytest.mark.parametrize("step", ["seed", "first-boot"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_kill_of_the_daemon_amid_the_first_boot_leaves_no_half_made_machine(
    rig: CrashRig, step: str, when: str
) -> None:
    rig.restart(Point("launch", step, when))
    try:
        with rig.client() as client, contextlib.suppress(Error, OSError):
            launch(client, FULL, "cloudy" if step == "seed" else "plain")
        assert rig.died(60)
    finally:
        rig.restart()
    with rig.client() as client:
        settled(client, 60)
        end = time.monotonic() + 10
        while client.machines() and time.monotonic() < end:
            time.sleep(0.05)
        assert client.machines() == ()
        launch(client, FULL)
        check_full(client)
        client.finish(client.delete("web", force=True))
