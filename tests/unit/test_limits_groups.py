"""Writing limits into control groups: both versions on a tree of files, and what failure leaves."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from triarch.errors import Failed, InUse, Unsupported
from triarch.host import limits as module
from triarch.host.cgroup import CgroupTrees
from triarch.host.facts import memory_bytes
from triarch.host.limits import Limits, make_limited_group, set_limits

V2_FILES = {
    "memory.max": "max\n",
    "memory.swap.max": "max\n",
    "memory.current": "104857600\n",
    "memory.stat": "inactive_file 10485760\nactive_file 0\nslab_reclaimable 0\n",
    "cpu.max": "max 100000\n",
    "cpu.weight": "100\n",
    "cpuset.cpus": "\n",
    "pids.max": "max\n",
    "io.weight": "default 100\n",
    "io.max": "",
    "cgroup.procs": "",
    "cgroup.subtree_control": "",
}
NO_LIMIT = 9223372036854771712
V1_FILES = {
    "memory": {"memory.limit_in_bytes": f"{NO_LIMIT}\n", "memory.memsw.limit_in_bytes": f"{NO_LIMIT}\n"},
    "cpu": {"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n", "cpu.shares": "1024\n"},
    "cpuset": {"cpuset.cpus": "0-3\n", "cpuset.mems": "0\n"},
    "pids": {"pids.max": "max\n"},
    "blkio": {"blkio.throttle.read_bps_device": "", "blkio.throttle.write_bps_device": ""},
}
ALL = Limits(
    memory_bytes=256 << 20,
    swap_bytes=0,
    cpus=0.5,
    cpu_weight=200,
    cpu_set="1-2",
    pids=64,
    io_weight=50,
    io_read_bytes_per_second=1 << 20,
    io_write_bytes_per_second=2 << 20,
    device="7:3",
)


def fill(directory: Path, files: dict[str, str]) -> None:
    directory.mkdir(parents=True)
    for name, text in files.items():
        (directory / name).write_text(text)


@pytest.fixture
def v2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    group = tmp_path / "triarch-x/m"
    fill(group, V2_FILES)
    trees = CgroupTrees(version=2, controllers=dict.fromkeys(("cpu", "cpuset", "memory", "pids", "io"), tmp_path))
    monkeypatch.setattr(module, "cgroup_trees", lambda: trees)
    return group


@pytest.fixture
def v1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for controller, files in V1_FILES.items():
        fill(tmp_path / controller / "triarch-x/m", files)
        if controller == "cpuset":
            (tmp_path / "cpuset/triarch-x/cpuset.cpus").write_text("0-3\n")
    trees = CgroupTrees(version=1, controllers={name: tmp_path / name for name in V1_FILES})
    monkeypatch.setattr(module, "cgroup_trees", lambda: trees)
    return tmp_path


def text(path: Path) -> str:
    return path.read_text().strip()


def refuse(monkeypatch: pytest.MonkeyPatch, file: str, number: int) -> None:
    """Let the kernel refuse the first write to `file`."""
    real = Path.write_text
    refused: list[Path] = []

    def write_text(self: Path, data: str, *args: Any, **kwargs: Any) -> int:
        if self.name == file and self not in refused:
            refused.append(self)
            raise OSError(number, "no")
        return real(self, data, *args, **kwargs)

    monkeypatch.setattr(Path, "write_text", write_text)


def test_version_2_gets_every_limit(v2: Path) -> None:
    set_limits("/triarch-x/m", ALL)
    assert {name: text(v2 / name) for name in V2_FILES if not name.startswith(("cgroup", "memory.c", "memory.st"))} == {
        "memory.max": str(256 << 20),
        "memory.swap.max": "0",
        "cpu.max": "50000 100000",
        "cpu.weight": "200",
        "cpuset.cpus": "1-2",
        "pids.max": "64",
        "io.weight": "default 50",
        "io.max": "7:3 rbps=1048576 wbps=2097152",
    }


def test_version_2_loses_every_limit(v2: Path) -> None:
    set_limits("/triarch-x/m", ALL)
    set_limits("/triarch-x/m", Limits(device="7:3"))
    assert text(v2 / "memory.max") == text(v2 / "memory.swap.max") == text(v2 / "pids.max") == "max"
    assert text(v2 / "cpu.max") == "max 100000"
    assert text(v2 / "cpu.weight") == "100"
    assert text(v2 / "cpuset.cpus") == ""
    assert text(v2 / "io.max") == "7:3 rbps=max wbps=max"


def test_version_1_gets_every_limit(v1: Path) -> None:
    (v1 / "blkio/triarch-x/m/blkio.bfq.weight").write_text("100\n")
    set_limits("/triarch-x/m", ALL)
    found = {path.name: text(path) for name in V1_FILES for path in (v1 / name / "triarch-x/m").iterdir()}
    assert found == {
        "memory.limit_in_bytes": str(256 << 20),
        "memory.memsw.limit_in_bytes": str(256 << 20),
        "cpu.cfs_quota_us": "50000",
        "cpu.cfs_period_us": "100000",
        "cpu.shares": "2048",
        "cpuset.cpus": "1-2",
        "cpuset.mems": "0",
        "pids.max": "64",
        "blkio.bfq.weight": "50",
        "blkio.throttle.read_bps_device": "7:3 1048576",
        "blkio.throttle.write_bps_device": "7:3 2097152",
    }


def test_version_1_loses_every_limit(v1: Path) -> None:
    set_limits("/triarch-x/m", Limits(memory_bytes=256 << 20, cpus=0.5, cpu_set="1", pids=64, device="7:3"))
    set_limits("/triarch-x/m", Limits(device="7:3"))
    memory = v1 / "memory/triarch-x/m"
    assert text(memory / "memory.limit_in_bytes") == text(memory / "memory.memsw.limit_in_bytes") == "-1"
    assert text(v1 / "cpu/triarch-x/m/cpu.cfs_quota_us") == "-1"
    assert text(v1 / "cpuset/triarch-x/m/cpuset.cpus") == "0-3", "all that the group above has"
    assert text(v1 / "blkio/triarch-x/m/blkio.throttle.read_bps_device") == "7:3 0"


@pytest.mark.parametrize(("swap_bytes", "both"), [(None, 512 << 20), (0, 256 << 20), (64 << 20, 320 << 20)])
def test_a_memory_limit_bounds_swap(v1: Path, swap_bytes: int | None, both: int) -> None:
    set_limits("/triarch-x/m", Limits(memory_bytes=256 << 20, swap_bytes=swap_bytes))
    assert text(v1 / "memory/triarch-x/m/memory.memsw.limit_in_bytes") == str(both)


def test_swap_alone_can_be_forbidden_on_version_1(v1: Path) -> None:
    set_limits("/triarch-x/m", Limits(swap_bytes=0))
    assert text(v1 / "memory/triarch-x/m/memory.memsw.limit_in_bytes") == str(memory_bytes())


def test_what_the_host_lacks_is_said_before_anything_is_changed(v1: Path) -> None:
    with pytest.raises(Unsupported, match=r"share of the disk: it has no blkio\.bfq\.weight"):
        set_limits("/triarch-x/m", ALL)
    assert text(v1 / "pids/triarch-x/m/pids.max") == "max"


def test_a_refusal_takes_back_what_was_written(v2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_limits("/triarch-x/m", ALL)
    before = {path.name: text(path) for path in v2.iterdir()}
    refuse(monkeypatch, "io.max", errno.ENODEV)
    with pytest.raises(Failed, match="rate of disk I/O"):
        set_limits("/triarch-x/m", Limits(memory_bytes=1 << 30, cpus=2, io_write_bytes_per_second=5000, device="7:3"))
    assert {path.name: text(path) for path in v2.iterdir()} == before


def test_memory_in_use_is_no_failure_of_the_kernel(v1: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    set_limits("/triarch-x/m", Limits(memory_bytes=512 << 20))
    refuse(monkeypatch, "memory.limit_in_bytes", errno.EBUSY)
    with pytest.raises(InUse, match="more than that is in use"):
        set_limits("/triarch-x/m", Limits(memory_bytes=128 << 20))
    memory = v1 / "memory/triarch-x/m"
    assert text(memory / "memory.limit_in_bytes") == str(512 << 20)
    assert text(memory / "memory.memsw.limit_in_bytes") == str(1 << 30)


def test_version_2_never_ends_processes_to_make_a_limit_hold(v2: Path) -> None:
    with pytest.raises(InUse, match="90 MiB are in use"):
        set_limits("/triarch-x/m", Limits(memory_bytes=64 << 20, swap_bytes=0))
    assert text(v2 / "memory.max") == "max"


def test_a_new_group_of_version_1_takes_the_processors_above_it(v1: Path) -> None:
    for name, value in (("cpuset.cpus", "0-3\n"), ("cpuset.mems", "0\n")):
        (v1 / "cpuset" / name).write_text(value)
    for name in V1_FILES:
        (v1 / name / "triarch-x/m/cgroup.procs").touch()
    for name, value in (("cpuset.cpus", "\n"), ("cpuset.mems", "\n")):
        (v1 / "cpuset/triarch-x" / name).write_text(value)
        (v1 / "cpuset/triarch-x/m" / name).write_text(value)
    for fd in make_limited_group("/triarch-x/m", Limits(pids=100)):
        os.close(fd)
    assert text(v1 / "cpuset/triarch-x/m/cpuset.cpus") == "0-3"
    assert text(v1 / "cpuset/triarch-x/m/cpuset.mems") == "0"
    assert text(v1 / "pids/triarch-x/m/pids.max") == "100"
