"""Where control groups are, from a host's table of mounts."""

from __future__ import annotations

from pathlib import Path

from triarch.host.cgroup import parse_mountinfo

V1 = """\
30 25 0:26 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:7 - cgroup cgroup rw,cpu,cpuacct
32 30 0:28 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
33 30 0:29 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,release_agent=/lib/agent,name=systemd
"""
HYBRID = V1 + "34 30 0:30 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw,nsdelegate\n"
V2 = "30 25 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


def test_version_1() -> None:
    trees = parse_mountinfo(V1)
    assert trees.version == 1
    assert trees.hybrid_root is None
    assert trees.controllers == {
        "cpu": Path("/sys/fs/cgroup/cpu,cpuacct"),
        "cpuacct": Path("/sys/fs/cgroup/cpu,cpuacct"),
        "memory": Path("/sys/fs/cgroup/memory"),
        "name=systemd": Path("/sys/fs/cgroup/systemd"),
    }
    assert len(trees.roots) == 3


def test_hybrid() -> None:
    trees = parse_mountinfo(HYBRID)
    assert (trees.version, trees.hybrid_root) == (1, Path("/sys/fs/cgroup/unified"))


def test_version_2() -> None:
    assert parse_mountinfo(V2).version == 2


def test_none() -> None:
    assert parse_mountinfo("25 1 254:0 / / rw - ext4 /dev/vda rw\n").controllers == {}
