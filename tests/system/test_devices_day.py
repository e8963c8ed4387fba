"""A machine's devices through the command line: the same data as a container and as a VM, live and from the start."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from container_rig import archive_of
from qemu_rig import make_tree
from site_rig import Site

from triarch.host.ext4 import check_filesystem, make_volume_image
from triarch.host.loop import attach_loop, loop_path
from triarch.host.syscalls import mount, unmount
from triarch.testing.driver.devices import loop_device

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("devices")
    make_tree(root / "tree")
    site = Site(root / "root")
    site.run("template", "import", "tiny", str(archive_of(root / "tree")))
    yield site
    site.run("down")
    shutil.rmtree(site.instance.run_dir, ignore_errors=True)


def inside(site: Site, script: str) -> str:
    return site.run("exec", "a", "--", "sh", "-c", script).strip()


def test_devices_under_both_architectures(site: Site, tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    (folder / "greeting").write_text("hello")
    command = ("--", "sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.2; done")
    site.run("launch", "tiny", "a", "--as", "container", "--network", "none", *command)

    assert "100.0 MiB at /data" in site.run("device", "add", "a", "data", "volume", "path=/data", "size=100M")
    inside(site, "echo kept > /data/file")
    site.run("mount", str(folder), "a:/mnt/shared", "--read-only")
    assert inside(site, "cat /mnt/shared/greeting") == "hello"
    assert "kernel shared; drivers host" in site.run("info", "a")
    with loop_device(tmp_path) as node:
        site.run("device", "add", "a", "raw", "disk", f"source={node}")
        assert inside(site, "head -c 5 /dev/disk/by-name/raw") == "hello"
        site.run("switch", "a", "--to", "hosted")
        refused = "touch /mnt/shared/x 2>&1 | grep -c Read-only"
        assert inside(site, f"cat /data/file; cat /mnt/shared/greeting; {refused}") == "kept\nhello1"
        assert inside(site, "head -c 5 /dev/disk/by-name/raw") == "hello"
        assert "virtio" in site.run("info", "a")
        site.run("device", "remove", "a", "raw")
    site.run("unmount", "a:/mnt/shared")
    assert inside(site, "ls /mnt/shared; echo more >> /data/file") == ""

    site.run("stop", "a")
    uuid = site.machine("a").uuid
    check_filesystem(site.root / f"pool/volumes/{uuid}/data.raw", is_delta=False)
    site.run("switch", "a", "--to", "container")
    site.run("start", "a")
    assert inside(site, "cat /data/file") == "kept\nmore"
    site.run("device", "remove", "a", "data")
    assert inside(site, "ls /data") == ""
    assert "detached" in site.run("device", "list", "a")
    site.run("device", "remove", "a", "data", "--purge")
    assert site.run("device", "list", "a", "-o", "json").strip() == "[]"
    site.run("delete", "a", "--force")
    assert not (site.root / f"pool/volumes/{uuid}").exists()


def test_refusals_say_what_to_do(site: Site, tmp_path: Path) -> None:
    site.run("create", "tiny", "b", "--as", "container", "--network", "none", "--", "sleep", "1000")

    def refused(*arguments: str) -> str:
        done = subprocess.run(
            [*site_argv(site), *arguments], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        )
        assert done.returncode != 0
        return done.stderr

    assert "no directory /nowhere" in refused("device", "add", "b", "x", "folder", "source=/nowhere", "path=/x")
    assert "the kernel's" in refused("device", "add", "b", "x", "volume", "path=/proc/x")
    assert "without . and .." in refused("device", "add", "b", "x", "volume", "path=/a/../b")
    assert "not a character device" in refused("device", "add", "b", "x", "host", "source=/etc/passwd")
    assert "no USB device" in refused("device", "add", "b", "x", "usb", "id=ffff:ffff")
    assert "neither a block device" in refused("device", "add", "b", "x", "disk", "source=/dev/null")
    assert "has no device 'x'" in refused("device", "remove", "b", "x")
    site.run("device", "add", "b", "x", "volume", "path=/x", "size=64M")
    assert "already" in refused("device", "add", "b", "x", "volume", "path=/y")
    assert "is at /x already" in refused("device", "add", "b", "y", "volume", "path=/x")
    with mounted_device(tmp_path) as node:
        assert "is mounted, or in use" in refused("device", "add", "b", "d", "disk", f"source={node}")
    site.run("delete", "b")


@contextmanager
def mounted_device(directory: Path) -> Iterator[str]:
    image, place = directory / "mounted.raw", directory / "place"
    make_volume_image(image, 64 << 20)
    place.mkdir()
    file_fd = os.open(image, os.O_RDWR | os.O_CLOEXEC)
    device_fd = attach_loop(file_fd, str(image), read_only=False)
    os.close(file_fd)
    try:
        mount(loop_path(device_fd), str(place), "ext4")
        node = loop_path(device_fd)
    finally:
        os.close(device_fd)
    try:
        yield node
    finally:
        unmount(str(place))


def site_argv(site: Site) -> list[str]:
    from triarch.testing.daemon_rig import triarch_argv

    return triarch_argv("--root", str(site.root))


def test_a_container_takes_a_device_of_the_host(site: Site) -> None:
    site.run("launch", "tiny", "c", "--as", "container", "--network", "none", "--", "sleep", "1000")
    script = "head -c 0 /dev/fuse && echo opens || echo refused"
    assert "refused" in site.run("exec", "c", "--", "sh", "-c", script)
    site.run("device", "add", "c", "fuse", "host", "source=/dev/fuse")
    assert "opens" in site.run("exec", "c", "--", "sh", "-c", script)
    site.run("device", "remove", "c", "fuse")
    assert "refused" in site.run("exec", "c", "--", "sh", "-c", script)
    site.run("delete", "c", "--force")
