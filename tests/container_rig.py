"""Real containers for tests: a tiny template of static busybox, deltas, and the harness for `check_driver`."""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import pytest

from triarch.drivers.container.driver import ContainerDriver
from triarch.host.ext4 import make_delta_image
from triarch.host.process import run
from triarch.model.driver import LayerFile, MachineSpec
from triarch.model.instance import Instance, instance_at
from triarch.model.network import Link, NoLink
from triarch.model.resources import Resources
from triarch.model.template import Init
from triarch.testing.driver_rig import DriverHarness, machine_spec
from triarch.testing.leaks import leaks

BUSYBOX = Path("/bin/busybox")
DELTA_BYTES = 64 << 20
_LAYER_ALIGNMENT = 2 << 20
# What the tests call; busybox knows more.
_APPLETS = """
cat chmod chown chroot cp dd echo env false free grep head hostname id ip kill ln ls mkdir mkfifo mknod mount mv nc
nproc ping ps pwd readlink reboot rm sed seq setsid sh sleep stat stty sync tail test touch tr true umount uname unshare
wc wget yes
"""
# An init in a few lines: says it is up, obeys SIGRTMIN+3 (37) as systemd does, reaps.
_INIT = """#!/bin/sh
trap 'exit 0' 37
echo booted
while :; do sleep 1000 & wait $!; done
"""


def skip_without_busybox() -> None:
    if not BUSYBOX.exists():
        pytest.skip("busybox-static is not installed")
    if os.geteuid():
        pytest.skip("containers need root")


def busybox_tree(tree: Path) -> None:
    """A tree in which `/bin/sh` and the usual commands are one static program."""
    for name in ("bin", "sbin", "dev", "etc", "proc", "root", "run", "sys", "var"):
        (tree / name).mkdir(mode=0o755, parents=True)
    (tree / "tmp").mkdir()
    (tree / "tmp").chmod(0o1777)
    shutil.copy(BUSYBOX, tree / "bin/busybox")
    (tree / "bin/busybox").chmod(0o755)
    for applet in _APPLETS.split():
        (tree / "bin" / applet).symlink_to("busybox")
    (tree / "sbin/init").write_text(_INIT)
    (tree / "sbin/init").chmod(0o755)
    (tree / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    for name in ("hosts", "hostname", "resolv.conf"):
        (tree / "etc" / name).touch()


def archive_of(tree: Path) -> Path:
    """A root file system archive for `template import`, beside the tree; root owns everything in it."""
    archive = tree.with_suffix(".tar")
    run(["tar", "-C", str(tree), "--owner=0", "--group=0", "-cf", str(archive), "."])
    return archive


def pack_layer(tree: Path, image: Path) -> LayerFile:
    """An uncompressed EROFS image of `tree`, padded as pools keep them."""
    run(["mkfs.erofs", "--quiet", "--all-root", "-Enoinline_data", str(image), str(tree)])
    size = -(-image.stat().st_size // _LAYER_ALIGNMENT) * _LAYER_ALIGNMENT
    os.truncate(image, size)
    return LayerFile(digest=hashlib.sha256(image.read_bytes()).hexdigest(), path=str(image), size_bytes=size)


class ContainerHarness(DriverHarness):
    """One instance below `root`, a busybox layer, and as many machines as are asked for."""

    patience = 3.0

    def __init__(self, root: Path) -> None:
        skip_without_busybox()
        self.root = root
        self.instance: Instance = instance_at(root / "state")
        for directory in ("pool/deltas", "pool/layers", "machines"):
            (root / "state" / directory).mkdir(parents=True)
        Path(self.instance.run_dir).mkdir(mode=0o711, parents=True)
        busybox_tree(root / "tree")
        self.layers: tuple[LayerFile, ...] = (
            pack_layer(root / "tree", Path(self.instance.state_dir) / "pool/layers/busybox.erofs"),
        )
        self._blank = root / "blank.raw"
        make_delta_image(self._blank, DELTA_BYTES)
        self._indexes = itertools.count(1)

    def make_driver(self) -> ContainerDriver:
        return ContainerDriver(self.instance)

    async def app_machine(self, command: tuple[str, ...], environment: Mapping[str, str]) -> MachineSpec:
        return self.spec(command, environment=environment)

    async def system_machine(self) -> MachineSpec | None:
        return self.spec((), init=Init.SYSTEM)

    def spec(
        self,
        command: tuple[str, ...],
        *,
        init: Init = Init.APP,
        environment: Mapping[str, str] | None = None,
        resources: Resources | None = None,
        link: Link | None = None,
        layers: Sequence[LayerFile] | None = None,
    ) -> MachineSpec:
        """A machine with a fresh delta."""
        index = next(self._indexes)
        delta = Path(self.instance.state_dir) / f"pool/deltas/{index}.raw"
        shutil.copy(self._blank, delta)
        spec = machine_spec(
            self.instance,
            index=index,
            layers=self.layers if layers is None else layers,
            delta_path=delta,
            architecture="container",
            init=init,
            command=command,
            environment=environment,
        )
        machine = msgspec.structs.replace(spec.machine, resources=resources or Resources())
        return msgspec.structs.replace(spec, machine=machine, link=link or NoLink())

    async def abandon(self, driver: object) -> None:
        """What a SIGKILL of the daemon ends: the launcher, and all that the object watched."""
        assert isinstance(driver, ContainerDriver)
        await driver.close()

    def leaks(self) -> Sequence[str]:
        return leaks(self.instance)

    def close(self) -> None:
        """Remove the instance's run directory."""
        shutil.rmtree(self.instance.run_dir)
