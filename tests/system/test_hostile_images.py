"""What a guest wrote into its filesystem, and odd names of the host's, do nothing to the host."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from triarch.host.ext4 import make_delta_image
from triarch.host.ext4_files import MAX_FILE_BYTES, list_files, read_file
from triarch.host.launcher.visit import _mount_read_only
from triarch.host.process import run
from triarch.host.syscalls import CLONE_NEWNS, MS_REC, MS_SLAVE, mount, unshare
from triarch.host.virtiofs import share_folder

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")


def _in_a_mount_namespace_of_its_own(image: Path, place: Path) -> str:
    """How the kernel treats errors of the filesystem."""
    place.mkdir()
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            unshare(CLONE_NEWNS)
            mount(None, "/", None, MS_REC | MS_SLAVE)
            os.chdir(place.parent)
            _mount_read_only(str(image))
            mounts = Path("/proc/mounts").read_text().splitlines()
            device = next(line.split()[0] for line in mounts if line.split()[1] == str(place))
            os.write(write_fd, Path("/proc/fs/ext4", device.removeprefix("/dev/"), "options").read_bytes())
        finally:
            os._exit(0)
    os.close(write_fd)
    os.waitpid(pid, 0)
    with os.fdopen(read_fd) as answer:
        return next(line for line in answer.read().split() if line.startswith("errors="))


def test_a_filesystem_that_wants_a_panic_at_its_first_error_does_not_get_it(tmp_path: Path) -> None:
    image = tmp_path / "delta.raw"
    make_delta_image(image, 64 << 20)
    run(["tune2fs", "-e", "panic", str(image)])
    assert _in_a_mount_namespace_of_its_own(image, tmp_path / "delta") == "errors=remount-ro"


def test_a_terabyte_of_nothing_in_an_image_is_not_read(tmp_path: Path) -> None:
    image = tmp_path / "delta.raw"
    make_delta_image(image, 64 << 20)
    script = f"write {os.devnull} upper/hostname\nset_inode_field upper/hostname size {1 << 40}\n"
    run(["debugfs", "-w", "-f", "-", str(image)], input_bytes=script.encode())
    assert list_files(image, "upper") == ("hostname",)
    assert read_file(image, "upper/hostname") == bytes(MAX_FILE_BYTES)


def _root_of_a_child(pid: int) -> list[str]:
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        return sorted(path.name for path in Path(f"/proc/{child}/root").iterdir())
    return []


def test_a_folder_with_a_comma_in_its_name_is_the_one_that_is_shared(tmp_path: Path) -> None:
    """With the rest of its name taken as options, its neighbour would be: writable, whatever was asked for."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "secret").touch()
    (tmp_path / "data,xattr").mkdir()
    (tmp_path / "data,xattr" / "meant").touch()
    run_directory = tmp_path / "run"
    run_directory.mkdir()
    ours, process = share_folder(str(tmp_path / "data,xattr"), run_directory, "folder", read_only=True)
    try:
        deadline = time.monotonic() + 10
        while (seen := _root_of_a_child(process.pid)) not in (["meant"], ["secret"]) and time.monotonic() < deadline:
            time.sleep(0.05)
    finally:
        ours.close()
        os.waitpid(process.pid, 0)
    assert seen == ["meant"], (run_directory / "folder.log").read_text()
