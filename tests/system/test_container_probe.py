"""What the probe says where a host allows less."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from triarch.model.instance import instance_at

PROBE = """
import asyncio, sys
from triarch.drivers.container.driver import ContainerDriver
from triarch.errors import Unavailable
from triarch.model.instance import instance_at
async def main():
    driver = ContainerDriver(instance_at(sys.argv[1]))
    try:
        print("available", (await driver.probe()).version)
    except Unavailable as error:
        print(f"{error.code}: {error}")
    finally:
        await driver.close()
asyncio.run(main())
"""
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes rights away from root")


def probe(root: Path, *before: str) -> str:
    done = subprocess.run(
        [*before, sys.executable, "-c", PROBE, str(root)], capture_output=True, text=True, timeout=60, check=False
    )
    shutil.rmtree(instance_at(root).run_dir, ignore_errors=True)
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout.strip()


@needs_root
def test_another_user_is_told_to_be_root(tmp_path: Path) -> None:
    plain_user = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    if subprocess.run(
        [*plain_user, sys.executable, "-c", "import triarch"], capture_output=True, check=False
    ).returncode:
        pytest.skip("a plain user cannot read this checkout")
    said = probe(tmp_path, *plain_user)
    assert said == "driver-unavailable: containers need root of the host: user 65534 is not root"


@needs_root
@pytest.mark.parametrize("right", ["sys_admin", "sys_chroot,-setuid,-setgid,-sys_admin", "dac_override,-sys_admin"])
def test_root_without_rights(tmp_path: Path, right: str) -> None:
    said = probe(tmp_path, "setpriv", f"--bounding-set=-{right}")
    assert said.startswith("driver-unavailable: ")
    assert "CAP_SYS_ADMIN" in said


@needs_root
def test_root_of_a_user_namespace_is_not_root(tmp_path: Path) -> None:
    said = probe(tmp_path, "unshare", "--user", "--map-root-user")
    assert said.startswith("driver-unavailable: containers need root of the host: this is root of a user namespace")


@needs_root
def test_no_loop_devices(tmp_path: Path) -> None:
    hide = "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && mknod -m 666 /dev/urandom c 1 9"
    script = f'{hide} && exec "$@"'
    said = probe(tmp_path, "unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh")
    assert said == "driver-unavailable: there are no loop devices: /dev/loop-control is missing"


@needs_root
def test_control_groups_that_cannot_be_written(tmp_path: Path) -> None:
    script = 'mount -o bind,ro / /mnt && mount --bind /mnt/sys /sys/fs/cgroup && exec "$@"'
    said = probe(tmp_path, "unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh")
    assert said.startswith("driver-unavailable: ")


@needs_root
def test_no_crun(tmp_path: Path) -> None:
    crun = shutil.which("crun")
    if crun is None:
        pytest.skip("crun is not installed")
    script = f'mount --bind /dev/null {crun} && exec "$@"'
    said = probe(tmp_path, "unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh")
    assert said == "missing-program: the program 'crun' is not installed"
