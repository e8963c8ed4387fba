"""Real VMs beyond the contract of drivers: their rights, their network, and ends that nobody asked for."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from ipaddress import IPv4Interface
from pathlib import Path

import msgspec
import pytest
from qemu_rig import HostedHarness, guest_pack

from triarch.drivers.qemu.driver import HostedDriver
from triarch.drivers.qemu.run import Run
from triarch.errors import Busy, MachineFailed
from triarch.host.cgroup import cgroup_trees
from triarch.host.locks import lock_file
from triarch.host.netlink import Netlink
from triarch.host.pidfd import ProcessId, is_alive
from triarch.host.process import run_async
from triarch.host.spawn import read_process_id
from triarch.model.driver import MachineSpec, Observation
from triarch.model.network import BridgeLink, Forward, Nic, UserLink
from triarch.model.resources import Resources
from triarch.model.state import Status
from triarch.testing.driver_rig import IDLE, shell

pytestmark = pytest.mark.slow
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root changes users, makes taps and control groups")
SECONDS = 90


class Lab:
    """Machines of one instance, all gone at the end."""

    def __init__(self, harness: HostedHarness) -> None:
        self.harness = harness
        self.driver = HostedDriver(harness.instance)
        self.specs: list[MachineSpec] = []

    def spec(self, script: str | None = None, **fields: object) -> MachineSpec:
        spec = self.harness.machine(command=IDLE if script is None else shell(script))
        spec = msgspec.structs.replace(spec, **fields)
        self.specs.append(spec)
        return spec

    async def started(self, script: str | None = None, **fields: object) -> MachineSpec:
        spec = self.spec(script, **fields)
        await self.driver.start(spec)
        return spec

    async def ready(self, script: str | None = None, **fields: object) -> MachineSpec:
        spec = await self.started(script, **fields)
        await self.logged(spec, "ready")
        return spec

    async def logged(self, spec: MachineSpec, text: str) -> None:
        async with asyncio.timeout(SECONDS):
            while text not in self.log(spec):
                assert (await self.driver.observe(spec)).status is Status.RUNNING, self.log(spec)
                await asyncio.sleep(0.05)

    def log(self, spec: MachineSpec) -> str:
        path = Path(spec.log_path)
        return path.read_text(errors="replace") if path.exists() else ""

    async def ended(self, spec: MachineSpec) -> Observation:
        async with asyncio.timeout(SECONDS):
            while (seen := await self.driver.observe(spec)).status is not Status.STOPPED:
                await asyncio.sleep(0.05)
        return seen

    def process(self, spec: MachineSpec) -> ProcessId:
        process = Run.of(spec).process()
        assert process is not None
        return process

    async def close(self) -> None:
        for spec in self.specs:
            await self.driver.kill(spec)
            await self.driver.delete(spec)
        await self.driver.close()


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> HostedHarness:
    pack = guest_pack()
    return HostedHarness(tmp_path_factory.mktemp("vm"), pack)


@pytest.fixture
async def lab(harness: HostedHarness) -> AsyncIterator[Lab]:
    lab = Lab(harness)
    yield lab
    await lab.close()
    assert not harness.leaks()


@needs_root
async def test_qemu_has_no_rights_and_opens_nothing_of_others(lab: Lab) -> None:
    spec = await lab.ready()
    process = lab.process(spec)
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines() if ":" in line
    )
    base = str(spec.machine.ids.base)
    assert status["Uid"].split() == status["Gid"].split() == [base] * 4
    assert status["Groups"].split() == []
    assert {status[name].strip() for name in ("CapPrm", "CapEff", "CapAmb")} == {"0" * 16}
    assert status["NoNewPrivs"].strip() == "1" and status["Seccomp"].strip() == "2"
    assert os.getsid(process.pid) == process.pid
    assert (Path(spec.run_dir) / "run.json").stat().st_mode & 0o077 == 0
    groups = Path(f"/proc/{process.pid}/cgroup").read_text()
    assert spec.cgroup in groups


@needs_root
async def test_limits_are_what_was_asked_for(lab: Lab) -> None:
    spec = lab.spec()
    resources = Resources(cpus=0.5, memory_bytes=256 << 20)
    spec = msgspec.structs.replace(spec, machine=msgspec.structs.replace(spec.machine, resources=resources))
    await lab.driver.start(spec)
    trees = cgroup_trees()
    if trees.version != 1:
        pytest.skip("reads the files of version 1")
    quota = trees.controllers["cpu"] / spec.cgroup.lstrip("/") / "cpu.cfs_quota_us"
    assert quota.read_text().strip() == "50000"
    limit = int((trees.controllers["memory"] / spec.cgroup.lstrip("/") / "memory.limit_in_bytes").read_text())
    assert 256 << 20 < limit < 1 << 30


async def test_killed_from_outside_is_a_failure(lab: Lab) -> None:
    events = lab.driver.events()
    spec = await lab.ready()
    seen = asyncio.create_task(anext(events))
    await asyncio.sleep(0)
    os.kill(lab.process(spec).pid, signal.SIGKILL)
    ending = await lab.ended(spec)
    assert ending.failed and "killed or crashed" in ending.detail
    assert ending.exit is not None and ending.exit.code is None
    async with asyncio.timeout(SECONDS):
        told = await seen
        while told.status is not Status.STOPPED:
            told = await anext(events)
    assert told == ending
    await events.aclose()
    # What it left in the delta's journal is replayed, and it starts again.
    await asyncio.to_thread(lab.harness.pool.check_delta, spec.uuid)
    await lab.driver.start(spec)
    assert (await lab.driver.observe(spec)).status is Status.RUNNING


async def test_a_delta_that_does_not_mount_is_told(lab: Lab) -> None:
    spec = lab.spec()
    with Path(spec.delta_path).open("r+b") as file:
        file.write(bytes(1 << 20))
    await lab.driver.start(spec)
    ending = await lab.ended(spec)
    assert ending.failed and "the guest gave up: " in ending.detail


async def test_a_kernel_that_panics_is_told(lab: Lab) -> None:
    spec = await lab.ready("echo ready; sleep 1; echo c > /proc/sysrq-trigger; sleep 1000")
    ending = await lab.ended(spec)
    assert ending.failed and "panic" in ending.detail


async def test_a_clean_stop_leaves_a_clean_delta(lab: Lab) -> None:
    spec = await lab.ready('trap "exit 7" TERM; echo kept > /kept; echo ready; sleep 1000 & wait')
    await lab.driver.stop(spec, SECONDS)
    assert b"needs_recovery" not in await run_async(["dumpe2fs", "-h", spec.delta_path])
    await run_async(["e2fsck", "-fn", spec.delta_path])


async def test_what_qemu_says_against_its_command_line_is_the_reason(lab: Lab) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        link = UserLink(nic=NIC, forwards=(Forward(host_port=port, machine_port=80),))
        spec = lab.spec(link=link)
        with pytest.raises(MachineFailed, match=f"{port}"):
            await lab.driver.start(spec)
    assert (await lab.driver.observe(spec)).status is Status.ABSENT
    assert not list(Path(spec.run_dir).iterdir())


NIC = Nic(mac="02:54:72:00:00:09", address="10.231.7.9/24")


async def test_user_network_with_a_forward(lab: Lab) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    link = UserLink(nic=NIC, forwards=(Forward(host_port=port, machine_port=7777),))
    await lab.ready("ip -o addr show eth0; echo ready; while :; do echo greetings | nc -l -p 7777; done", link=link)
    async with asyncio.timeout(SECONDS):
        while (answer := await _ask("127.0.0.1", port)) != b"greetings\n":
            assert answer == b""
            await asyncio.sleep(0.2)


async def _ask(host: str, port: int) -> bytes:
    """What a TCP port says; nothing while nobody listens."""
    try:
        reader, writer = await asyncio.open_connection(host, port)
    except OSError:
        return b""
    try:
        return await asyncio.wait_for(reader.read(100), 5)
    except (OSError, TimeoutError):
        return b""
    finally:
        writer.close()


@needs_root
async def test_on_a_bridge_and_gone_with_the_machine(lab: Lab) -> None:
    bridge = f"tq{os.getpid() % 100000}"
    link = BridgeLink(
        bridge=bridge,
        host_interface=f"{bridge}m1",
        nic=NIC,
        gateway="10.231.7.1",
        nameserver="10.231.7.1",
        domain="triarch",
    )
    with Netlink() as netlink:
        netlink.add_bridge(bridge)
        index = netlink.index_of(bridge)
        assert index is not None
        try:
            netlink.add_address(index, IPv4Interface("10.231.7.1/24"))
            netlink.set_up(index)
            spec = await lab.ready(
                "cat /sys/class/net/eth0/address /etc/resolv.conf; echo ready; "
                "while :; do echo greetings | nc -l -p 7777; done",
                link=link,
            )
            assert NIC.mac in lab.log(spec) and "nameserver 10.231.7.1" in lab.log(spec)
            async with asyncio.timeout(SECONDS):
                while await _ask("10.231.7.9", 7777) != b"greetings\n":
                    await asyncio.sleep(0.2)
            os.kill(lab.process(spec).pid, signal.SIGKILL)
            await lab.ended(spec)
            assert netlink.index_of(link.host_interface) is None
        finally:
            netlink.delete(index)


@needs_root
async def test_a_bridge_that_is_not_there(lab: Lab) -> None:
    link = BridgeLink(
        bridge="tqnosuch",
        host_interface="tqnosuchm1",
        nic=NIC,
        gateway="10.231.7.1",
        nameserver="10.231.7.1",
        domain="triarch",
    )
    spec = lab.spec(link=link)
    with pytest.raises(MachineFailed, match="no bridge 'tqnosuch'"):
        await lab.driver.start(spec)
    os.close(lock_file(spec.delta_path))


async def test_a_delta_that_something_else_holds(lab: Lab) -> None:
    spec = lab.spec()
    fd = lock_file(spec.delta_path)
    try:
        with pytest.raises(Busy):
            await lab.driver.start(spec)
    finally:
        os.close(fd)
    assert (await lab.driver.observe(spec)).status is Status.ABSENT


async def test_the_daemon_dies_and_the_exit_is_not_lost(lab: Lab, tmp_path: Path) -> None:
    """Another process starts the machine and is killed; nobody is there when the guest ends."""
    spec = lab.spec("echo ready; sleep 1; exit 42")
    (tmp_path / "spec.json").write_bytes(msgspec.json.encode(spec))
    program = f"""
