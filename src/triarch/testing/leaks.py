"""What an instance has on this host now: a test that began with nothing must end with nothing."""

from __future__ import annotations

import os
import re
from pathlib import Path

from triarch.errors import CommandFailed, MissingProgram
from triarch.host.process import run
from triarch.host.syscalls import clone_tree
from triarch.model.instance import Instance

CGROUP_ROOT = Path("/sys/fs/cgroup")


def leaks(instance: Instance) -> tuple[str, ...]:
    """One line for each mount, loop device, interface, firewall table, cgroup, process or run-time file of `instance`.

    The daemon's own socket, pid file and log do not count; nor do files in the state directory.
    """
    return (
        *_mounts(instance),
        *_loop_devices(instance),
        *_interfaces(instance),
        *_tables(instance),
        *_cgroups(instance),
        *_hidden_groups(instance),
        *_processes(instance),
        *_files(instance),
    )


def _mounts(instance: Instance) -> list[str]:
    needles = (instance.run_dir + "/", instance.state_dir + "/")
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [f"mount: {line}" for line in lines if any(needle in line for needle in needles)]


def _loop_devices(instance: Instance) -> list[str]:
    found = []
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            backing = path.read_text().strip()
        except OSError:
            continue
        if backing.startswith(instance.state_dir + "/"):
            found.append(f"loop device: {path.parts[3]} on {backing}")
    return found


def _interfaces(instance: Instance) -> list[str]:
    names = sorted(path.name for path in Path("/sys/class/net").iterdir())
    own = re.compile(rf"{instance.bridge}([mn][0-9].*)?")
    return [f"interface: {name}" for name in names if own.fullmatch(name)]


def _tables(instance: Instance) -> list[str]:
    try:
        listed = run(["nft", "list", "tables"]).decode()
    except (MissingProgram, CommandFailed):
        return []
    return [f"firewall {line}" for line in listed.splitlines() if line.endswith(f"triarch_{instance.tag}")]


def _cgroups(instance: Instance) -> list[str]:
    name = f"triarch-{instance.tag}"
    candidates = [CGROUP_ROOT / name, *CGROUP_ROOT.glob(f"*/{name}")]
    return [f"cgroup: {path}/{child}" for path in candidates if path.is_dir() for child in _subdirectories(path)]


def _hidden_groups(instance: Instance) -> list[str]:
    """What was made in a directory below a control group mount, where nobody sees it (needs root)."""
    try:
        fd = clone_tree(str(CGROUP_ROOT))
    except OSError:
        return []
    try:
        below = Path(f"/proc/self/fd/{fd}")
        return [f"beneath a mount: {path.relative_to(below)}" for path in below.glob(f"*/triarch-{instance.tag}")]
    finally:
        os.close(fd)


def _subdirectories(path: Path) -> list[str]:
    return [child.name for child in path.iterdir() if child.is_dir()]


def _processes(instance: Instance) -> list[str]:
    needles = (instance.run_dir.encode() + b"/", instance.state_dir.encode() + b"/pool/")
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if any(needle in command for needle in needles) and b"triarchd" not in command:
            found.append(f"process: {entry.name} {command.replace(bytes(1), b' ').decode(errors='replace')[:200]}")
    return found


def _files(instance: Instance) -> list[str]:
    found = []
    for name in ("m", "network"):
        path = Path(instance.run_dir) / name
        if path.is_dir():
            found += [f"file: {child}" for child in sorted(path.iterdir())]
    return found
