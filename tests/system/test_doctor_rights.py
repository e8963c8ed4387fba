"""`doctor` with less and less: as a plain user, as root of a user namespace, without /proc, without /dev."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from triarch.model.request import Check, CheckStatus

PROGRAM = """
import asyncio, sys, msgspec
from triarch.engine.doctor import run_checks
from triarch.model.instance import instance_at
print(msgspec.json.encode(asyncio.run(run_checks(instance_at(sys.argv[1]), {}))).decode())
"""
PLAIN_USER = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--")
NAMESPACE_ROOT = ("unshare", "--user", "--map-root-user", "--net", "--")

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: to give rights up one by one")


def hiding(directory: str) -> tuple[str, ...]:
    return ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {directory} && exec "$@"', "sh")


def examine(prefix: tuple[str, ...], root: str = "/nonexistent/triarch") -> dict[str, Check]:
    done = subprocess.run(
        [*prefix, sys.executable, "-c", PROGRAM, root],
        capture_output=True,
        text=True,
        timeout=120,
        cwd="/",
        check=False,
    )
    if done.returncode and not done.stdout and "triarch" not in done.stderr:
        pytest.skip(f"{prefix[0]} does not work here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return {check.name: check for check in msgspec.json.decode(done.stdout, type=tuple[Check, ...])}


def test_a_plain_user_is_told_what_is_missing() -> None:
    if subprocess.run(
        [*PLAIN_USER, sys.executable, "-c", "import triarch"], capture_output=True, check=False
    ).returncode:
        pytest.skip("a plain user cannot read this checkout")
    checks = examine(PLAIN_USER)
    for name in ("rights", "nat network", "disk"):
        assert checks[name].status is CheckStatus.FAIL, name
        assert checks[name].fix, name
    assert checks["rights"].detail.startswith("user 65534")
    assert "CAP_NET_ADMIN" in checks["nat network"].detail
    assert checks["firewall"].status is CheckStatus.WARN
    assert checks["program tar"].status is CheckStatus.PASS


def test_root_of_a_user_namespace_is_not_taken_for_root() -> None:
    rights = examine(NAMESPACE_ROOT)["rights"]
    assert rights.status is CheckStatus.FAIL
    assert "root of a user namespace" in rights.detail


@pytest.mark.parametrize(("directory", "fix"), [("/proc", "mount -t proc"), ("/dev", "mount -t devtmpfs")])
def test_a_host_that_hides_its_system_files_is_told_so(directory: str, fix: str) -> None:
    checks = examine(hiding(directory))
    assert checks["system files"].status is CheckStatus.FAIL
    assert (checks["system files"].fix or "").startswith(fix)


def test_root_passes_and_changes_nothing(tmp_path: Path) -> None:
    before = sorted(path.name for path in Path("/sys/class/net").iterdir() if path.name.startswith("tri"))
    checks = examine((), str(tmp_path / "state"))
    assert checks["disk"].status is not CheckStatus.FAIL
    assert not (tmp_path / "state").exists()
    after = sorted(path.name for path in Path("/sys/class/net").iterdir() if path.name.startswith("tri"))
    assert [name for name in after if name.endswith("p") and name not in before] == []