import asyncio, os
from pathlib import Path
import msgspec
from triarch.drivers.qemu.driver import HostedDriver
from triarch.model.driver import MachineSpec
from triarch.model.instance import Instance
spec = msgspec.json.decode(Path({str(tmp_path / "spec.json")!r}).read_bytes(), type=MachineSpec)
instance = msgspec.json.decode({msgspec.json.encode(lab.harness.instance)!r}, type=Instance)
async def main():
    await HostedDriver(instance).start(spec)
    os.kill(os.getpid(), 9)
asyncio.run(main())
"""
    daemon = await asyncio.create_subprocess_exec(sys.executable, "-c", program)
    assert await daemon.wait() == -signal.SIGKILL
    process = read_process_id(Path(spec.run_dir) / "process")
    assert process is not None and is_alive(process)
    async with asyncio.timeout(SECONDS):
        while is_alive(process):
            await asyncio.sleep(0.1)
    events = lab.driver.events()
    told = await anext(events)
    assert told.uuid == spec.uuid and told.exit is not None
    assert (told.exit.code, told.failed) == (42, False)
    await events.aclose()


async def test_start_adds_little_to_qemu_itself(lab: Lab) -> None:
    """The guest runs while `start` still waits for QEMU's word; nothing is waited for in fixed steps."""
    took = []
    for _ in range(3):
        spec = lab.spec()
        began = time.monotonic()
        await lab.driver.start(spec)
        took.append(time.monotonic() - began)
        await lab.driver.kill(spec)
    assert min(took) < 2.0, took


