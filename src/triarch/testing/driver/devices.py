"""Devices: plugged in and out of a running machine, there from the start, and kept from leading out of it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
import pytest

from triarch.drivers.base import Hotplug, Inspectable
from triarch.errors import Error, InUse, Unsupported
from triarch.host.ext4 import check_filesystem, make_volume_image
from triarch.host.locks import lock_file
from triarch.host.pidfd import find_by_argument
from triarch.model.device import DiskDevice, FolderDevice, VolumeDevice
from triarch.model.driver import Kind, MachineSpec, ResolvedDevice
from triarch.model.state import Status
from triarch.testing.driver.fixtures import DriverFixtures, request
from triarch.testing.driver_rig import IDLE, DriverRig, FarEnd

VOLUME_BYTES = 64 << 20


class CheckDevices(DriverFixtures):
    """Machines of one harness can be used one after another: a volume is the same under every driver."""

    @pytest.fixture(autouse=True)
    def _needs_devices(self, rig: DriverRig) -> None:
        if not isinstance(rig.driver, Hotplug):
            pytest.skip(f"driver '{rig.driver.name}' lacks the capability 'hotplug'")
        if not rig.harness.real:
            pytest.skip("a fake machine mounts nothing")

    async def test_a_volume_comes_and_goes_and_keeps_its_data(self, rig: DriverRig, tmp_path: Path) -> None:
        spec = await rig.ready()
        volume = make_volume(tmp_path)
        hotplug = plug(rig)
        await hotplug.attach(spec, volume)
        await hotplug.attach(spec, volume)
        assert await run(rig, spec, "echo kept > /srv/data/file; stat -c %u:%g /srv/data/file") == "0:0"
        await hotplug.detach(spec, volume)
        await hotplug.detach(spec, volume)
        assert await run(rig, spec, "ls /srv/data") == ""
        check_volume(volume)
        await hotplug.attach(spec, volume)
        assert await run(rig, spec, "cat /srv/data/file") == "kept"

    async def test_a_volume_is_there_from_the_start_and_clean_after_the_end(
        self, rig: DriverRig, tmp_path: Path
    ) -> None:
        volume = make_volume(tmp_path)
        spec = await with_devices(rig, volume)
        assert await run(rig, spec, "mkdir /srv/data/a && echo 1 > /srv/data/a/b && cat /srv/data/a/b") == "1"
        await rig.driver.stop(spec, rig.seconds(20))
        assert await rig.status(spec) is Status.STOPPED
        check_volume(volume)

    async def test_a_killed_machine_lets_go_of_its_volume(self, rig: DriverRig, tmp_path: Path) -> None:
        volume = make_volume(tmp_path)
        spec = await with_devices(rig, volume)
        await run(rig, spec, "echo 1 > /srv/data/a; sync")
        await rig.driver.kill(spec)
        check_volume(volume)

    async def test_a_volume_in_use_is_not_taken_away(self, rig: DriverRig, tmp_path: Path) -> None:
        spec = await rig.ready()
        volume = make_volume(tmp_path)
        await plug(rig).attach(spec, volume)
        holder = FarEnd(open_ended=True)
        task = asyncio.create_task(
            rig.can_exec.exec(spec, request("cd /srv/data && echo inside && sleep 1000"), holder)
        )
        try:
            await holder.until(b"inside", rig.seconds(20))
            with pytest.raises(InUse):
                await plug(rig).detach(spec, volume)
            assert await run(rig, spec, "echo 1 > /srv/data/a && cat /srv/data/a") == "1"
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    @pytest.mark.parametrize("at_start", [False, True])
    async def test_a_folder_of_the_host_is_shared(self, rig: DriverRig, tmp_path: Path, at_start: bool) -> None:
        with shared_folder(tmp_path) as folder:
            device = folder_device(folder)
            spec = await (with_devices(rig, device) if at_start else with_folder(rig, device))
            assert await run(rig, spec, "cat /mnt/host/greeting; stat -c %u /mnt/host/greeting") == "hello\n0"
            await run(rig, spec, "echo answer > /mnt/host/answer")
            assert (folder / "answer").read_text() == "answer\n"
            assert (folder / "answer").stat().st_uid == 0
            (folder / "late").write_text("late")
            assert await run(rig, spec, "cat /mnt/host/late") == "late"
            await plug(rig).detach(spec, device)
            assert await run(rig, spec, "ls /mnt/host") == ""

    async def test_a_read_only_folder_is_not_written_to(self, rig: DriverRig, tmp_path: Path) -> None:
        with shared_folder(tmp_path) as folder:
            spec = await with_folder(rig, folder_device(folder, read_only=True))
            touch = "touch /mnt/host/x 2>/dev/null || echo no"
            assert await run(rig, spec, f"cat /mnt/host/greeting; {touch}") == "hello\nno"
            assert await run(rig, spec, f"mount -o remount,rw /mnt/host 2>/dev/null; {touch}") == "no"
            assert not (folder / "x").exists()

    async def test_nothing_serves_a_folder_once_the_machine_was_killed(self, rig: DriverRig, tmp_path: Path) -> None:
        with shared_folder(tmp_path) as folder:
            spec = await with_devices(rig, folder_device(folder))
            await rig.die()
            await rig.driver.kill(spec)
            async with asyncio.timeout(rig.seconds(5)):
                while find_by_argument(f"source={folder}"):
                    await asyncio.sleep(0.05)

    async def test_nothing_but_the_folder_is_in_reach(self, rig: DriverRig, tmp_path: Path) -> None:
        with shared_folder(tmp_path) as folder:
            (tmp_path / "secret").write_text("secret")
            (folder / "up").symlink_to("../secret")
            (folder / "absolute").symlink_to(str(tmp_path / "secret"))
            spec = await with_folder(rig, folder_device(folder))
            tried = "for f in up absolute ../secret; do cat /mnt/host/$f 2>/dev/null; done; echo end"
            assert await run(rig, spec, tried) == "end"

    async def test_a_link_at_the_mount_point_leads_no_further_than_the_machine(
        self, rig: DriverRig, tmp_path: Path
    ) -> None:
        outside = tmp_path / "outside"
        outside.mkdir()
        spec = await rig.ready()
        await run(rig, spec, f"mkdir -p /srv; ln -s {outside} /srv/data")
        volume = make_volume(tmp_path)
        # A link that leads nowhere in the machine may be refused.
        with suppress(Error):
            await plug(rig).attach(spec, volume)
        assert not os.path.ismount(outside)
        assert not list(outside.iterdir())

    async def test_a_disk_of_the_host_is_a_block_device(self, rig: DriverRig, tmp_path: Path) -> None:
        with loop_device(tmp_path) as node:
            device = ResolvedDevice(name="raw", device=DiskDevice(source=node), path=node)
            spec = await rig.ready()
            await plug(rig).attach(spec, device)
            disk = "/dev/disk/by-name/raw"
            assert await run(rig, spec, f"dd if={disk} bs=5 count=1 2>/dev/null") == "hello"
            await run(rig, spec, f"printf world | dd of={disk} conv=notrunc,fsync 2>/dev/null")
            assert await run(rig, spec, f"dd if={disk} bs=5 count=1 2>/dev/null") == "world"
            await plug(rig).detach(spec, device)
            assert await run(rig, spec, f"cat {disk} >/dev/null 2>&1 || echo gone") == "gone"
            with Path(node).open("rb") as disk_file:
                assert disk_file.read(5) == b"world"


class CheckHardware(DriverFixtures):
    """What a machine sees is asked of the machine."""

    async def test_a_running_machine_tells_its_hardware(self, rig: DriverRig) -> None:
        if not isinstance(rig.driver, Inspectable):
            pytest.skip(f"driver '{rig.driver.name}' lacks the capability 'hardware'")
        spec = await rig.idle()
        found = await rig.driver.hardware(spec)
        assert found.kernel and found.drivers and found.detail
        if rig.driver.kind is Kind.OS_LEVEL:
            assert (found.kernel, found.drivers) == (("shared",), ("host",))
        elif rig.harness.real:
            assert "virtio" in found.drivers
            assert set(found.kernel) & {"pvh", "kvmclock", "xen"}


def plug(rig: DriverRig) -> Hotplug:
    assert isinstance(rig.driver, Hotplug)
    return rig.driver


async def run(rig: DriverRig, spec: MachineSpec, script: str) -> str:
    """What the script says, when it succeeded."""
    far_end = FarEnd()
    async with asyncio.timeout(rig.seconds(30)):
        exit_ = await rig.can_exec.exec(spec, request(script), far_end)
    assert exit_.code == 0, (exit_, far_end.stdout, far_end.stderr)
    return far_end.stdout.decode().strip()


async def with_devices(rig: DriverRig, *devices: ResolvedDevice) -> MachineSpec:
    """A running machine that has the devices from its start on."""
    spec = await rig.harness.app_machine(IDLE, {})
    spec = rig.remember(msgspec.structs.replace(spec, devices=devices))
    await rig.driver.create(spec)
    await rig.driver.start(spec)
    await rig.until_logged(spec, "ready")
    return spec


async def with_folder(rig: DriverRig, device: ResolvedDevice) -> MachineSpec:
    """A running machine that was given the folder while it ran; where that takes a restart, at its start."""
    spec = await rig.ready()
    try:
        await plug(rig).attach(spec, device)
    except Unsupported as refusal:
        assert "restart" in refusal.message
        return await with_devices(rig, device)
    return spec


def make_volume(directory: Path) -> ResolvedDevice:
    path = directory / "data.raw"
    make_volume_image(path, VOLUME_BYTES)
    return ResolvedDevice(name="data", device=VolumeDevice(path="/srv/data", size_bytes=VOLUME_BYTES), path=str(path))


def check_volume(volume: ResolvedDevice) -> None:
    """Nothing holds it, and its filesystem is whole."""
    fd = lock_file(volume.path)
    try:
        check_filesystem(Path(volume.path), is_delta=False)
    finally:
        os.close(fd)


@contextmanager
def shared_folder(directory: Path) -> Iterator[Path]:
    folder = directory / "shared"
    folder.mkdir()
    (folder / "greeting").write_text("hello\n")
    yield folder


def folder_device(folder: Path, *, read_only: bool = False) -> ResolvedDevice:
    device = FolderDevice(source=str(folder), path="/mnt/host", read_only=read_only)
    return ResolvedDevice(name="host", device=device, path=str(folder))


@contextmanager
def loop_device(directory: Path) -> Iterator[str]:
    """A block device of the host that begins with `hello`."""
    from triarch.host.loop import attach_loop, loop_path

    image = directory / "disk.raw"
    image.write_bytes(b"hello".ljust(1 << 20, b"\0"))
    file_fd = os.open(image, os.O_RDWR | os.O_CLOEXEC)
    try:
        device_fd = attach_loop(file_fd, str(image), read_only=False)
    finally:
        os.close(file_fd)
    try:
        yield loop_path(device_fd)
    finally:
        os.close(device_fd)
