"""The first boot on the fake driver: once, before the machine is called running, and kept failed where it fails."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from engine_rig import Engineer, engineer_at, machine_request

from triarch.engine.first_boot import cloud_config, pieces, seed_files
from triarch.errors import Invalid, Unsupported
from triarch.model.machine import CreateMachine, StopMachine
from triarch.model.policy import FirstBoot, FirstFile, FirstUser
from triarch.model.settings import Settings, add_up
from triarch.model.state import State


@pytest.fixture
async def engineer(tmp_path: Path) -> AsyncIterator[Engineer]:
    async with engineer_at(tmp_path) as engineer:
        yield engineer


def request(name: str, first_boot: FirstBoot, *, start: bool = True) -> CreateMachine:
    base = machine_request(name, start=start)
    return msgspec.structs.replace(base, settings=add_up((base.settings, Settings(first_boot=first_boot))))


async def test_it_is_done_once_and_recorded(engineer: Engineer) -> None:
    first_boot = FirstBoot(commands=(("echo", "one"), ("echo", "two")))
    operation = await engineer.done(await engineer.engine.create(request("web", first_boot)))
    assert operation.verb == "launch"
    assert engineer.engine._services.machines.get("web").first_booted
    await engineer.done(await engineer.engine.stop("web", StopMachine()))
    restarted = await engineer.done(await engineer.engine.start("web"))
    assert restarted.progress.step == "running"


async def test_one_that_fails_is_kept_failed_and_done_again_at_the_next_start(engineer: Engineer) -> None:
    failing = FirstBoot(commands=(("sh", "-c", "echo no luck >&2; exit 3"),))
    message = await engineer.failed(await engineer.engine.create(request("web", failing)))
    assert (
        message == "the first boot of machine 'web' failed at command echo no luck >&2; exit 3 (exit code 3):\nno luck"
    )
    view = engineer.engine.machine("web")
    assert (view.state, view.desired) == (State.FAILED, State.STOPPED)
    assert view.last_exit is not None and "the first boot of machine 'web' failed" in view.last_exit.reason
    assert "no luck" in await engineer.failed(await engineer.engine.start("web"))
    from triarch.model.machine import SetMachine
    from triarch.model.operation import Operation

    operation = await engineer.engine.set("web", SetMachine(values={"first-boot": "none"}))
    assert isinstance(operation, Operation)
    await engineer.done(operation)
    await engineer.done(await engineer.engine.start("web"))
    assert engineer.engine.machine("web").state is State.RUNNING


async def test_a_created_machine_has_its_first_boot_at_its_first_start(engineer: Engineer) -> None:
    first_boot = FirstBoot(commands=(("echo", "one"),))
    await engineer.done(await engineer.engine.create(request("web", first_boot, start=False)))
    assert not engineer.engine._services.machines.get("web").first_booted
    await engineer.done(await engineer.engine.start("web"))
    assert engineer.engine._services.machines.get("web").first_booted


@pytest.mark.parametrize(
    ("first_boot", "message"),
    [
        (FirstBoot(packages=("-o=x",)), "illegal package '-o=x'"),
        (FirstBoot(users=(FirstUser(name="joe", shell="/bin/sh; rm -rf /"),)), "illegal shell"),
        (FirstBoot(users=(FirstUser(name="joe", password_hash="a:b"),)), "illegal password hash of user 'joe'"),
        (FirstBoot(users=(FirstUser(name="joe", groups=("a b",)),)), "illegal group"),
        (FirstBoot(files=(FirstFile(path="/x", content="", owner="root;x"),)), "illegal owner"),
        (FirstBoot(ssh_keys=("ssh-ed25519 A\nssh-rsa B",)), "illegal ssh key"),
        (FirstBoot(commands=((),)), "has no words"),
    ],
)
async def test_what_cannot_be_is_refused_before_there_is_a_machine(
    engineer: Engineer, first_boot: FirstBoot, message: str
) -> None:
    with pytest.raises(Invalid, match=message):
        await engineer.engine.create(request("web", first_boot))
    assert engineer.engine.machines() == ()


async def test_user_data_needs_cloud_init(engineer: Engineer) -> None:
    with pytest.raises(Unsupported, match="template 'tiny@1' carries no cloud-init"):
        await engineer.engine.create(request("web", FirstBoot(user_data="#cloud-config\n")))


FULL = FirstBoot(
    users=(FirstUser(name="joe", ssh_keys=("ssh-ed25519 A joe",), groups=("wheel",), sudo=True, password_hash="$6$x"),),
    ssh_keys=("ssh-ed25519 R root",),
    packages=("nginx",),
    files=(FirstFile(path="/etc/motd", content="hello\n", mode="0600", owner="joe"),),
    commands=(("sh", "-c", "echo done"), ("touch", "/x")),
)


def test_the_order_of_the_work() -> None:
    assert [piece.what for piece in pieces(FULL)] == [
        "user joe",
        "ssh keys of root",
        "ssh keys of joe",
        "file /etc/motd",
        "packages nginx",
        "command echo done",
        "command touch /x",
    ]


async def test_the_seed_of_cloud_init(engineer: Engineer) -> None:
    import yaml

    await engineer.done(await engineer.engine.create(request("web", FirstBoot(), start=False)))
    machine = engineer.engine._services.machines.get("web")
    files = seed_files(machine, FULL)
    seed = "var/lib/cloud/seed/nocloud"
    assert sorted(files) == sorted(
        [f"{seed}/meta-data", f"{seed}/user-data", f"{seed}/vendor-data", "etc/cloud/cloud.cfg.d/95-triarch.cfg"]
    )
    assert yaml.safe_load(files[f"{seed}/meta-data"]) == {"instance-id": machine.uuid, "local-hostname": "web"}
    assert files[f"{seed}/user-data"].startswith(b"#cloud-config\n")
    config = yaml.safe_load(cloud_config(FULL))
    assert config["packages"] == ["nginx"] and config["runcmd"] == [["sh", "-c", "echo done"], ["touch", "/x"]]
    assert [user["name"] for user in config["users"]] == ["joe", "root"]
    assert config["users"][0]["sudo"] and config["write_files"][0]["permissions"] == "0600"
    own = seed_files(machine, FirstBoot(user_data="#!/bin/sh\n"))
    assert own[f"{seed}/user-data"] == b"#!/bin/sh\n"