@needs_root
async def test_an_unprivileged_daemon_runs_machines_too(harness: HostedHarness) -> None:
    """As a user who may nothing: QEMU runs as that user, without control groups, and a bridge is refused."""
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("setpriv is not installed")
    root = Path(f"/tmp/triarch-qemu-test-{os.getpid()}")
    root.mkdir()
    try:
        answer = await _run_as_user(setpriv, harness, root)
    finally:
        shutil.rmtree(root)
    assert answer == {"status": "stopped", "code": 9, "log": True, "bridge": "Denied"}


async def _run_as_user(setpriv: str, harness: HostedHarness, root: Path) -> dict[str, object]:
    user = 1_966_081
    spec = harness.machine(command=shell("id; echo ready; exit 9"))
    for name in ("run", "state"):
        (root / name).mkdir()
    layer = root / "layer.erofs"
    shutil.copy(spec.layers[0].path, layer)
    delta = root / "delta.raw"
    shutil.copy(spec.delta_path, delta)
    spec = msgspec.structs.replace(
        spec,
        delta_path=str(delta),
        layers=(msgspec.structs.replace(spec.layers[0], path=str(layer)),),
        run_dir=str(root / "run"),
        state_dir=str(root / "state"),
        log_path=str(root / "state/console.log"),
    )
    for path in (root, *root.rglob("*")):
        os.chown(path, user, user)
    (root / "spec.json").write_bytes(msgspec.json.encode(spec))
    instance = msgspec.structs.replace(harness.instance, user_id=user, run_dir=str(root / "none"))
    (root / "instance.json").write_bytes(msgspec.json.encode(instance))
    process = await asyncio.create_subprocess_exec(
        setpriv,
        *("--reuid", str(user), "--regid", str(user), "--clear-groups", sys.executable, "-c", _USER_PROGRAM, str(root)),
        stdout=subprocess.PIPE,
        env={"PATH": os.environ["PATH"], "HOME": str(root)},
    )
    async with asyncio.timeout(SECONDS):
        output, _ = await process.communicate()
    answer: dict[str, object] = json.loads(output)
    return answer


