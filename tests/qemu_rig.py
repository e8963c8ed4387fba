"""A tiny template (busybox on EROFS) and whole machines on it, for the tests that really boot."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import msgspec
import pytest

from triarch.drivers.base import Driver
from triarch.drivers.qemu.driver import HostedDriver
from triarch.guest.pack import ensure_pack
from triarch.model.driver import GuestPack, LayerFile, MachineSpec
from triarch.model.instance import Instance, instance_at
from triarch.model.template import Init
from triarch.storage.directory import DirectoryPool
from triarch.testing.driver_rig import DriverHarness, machine_spec
from triarch.testing.leaks import leaks

ALIGNMENT_BYTES = 2 << 20
DELTA_BYTES = 256 << 20
FOLDERS = ("bin", "dev", "etc", "proc", "root", "run", "sbin", "sys", "tmp", "usr/bin", "usr/sbin", "var")


def busybox() -> str:
    """The path of a static busybox, or a skip."""
    path = shutil.which("busybox")
    if path is None or b"not a dynamic" not in subprocess.run(["ldd", path], capture_output=True, check=False).stderr:
        pytest.skip("a static busybox is not installed (apt-get install busybox-static)")
    return path


def make_tree(root: Path) -> Path:
    """A tree that a guest can run: busybox under all its names, a user, and an init that heeds SIGTERM."""
    for folder in FOLDERS:
        (root / folder).mkdir(parents=True)
    (root / "tmp").chmod(0o1777)
    shutil.copy(busybox(), root / "bin/busybox")
    applets = subprocess.run([busybox(), "--list"], capture_output=True, text=True, check=True).stdout.split()
    for applet in set(applets) - {"busybox"}:
        (root / "bin" / applet).symlink_to("busybox")
    (root / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\n")
    (root / "sbin/init").symlink_to("../bin/busybox")
    (root / "etc/inittab").write_text("::sysinit:/bin/echo up\n::respawn:/bin/sleep 1000\n")
    return root


def make_layer(pool: DirectoryPool, tree: Path) -> LayerFile:
    """The tree as Triarch packs it: uncompressed EROFS, no inline data, padded for virtio-pmem."""
    image = tree.with_suffix(".erofs")
    subprocess.run(
        ["mkfs.erofs", "-Enoinline_data", "--all-root", str(image), str(tree)], check=True, capture_output=True
    )
    padded = -(-image.stat().st_size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    with image.open("r+b") as file:
        file.truncate(padded)
    layer = pool.add_layer(image)
    return LayerFile(digest=layer.digest, path=str(pool.layer_path(layer.digest)), size_bytes=layer.size_bytes)


@cache
def guest_pack() -> GuestPack:
    """The real one, built if the cache has none; a skip where that is not possible."""
    from triarch.errors import Error

    try:
        return asyncio.run(ensure_pack(lambda progress: None))
    except Error as error:
        pytest.skip(f"there is no guest pack: {error}")


class HostedHarness(DriverHarness):
    """Machines with a delta each, on one layer."""

    patience = 6.0

    def __init__(self, root: Path, pack: GuestPack) -> None:
        self.instance: Instance = instance_at(root)
        self.pool = DirectoryPool("check", root / "pool")
        self.pool.prepare()
        self.layer = make_layer(self.pool, make_tree(root / "tree"))
        self.pack = pack
        self._index = 0

    def make_driver(self) -> Driver:
        return HostedDriver(self.instance)

    async def app_machine(self, command: tuple[str, ...], environment: Mapping[str, str]) -> MachineSpec:
        return self.machine(command=command, environment=dict(environment))

    async def system_machine(self) -> MachineSpec | None:
        return self.machine(init=Init.SYSTEM)

    def machine(self, **fields: object) -> MachineSpec:
        self._index += 1
        spec = machine_spec(
            self.instance,
            index=self._index,
            layers=(self.layer,),
            delta_path="",
            architecture="hosted",
            **fields,  # type: ignore[arg-type]
        )
        delta = self.pool.create_delta(spec.uuid, DELTA_BYTES)
        machine = msgspec.structs.replace(
            spec.machine, resources=msgspec.structs.replace(spec.machine.resources, memory_bytes=128 << 20)
        )
        return msgspec.structs.replace(spec, delta_path=str(delta), guest_pack=self.pack, machine=machine)

    async def abandon(self, driver: Driver) -> None:
        """The kernel closes the sockets of a daemon that dies; `close` does no more than that."""
        await driver.close()

    def leaks(self) -> Sequence[str]:
        """Run directories are the engine's to remove: empty ones are no leak of the driver."""
        run_dir = Path(self.instance.run_dir)
        for directory in (*run_dir.glob("m/*"), run_dir / "m", run_dir):
            with suppress(OSError):
                directory.rmdir()
        return leaks(self.instance)
