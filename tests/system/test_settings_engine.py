"""`set`, `unset` and profiles in the engine, on the fake driver."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from engine_rig import Engineer, engineer_at, machine_request, new_engine

from triarch.errors import Busy, Exhausted, Exists, InUse, Invalid, NotFound, WrongState
from triarch.model.machine import SetMachine, SettingChange
from triarch.model.operation import Operation
from triarch.model.policy import HealthCheck, RestartPolicy
from triarch.model.settings import Origin, Profile, SetProfile, Settings


@pytest.fixture
async def web(tmp_path: Path) -> AsyncIterator[Engineer]:
    """An engine with one running machine 'web'."""
    async with engineer_at(tmp_path) as engineer:
        await engineer.launch("web")
        yield engineer


async def set_done(
    engineer: Engineer, name: str, *unset: str, profiles: tuple[str, ...] | None = None, **values: str
) -> str:
    words = {key.replace("__", ".").replace("_", "-"): value for key, value in values.items()}
    answer = await engineer.engine.set(name, SetMachine(values=words, unset=unset, profiles=profiles))
    assert isinstance(answer, Operation)
    return (await engineer.done(answer)).result or ""


async def profile(engineer: Engineer, name: str, **settings: object) -> None:
    made = Profile(name=name, settings=Settings(**settings))  # type: ignore[arg-type]
    await engineer.done(await engineer.engine.profiles.create(made))


async def test_policies_hold_at_once(web: Engineer) -> None:
    told = await set_done(web, "web", restart="always", label__role="front", stop_timeout="5s", protected="true")
    assert "next start" not in told and "restart: always" in told
    view = web.engine.machine("web")
    assert (view.restart, view.labels, view.protected) == (RestartPolicy.ALWAYS, {"role": "front"}, True)
    assert await set_done(web, "web", "label.role", "protected") == "label.role: not set; protected: not set"
    view = web.engine.machine("web")
    assert (view.labels, view.protected, view.restart) == ({}, False, RestartPolicy.ALWAYS)


async def test_environment_of_a_running_machine_counts_from_the_next_start(web: Engineer) -> None:
    assert await set_done(web, "web", env__A="1") == "env.A: 1, takes effect at the next start"


async def test_check_tells_and_changes_nothing(web: Engineer) -> None:
    before = web.engine.machine("web")
    answer = await web.engine.set("web", SetMachine(values={"restart": "always", "env.A": "1"}, check=True))
    assert answer == (
        SettingChange(key="env.A", old=None, new="1", live=False),
        SettingChange(key="restart", old=None, new="always", live=True),
    )
    assert web.engine.machine("web") == before
    assert web.engine.operations()[-1].verb == "launch"


async def test_what_is_wrong_is_refused_before_anything_happens(web: Engineer) -> None:
    before = web.engine.machine("web")
    wrong: list[tuple[dict[str, str], type[Exception], str]] = [
        ({"memori": "1G"}, Invalid, "there is no setting 'memori', did you mean 'memory'"),
        ({"memory": "1"}, Invalid, "illegal memory: it needs a size of at least 16M"),
        ({"memory": "64T"}, Exhausted, "this host has"),
        ({"disk": "64M"}, Invalid, "a disk only grows"),
        ({"depends-on": "web"}, Invalid, "would depend on itself"),
        ({"network": "user"}, WrongState, "that needs stopped"),
        ({"health.interval": "5s"}, Invalid, "a health check needs health.command"),
        ({"fake": "x"}, Invalid, "there is no setting"),
    ]
    for values, kind, message in wrong:
        with pytest.raises(kind, match=message):
            await web.engine.set("web", SetMachine(values={"restart": "always", **values}))
    with pytest.raises(NotFound, match="there is no profile 'base'"):
        await web.engine.set("web", SetMachine(profiles=("base",)))
    with pytest.raises(NotFound, match="there is no machine 'wbe', did you mean 'web'"):
        await web.engine.set("wbe", SetMachine())
    assert web.engine.machine("web") == before


async def test_one_key_of_a_group_changes_the_group_as_it_is_with_the_profiles(web: Engineer) -> None:
    check = HealthCheck(command=("true",))
    before = web.engine.machine("web").own
    await profile(web, "checked", health=check)
    await set_done(web, "web", profiles=("checked",))
    await set_done(web, "web", health__interval="5s")
    own = web.engine.machine("web").own
    assert own.health == HealthCheck(command=("true",), interval_seconds=5)
    await set_done(web, "web", health="none")
    assert web.engine.machine("web").own.health is None
    await set_done(web, "web", "health")
    machine = web.engine._services.machines.get("web")
    assert machine.health == check and machine.own == before


async def test_profiles_add_up_in_order_and_the_machine_counts_most(web: Engineer) -> None:
    await profile(web, "base", labels={"tier": "one", "zone": "a"}, description="base", restart=RestartPolicy.ALWAYS)
    await profile(web, "more", labels={"tier": "two"})
    await set_done(web, "web", profiles=("base", "more"), description="mine")
    view = web.engine.machine("web")
    assert (view.labels, view.description, view.profiles) == ({"tier": "two", "zone": "a"}, "mine", ("base", "more"))
    assert {origin.key: origin.source for origin in view.origins} == {
        "description": "machine",
        "network": "machine",
        "restart": "base",
        "labels.tier": "more",
        "labels.zone": "base",
    }
    assert Origin(key="restart", source="base") in view.origins
    with pytest.raises(Invalid, match="profile 'base' is named twice"):
        await web.engine.set("web", SetMachine(profiles=("base", "base")))


async def test_a_changed_profile_is_applied_to_all_that_have_it(web: Engineer) -> None:
    await profile(web, "base", restart=RestartPolicy.ALWAYS)
    await web.launch("db", start=False)
    for name in ("web", "db"):
        await set_done(web, name, profiles=("base",))
    await web.launch("other")
    request = SetProfile(values={"restart": "on-failure", "env.A": "1"})
    ended = await web.done(await web.engine.profiles.set("base", request))
    assert ended.result == (
        "db: env.A: 1; restart: on-failure\nweb: env.A: 1, takes effect at the next start; restart: on-failure"
    )
    assert [web.engine.machine(name).restart for name in ("web", "db", "other")] == ["on-failure", "on-failure", "no"]
    assert web.engine.profiles.get("base").used_by == ("db", "web")
    with pytest.raises(InUse, match="profile 'base' is in use by 'db', 'web'"):
        await web.engine.profiles.delete("base")
    with pytest.raises(Invalid, match=r"cannot change profile 'base': .*a disk only grows"):
        await web.engine.profiles.set("base", SetProfile(values={"disk": "64M"}))
    for name in ("web", "db"):
        await set_done(web, name, profiles=())
    await web.done(await web.engine.profiles.delete("base"))
    assert web.engine.profiles.all() == ()


async def test_names_of_profiles(web: Engineer) -> None:
    for name in ("machine", "../x", "A", ""):
        with pytest.raises(Invalid, match="illegal profile name"):
            await web.engine.profiles.create(Profile(name=name))
    await profile(web, "base")
    with pytest.raises(Exists, match="profile 'base' exists already"):
        await web.engine.profiles.create(Profile(name="base"))
    with pytest.raises(NotFound, match="did you mean 'base'"):
        web.engine.profiles.get("bse")


async def test_a_disk_grows_while_it_is_stopped(web: Engineer) -> None:
    await web.launch("db", start=False)
    await set_done(web, "db", disk="12G")
    delta = web.engine._services.pool.delta_path(web.engine.machine("db").uuid)
    from triarch.host.grow import filesystem_bytes

    assert delta.stat().st_size == 12 << 30
    assert filesystem_bytes(delta) == 12 << 30
    web.engine._services.pool.check_delta(web.engine.machine("db").uuid)


async def test_a_new_daemon_sees_to_machines_whose_profile_changed(tmp_path: Path) -> None:
    import msgspec

    async with engineer_at(tmp_path) as engineer:
        await profile(engineer, "base", restart=RestartPolicy.ALWAYS)
        request = msgspec.structs.replace(machine_request("web"), profiles=("base",))
        await engineer.done(await engineer.engine.create(request))
        assert engineer.engine.machine("web").restart is RestartPolicy.ALWAYS
        # As if the daemon had ended between the profile's write and its machines.
        await engineer.engine._services.profiles.put(Profile(name="base", settings=Settings(autostart=True)))
        await engineer.engine.close()
        engineer.engine = await new_engine(engineer.engine.instance)
        assert engineer.engine.profiles._reconciling is not None
        await engineer.engine.profiles._reconciling
        view = engineer.engine.machine("web")
        assert (view.restart, view.autostart) == (RestartPolicy.NO, True)


async def test_of_two_at_once_one_is_told_or_both_count(web: Engineer) -> None:
    requests = [SetMachine(values={f"label.n{number}": "x"}) for number in range(10)]

    async def change(request: SetMachine) -> bool:
        try:
            answer = await web.engine.set("web", request)
        except Busy:
            return False
        assert isinstance(answer, Operation)
        await web.done(answer)
        return True

    done = await asyncio.gather(*(change(request) for request in requests))
    assert any(done)
    assert len(web.engine.machine("web").labels) == sum(done)
