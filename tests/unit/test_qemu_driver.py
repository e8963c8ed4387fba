"""What the QEMU driver decides without a process."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from triarch.drivers.base import CAPABILITIES, capabilities_of
from triarch.drivers.qemu.cmdline import memory_bytes, processors
from triarch.drivers.qemu.driver import HostedDriver, KvmDriver
from triarch.errors import Invalid
from triarch.model.driver import Kind
from triarch.model.instance import instance_at
from triarch.model.machine import IdRange, Machine
from triarch.model.resources import Resources
from triarch.model.template import Init, TemplateRef


def machine_with(resources: Resources) -> Machine:
    return Machine(
        name="web",
        uuid="u",
        index=1,
        template=TemplateRef(name="t", level=1, digest="0" * 64),
        architecture="hosted",
        init=Init.APP,
        resources=resources,
        ids=IdRange(base=1 << 20),
        created_at=datetime.now(UTC),
    )


def test_two_architectures_of_two_kinds_with_all_capabilities(tmp_path: Path) -> None:
    hosted, kvm = HostedDriver(instance_at(tmp_path)), KvmDriver(instance_at(tmp_path))
    assert (hosted.name, hosted.kind, kvm.name, kvm.kind) == ("hosted", Kind.HOSTED, "kvm", Kind.BARE_METAL)
    assert capabilities_of(hosted) == capabilities_of(kvm) == tuple(CAPABILITIES)


def test_too_little_memory_is_refused_with_the_rule(tmp_path: Path) -> None:
    with pytest.raises(Invalid, match=r"machine 'web' has 64\.0 MiB of memory; a VM needs at least 128\.0 MiB"):
        HostedDriver(instance_at(tmp_path)).validate(machine_with(Resources(memory_bytes=64 << 20)))


def test_too_many_processors_are_refused(tmp_path: Path) -> None:
    driver = HostedDriver(instance_at(tmp_path))
    driver.validate(machine_with(Resources(cpus=255)))
    with pytest.raises(Invalid, match="256 processors"):
        driver.validate(machine_with(Resources(cpus=255.5)))


@pytest.mark.parametrize(("cpus", "expected"), [(None, 1), (0.1, 1), (1, 1), (1.01, 2), (4, 4)])
def test_processors(cpus: float | None, expected: int) -> None:
    assert processors(Resources(cpus=cpus)) == expected


def test_memory_is_whole_mebibytes_and_has_a_default() -> None:
    assert memory_bytes(Resources()) == 512 << 20
    assert memory_bytes(Resources(memory_bytes=(200 << 20) + 1)) == 201 << 20
