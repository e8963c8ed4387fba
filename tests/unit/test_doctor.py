"""`doctor` on any host: every check answers, none ends the others, none takes for ever."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from triarch.drivers import driver_factory
from triarch.engine import doctor
from triarch.errors import DriverUnavailable
from triarch.host import facts, process
from triarch.model.driver import DriverInfo
from triarch.model.instance import Instance, instance_at
from triarch.model.request import Check, CheckStatus


@pytest.fixture
def instance(tmp_path: Path) -> Instance:
    return instance_at(tmp_path / "not" / "made" / "yet")


def by_name(checks: tuple[Check, ...]) -> dict[str, Check]:
    named = {check.name: check for check in checks}
    assert len(named) == len(checks), "names are unique"
    return named


class Unavailable:
    async def probe(self) -> DriverInfo:
        raise DriverUnavailable("the device opens but guests do not run", hint="use hosted")


class Stuck:
    async def probe(self) -> DriverInfo:
        await asyncio.sleep(3600)
        raise AssertionError


class Broken:
    async def probe(self) -> DriverInfo:
        raise RuntimeError("a bug")


async def test_every_prerequisite_and_architecture_has_a_line(instance: Instance) -> None:
    drivers = {"fake": driver_factory("fake")(instance)}
    checks = by_name(await doctor.run_checks(instance, drivers))
    assert checks["architecture fake"].status is CheckStatus.PASS
    wanted = {"kernel", "rights", "control groups", "user namespaces", "device /dev/kvm", "xen", "nat network", "disk"}
    assert wanted <= set(checks)
    assert {f"program {name}" for name in process.PACKAGES} <= set(checks)
    for check in checks.values():
        assert check.detail, check.name
        assert "\n" not in check.detail, check.name


async def test_what_drivers_say_is_passed_on(instance: Instance, caplog: pytest.LogCaptureFixture) -> None:
    drivers = {"container": Unavailable(), "kvm": Unavailable(), "xen": Broken()}
    checks = by_name(await doctor.run_checks(instance, drivers))  # type: ignore[arg-type]
    lost = checks["architecture container"]
    assert lost.status is CheckStatus.FAIL
    assert (lost.detail, lost.fix) == ("the device opens but guests do not run", "use hosted")
    assert checks["architecture kvm"].status is CheckStatus.WARN, "not every host has it"
    assert checks["architecture xen"].status is CheckStatus.FAIL
    assert "the check itself broke: a bug" in checks["architecture xen"].detail
    assert "a bug" in caplog.text, "the log has it in full"


async def test_a_check_that_hangs_ends_neither_the_others_nor_the_patience(
    instance: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "PROBE_SECONDS", 0.2)
    checks = by_name(await doctor.run_checks(instance, {"hosted": Stuck()}))  # type: ignore[dict-item]
    assert checks["architecture hosted"].detail == "no answer in 0.2 seconds"
    assert "kernel" in checks


def test_a_blocked_thread_does_not_hold_up_the_end(instance: Instance) -> None:
    async def scenario() -> Check:
        work = doctor._in_thread(lambda: time.sleep(30))
        return await doctor._bounded("disk", "", 0.1, work)  # type: ignore[arg-type]

    begun = time.monotonic()
    assert asyncio.run(scenario()).detail == "no answer in 0.1 seconds"
    assert time.monotonic() - begun < 10


async def test_a_missing_program_is_named_with_its_package(instance: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(process.PACKAGES, "no-such-program", "no-such-package")
    check = by_name(await doctor.run_checks(instance, {}))["program no-such-program"]
    assert check.status is CheckStatus.FAIL
    assert check.fix == "apt-get install no-such-package"


async def test_a_program_that_is_too_old_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        process.find_program("e2fsck")
    except process.MissingProgram as error:
        pytest.skip(str(error))
    monkeypatch.setitem(doctor._LEAST_VERSIONS, "e2fsck", "1.10")
    assert (await doctor._program("e2fsck")).status is CheckStatus.PASS, "compared as numbers"
    monkeypatch.setitem(doctor._LEAST_VERSIONS, "e2fsck", "99")
    check = await doctor._program("e2fsck")
    assert check.status is CheckStatus.FAIL
    assert "needed is 99" in check.detail


async def test_too_little_disk_is_told(instance: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_SCARCE_BYTES", 1 << 60)
    assert doctor._disk(instance).status is CheckStatus.WARN
    monkeypatch.setattr(doctor, "_NONE_BYTES", 1 << 59)
    assert doctor._disk(instance).status is CheckStatus.FAIL


def test_space_is_that_of_the_nearest_directory_that_exists(tmp_path: Path) -> None:
    space = facts.space_at(tmp_path / "a" / "b")
    assert space.path == tmp_path
    assert 0 < space.free_bytes <= space.total_bytes


def test_filesystems_are_told_apart() -> None:
    assert facts.knows_filesystem("tmpfs")
    assert not facts.knows_filesystem("no-such-filesystem")


async def test_the_version_of_a_program_is_its_own() -> None:
    try:
        process.find_program("e2fsck")
    except process.MissingProgram as error:
        pytest.skip(str(error))
    version = await facts.program_version("e2fsck", 10)
    assert version is not None
    assert version.startswith("1.")
    assert await facts.program_version("tar", 10) is None