_USER_PROGRAM = """
import asyncio, json, sys
from pathlib import Path
import msgspec
from triarch.drivers.qemu.driver import HostedDriver
from triarch.errors import Error
from triarch.model.driver import MachineSpec
from triarch.model.instance import Instance
from triarch.model.network import BridgeLink, Nic
root = Path(sys.argv[1])
spec = msgspec.json.decode((root / "spec.json").read_bytes(), type=MachineSpec)
instance = msgspec.json.decode((root / "instance.json").read_bytes(), type=Instance)
nic = Nic(mac="02:00:00:00:00:01", address="10.0.0.2/24")
link = BridgeLink(bridge="lo", host_interface="tqx", nic=nic, gateway="", nameserver="", domain="")
async def main():
    driver = HostedDriver(instance)
    try:
        await driver.start(msgspec.structs.replace(spec, link=link))
        refused = ""
    except Error as error:
        refused = type(error).__name__
    await driver.start(spec)
    while (seen := await driver.observe(spec)).status == "running":
        await asyncio.sleep(0.1)
    log = Path(spec.log_path).read_text()
    code = seen.exit and seen.exit.code
    print(json.dumps({"status": seen.status, "code": code, "log": "ready" in log, "bridge": refused}))
    await driver.delete(spec)
    await driver.close()
asyncio.run(main())
"""


async def test_nobody_hears_of_the_end_of_a_failed_start(lab: Lab) -> None:
    events = lab.driver.events()
    seen = asyncio.ensure_future(anext(events))
    await asyncio.sleep(0)
    link = UserLink(nic=NIC, forwards=(Forward(host_port=80, machine_port=80, host_address="192.0.2.1"),))
    with pytest.raises(MachineFailed):
        await lab.driver.start(lab.spec(link=link))
    spec = await lab.started("exit 0")
    async with asyncio.timeout(SECONDS):
        told = await seen
    assert (told.uuid, told.status) == (spec.uuid, Status.STOPPED)
    await events.aclose()
