"""A machine on the hardware of real machines: no virtio for its disk and its card, and it says so."""

from __future__ import annotations

import asyncio

import msgspec
import pytest
from qemu_rig import HostedHarness

from triarch.errors import Error
from triarch.guest.pack import ensure_pack
from triarch.model.device import Hardware
from triarch.model.network import Nic, UserLink
from triarch.model.template import Init
from triarch.testing.driver.devices import run
from triarch.testing.driver_rig import DriverRig

pytestmark = pytest.mark.slow
LINK = UserLink(nic=Nic(mac="52:54:00:11:22:33", address="10.0.2.15/24"))


async def test_disk_and_card_are_emulated(tmp_path_factory: pytest.TempPathFactory) -> None:
    try:
        pack = await ensure_pack(lambda progress: None, hardware=Hardware.EMULATED)
    except Error as error:
        pytest.skip(f"there is no guest pack of the generic kernel: {error}")
    harness = HostedHarness(tmp_path_factory.mktemp("emulated"), pack)
    rig = DriverRig(harness)
    spec = harness.machine(init=Init.SYSTEM)
    machine = msgspec.structs.replace(spec.machine, hardware=Hardware.EMULATED)
    spec = rig.remember(msgspec.structs.replace(spec, machine=machine, link=LINK))
    try:
        await rig.driver.start(spec)
        async with asyncio.timeout(rig.seconds(30)):
            assert await run(rig, spec, "basename $(readlink /sys/class/net/eth0/device/driver)") == "e1000"
        assert "10.0.2.15/24" in await run(rig, spec, "ip addr show eth0")
        assert await run(rig, spec, "ls /sys/block | grep -c vd || true") == "0"
        found = await rig.driver.hardware(spec)  # type: ignore[attr-defined]
        assert found.drivers == ("emulated",)
        await run(rig, spec, "echo kept > /root/file; sync")
        await rig.driver.stop(spec, rig.seconds(20))
        harness.pool.check_delta(spec.uuid)
    finally:
        await rig.end()
    assert not list(harness.leaks())
