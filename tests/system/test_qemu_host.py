"""What the QEMU driver asks of the host: programs that outlive us, taps, limits, and the trial of KVM."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from triarch.drivers.qemu import probe
from triarch.drivers.qemu.cmdline import Accelerator
from triarch.errors import DriverUnavailable, Failed, InUse, MissingProgram, NotFound, Unavailable
from triarch.host import cgroup
from triarch.host.kvm import DEVICE, why_guests_do_not_run
from triarch.host.limits import Limits, make_limited_group
from triarch.host.locks import lock_file
from triarch.host.netlink import Netlink
from triarch.host.pidfd import ProcessId, is_alive, send_signal, wait_for_end
from triarch.host.spawn import Detached, Identity, read_process_id, reap, spawn
from triarch.host.tap import open_tap

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root changes users, makes taps and control groups")
UNPRIVILEGED = 1_966_080


class Spawner:
    """Spawns small programs and ends them."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.started: list[ProcessId] = []

    def spawn(self, script: str, *fds: int, **fields: object) -> ProcessId:
        errors = os.open(self.root / "errors", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        process_id = os.open(self.root / "process", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        try:
            argv = fields.pop("argv", ("sh", "-c", script))
            process = spawn(
                Detached(argv=argv, fds=fds, stderr_fd=errors, process_id_fd=process_id, **fields)  # type: ignore[arg-type]
            )
        finally:
            os.close(errors)
            os.close(process_id)
        self.started.append(process)
        return process

    async def run(self, script: str, *fds: int, **fields: object) -> str:
        """Run it to its end; what it said."""
        (self.root / "errors").write_bytes(b"")
        process = self.spawn(script, *fds, **fields)
        async with asyncio.timeout(20):
            await wait_for_end(process)
        return (self.root / "errors").read_text()


@pytest.fixture
def spawner(tmp_path: Path) -> Iterator[Spawner]:
    spawner = Spawner(tmp_path)
    yield spawner
    for process in spawner.started:
        send_signal(process, signal.SIGKILL)
        reap(process.pid)


async def test_it_has_only_the_descriptors_it_was_given(spawner: Spawner, tmp_path: Path) -> None:
    given = [os.open(tmp_path / name, os.O_RDWR | os.O_CREAT) for name in ("a", "b", "c")]
    try:
        process = spawner.spawn("", *reversed(given), argv=("sleep", "100"))
    finally:
        for fd in given:
            os.close(fd)
    has = {link.name: str(link.readlink()) for link in Path(f"/proc/{process.pid}/fd").iterdir()}
    errors = str(tmp_path / "errors")
    assert has == {
        "0": "/dev/null",
        "1": errors,
        "2": errors,
        "3": str(tmp_path / "c"),
        "4": str(tmp_path / "b"),
        "5": str(tmp_path / "a"),
    }


async def test_it_leads_a_session_of_its_own_and_is_known_before_it_begins(spawner: Spawner, tmp_path: Path) -> None:
    process = spawner.spawn("", argv=("sleep", "100"))
    assert read_process_id(tmp_path / "process") == process
    assert os.getsid(process.pid) == process.pid
    assert is_alive(process)
    assert not is_alive(ProcessId(pid=process.pid, start_ticks=process.start_ticks + 1))


async def test_it_outlives_whoever_started_it(tmp_path: Path) -> None:
    program = f"""
import os, sys
from pathlib import Path
from triarch.host.spawn import Detached, spawn
fd = os.open({str(tmp_path / "process")!r}, os.O_RDWR | os.O_CREAT)
spawn(Detached(argv=("sleep", "100"), fds=(), stderr_fd=2, process_id_fd=fd))
os.kill(os.getpid(), 9)
"""
    parent = await asyncio.create_subprocess_exec(sys.executable, "-c", program)
    assert await parent.wait() == -signal.SIGKILL
    process = read_process_id(tmp_path / "process")
    assert process is not None and is_alive(process)
    assert send_signal(process, signal.SIGKILL)
    async with asyncio.timeout(20):
        await wait_for_end(process)
    assert not is_alive(process)


def test_a_program_that_does_not_exist(spawner: Spawner) -> None:
    with pytest.raises(MissingProgram):
        spawner.spawn("", argv=("no-such-program",))


def test_a_failure_before_the_program_begins_is_told(spawner: Spawner) -> None:
    with pytest.raises(Failed, match=r"cannot start sleep: .*Bad file descriptor"):
        spawner.spawn("", 99_999, argv=("sleep", "1"))


@needs_root
async def test_it_has_no_rights(spawner: Spawner) -> None:
    said = await spawner.run(
        "grep -E '^(Uid|Gid|Groups|CapPrm|CapEff|CapAmb):' /proc/self/status",
        identity=Identity(user_id=UNPRIVILEGED, group_id=UNPRIVILEGED),
    )
    values = {line.partition(":")[0]: line.partition(":")[2].split() for line in said.splitlines()}
    assert values["Uid"] == values["Gid"] == [str(UNPRIVILEGED)] * 4
    assert values["Groups"] == []
    assert {*values["CapPrm"], *values["CapEff"], *values["CapAmb"]} == {"0" * 16}


async def test_a_file_that_grows_too_long_fails_the_write_and_not_the_program(spawner: Spawner, tmp_path: Path) -> None:
    target = tmp_path / "long"
    said = await spawner.run(f"head -c 100000 /dev/zero > {target}; ulimit -c; echo went on", max_file_bytes=65536)
    assert target.stat().st_size == 65536
    assert said.splitlines()[-2:] == ["0", "went on"]


async def test_a_lock_that_it_inherits_lives_as_long_as_it(spawner: Spawner, tmp_path: Path) -> None:
    path = tmp_path / "locked"
    path.touch()
    fd = lock_file(path)
    process = spawner.spawn("", fd, argv=("sleep", "100"))
    os.close(fd)
    with pytest.raises(Exception, match="in use"):
        lock_file(path)
    send_signal(process, signal.SIGKILL)
    await wait_for_end(process)
    os.close(lock_file(path))


@needs_root
async def test_limits_hold_from_the_first_instruction(spawner: Spawner, tmp_path: Path) -> None:
    path = f"/triarch-test-{os.getpid()}/one"
    try:
        fds = make_limited_group(path, Limits(memory_bytes=256 << 20, cpus=0.5, pids=7, io_weight=50))
    except Unavailable as error:
        pytest.skip(f"{error}")
    try:
        said = await spawner.run("cat /proc/self/cgroup", cgroup_fds=fds)
        assert path in said
        trees = cgroup.cgroup_trees()
        pids = trees.controllers["pids"] / path.lstrip("/") / "pids.max"
        assert pids.read_text().strip() == "7"
        memory = "memory.max" if trees.version == 2 else "memory.limit_in_bytes"
        assert (trees.controllers["memory"] / path.lstrip("/") / memory).read_text().strip() == str(256 << 20)
    finally:
        for fd in fds:
            os.close(fd)
        for process in spawner.started:
            reap(process.pid)
        assert cgroup.remove(path)
        cgroup.remove_if_empty(os.path.dirname(path))  # noqa: PTH120


@pytest.fixture
def bridge() -> Iterator[str]:
    name = f"tq{os.getpid() % 100000}"
    with Netlink() as netlink:
        netlink.add_bridge(name)
        yield name
        index = netlink.index_of(name)
        if index is not None:
            netlink.delete(index)


@needs_root
def test_a_tap_is_on_its_bridge_and_goes_with_its_descriptor(bridge: str) -> None:
    name = f"{bridge}m1"
    fd = open_tap(name, bridge)
    with Netlink() as netlink:
        (link,) = [link for link in netlink.links() if link.name == name]
        assert link.up and link.master_index == netlink.index_of(bridge)
        with pytest.raises(InUse):
            open_tap(name, bridge)
        os.close(fd)
        assert netlink.index_of(name) is None


@needs_root
def test_a_tap_without_its_bridge_leaves_nothing(bridge: str) -> None:
    with pytest.raises(NotFound, match="no bridge 'nosuch'"):
        open_tap(f"{bridge}m1", "nosuch")
    with Netlink() as netlink:
        assert netlink.index_of(f"{bridge}m1") is None


async def test_tcg_is_tried_with_a_guest() -> None:
    try:
        version = await probe.try_accelerator(Accelerator.TCG, as_others=False)
    except MissingProgram as error:
        pytest.skip(f"{error}")
    assert version[0].isdigit()


async def test_kvm_is_tried_and_never_hangs() -> None:
    began = time.monotonic()
    try:
        await probe.try_accelerator(Accelerator.KVM, as_others=False)
    except MissingProgram as error:
        pytest.skip(f"{error}")
    except DriverUnavailable as error:
        assert "KVM cannot run guests here: " in error.message or "of QEMU" in error.message
    assert time.monotonic() - began < 15


def test_a_short_guest_of_kvm_computes() -> None:
    """The test guest itself is right: where the device opens, a thousand loops pass even if it emulates them."""
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        pytest.skip(f"{DEVICE} does not open here")
    assert why_guests_do_not_run(loops=1000, limit_seconds=20) is None


def test_a_guest_of_kvm_that_takes_too_long_is_given_up() -> None:
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        pytest.skip(f"{DEVICE} does not open here")
    began = time.monotonic()
    reason = why_guests_do_not_run(loops=2**32 - 1, limit_seconds=0.05)
    assert reason is not None and "did not finish within 0.05 s" in reason
    assert time.monotonic() - began < 5
