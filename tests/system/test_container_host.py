"""Containers on this host: networks, limits, deaths of everything around them, and what is left afterwards."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from ipaddress import IPv4Interface
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio
from container_rig import ContainerHarness, busybox_tree, pack_layer
from container_victim import Order

from triarch.drivers.container.driver import ContainerDriver
from triarch.errors import Damaged, Invalid, MachineFailed, Unavailable, Unsupported
from triarch.host.cgroup import cgroup_trees
from triarch.host.netlink import Netlink
from triarch.host.pidfd import send_signal
from triarch.host.process import run
from triarch.model.driver import ExecRequest, LayerFile, MachineSpec, Observation, Resize
from triarch.model.network import BridgeLink, Nic, UserLink
from triarch.model.resources import Resources
from triarch.model.state import Status
from triarch.model.template import Init
from triarch.testing.driver_rig import IDLE, FarEnd, shell

pytestmark = pytest.mark.asyncio(loop_scope="module")

VICTIM = Path(__file__).parents[1] / "container_victim.py"


class Host:
    """A driver, and the machines that a test made."""

    def __init__(self, harness: ContainerHarness) -> None:
        self.harness = harness
        self.driver = harness.make_driver()
        self.specs: list[MachineSpec] = []

    def machine(
        self,
        *command: str,
        init: Init = Init.APP,
        resources: Resources | None = None,
        link: BridgeLink | UserLink | None = None,
        layers: tuple[LayerFile, ...] | None = None,
    ) -> MachineSpec:
        spec = self.harness.spec(command, init=init, resources=resources, link=link, layers=layers)
        self.specs.append(spec)
        return spec

    async def exec(self, spec: MachineSpec, script: str) -> tuple[int | None, str]:
        far_end = FarEnd()
        async with asyncio.timeout(60):
            done = await self.driver.exec(spec, ExecRequest(command=shell(script)), far_end)
        return done.code, (far_end.stdout + far_end.stderr).decode(errors="replace")

    async def ended(self, spec: MachineSpec) -> Observation:
        async with asyncio.timeout(60):
            while (seen := await self.driver.observe(spec)).status is Status.RUNNING:
                await asyncio.sleep(0.02)
        return seen

    async def tidy(self) -> None:
        for spec in self.specs:
            await self.driver.kill(spec)
            await self.driver.delete(spec)
        self.specs.clear()
        # The launcher keeps the template for the next machine.
        assert not [line for line in self.harness.leaks() if "/pool/layers/" not in line]
        assert not [root for root in cgroup_trees().roots if (root / f"triarch-{self.harness.instance.tag}").exists()]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Host]:
    host = Host(ContainerHarness(tmp_path_factory.mktemp("host")))
    try:
        await host.driver.probe()
    except Unavailable as error:
        await host.driver.close()
        host.harness.close()
        pytest.skip(f"containers cannot run here: {error}")
    yield host
    await host.driver.close()
    left = host.harness.leaks()
    host.harness.close()
    assert not left


@pytest_asyncio.fixture(loop_scope="module")
async def host(shared: Host) -> AsyncIterator[Host]:
    yield shared
    await shared.tidy()


# ---- network


@pytest.fixture
def links(shared: Host) -> Iterator[tuple[BridgeLink, ...]]:
    """Two links on a bridge of this test's own, which has the gateway's address."""
    instance = shared.harness.instance
    with Netlink() as here:
        here.add_bridge(instance.bridge)
        index = here.index_of(instance.bridge)
        assert index is not None
        here.add_address(index, IPv4Interface("10.213.77.1/24"))
        here.set_up(index)
        yield tuple(
            BridgeLink(
                bridge=instance.bridge,
                host_interface=instance.host_interface(number),
                nic=Nic(mac=f"02:00:00:d5:4d:0{number}", address=f"10.213.77.{number}/24"),
                gateway="10.213.77.1",
                nameserver="10.213.77.1",
                domain="triarch",
            )
            for number in (8, 9)
        )
        here.delete(index)


async def test_a_network(host: Host, links: tuple[BridgeLink, BridgeLink]) -> None:
    one, two = (host.machine(init=Init.SYSTEM, link=link) for link in links)
    await asyncio.gather(host.driver.start(one), host.driver.start(two))
    code, text = await host.exec(one, "ip addr show eth0; ip route; cat /etc/resolv.conf /etc/hosts /etc/hostname")
    assert code == 0
    for piece in ("02:00:00:d5:4d:08", "10.213.77.8/24", "default via 10.213.77.1", "nameserver 10.213.77.1"):
        assert piece in text
    assert f"10.213.77.8 {one.machine.name}.triarch {one.machine.name}" in text
    assert (await host.exec(one, "ping -c 1 -W 5 10.213.77.9 && ping -c 1 -W 5 10.213.77.1"))[0] == 0
    await host.driver.kill(one)
    with Netlink() as here:
        assert here.index_of(links[0].host_interface) is None
        assert here.index_of(links[1].host_interface) is not None


async def test_files_for_the_network_are_not_written_to_the_delta(host: Host) -> None:
    spec = host.machine(*IDLE)
    await host.driver.start(spec)
    await host.driver.kill(spec)
    listing = run(["debugfs", "-R", "ls -l /upper", spec.delta_path]).decode()
    assert "etc" not in listing


async def test_no_network_is_loopback_only(host: Host) -> None:
    spec = host.machine(init=Init.SYSTEM)
    await host.driver.start(spec)
    code, text = await host.exec(spec, "ip -o link; ping -c 1 -W 5 127.0.0.1")
    assert code == 0
    assert "eth0" not in text


async def test_a_missing_bridge_leaves_nothing(host: Host) -> None:
    nic = Nic(mac="02:00:00:00:00:01", address="10.213.78.2/24")
    gone = BridgeLink(
        bridge="tri-none", host_interface="tri-x", nic=nic, gateway="10.213.78.1", nameserver="10.213.78.1", domain="t"
    )
    spec = host.machine(*IDLE, link=gone)
    with pytest.raises(MachineFailed, match="set up the network: there is no bridge 'tri-none'"):
        await host.driver.start(spec)


async def test_user_networks_are_refused(host: Host) -> None:
    spec = host.machine(*IDLE)
    with pytest.raises(Unsupported, match="user-mode"):
        host.driver.validate(msgspec.structs.replace(spec.machine, network="user"))


# ---- limits


async def test_limits_hold(host: Host) -> None:
    spec = host.machine(*IDLE, resources=Resources(memory_bytes=64 << 20, pids=32, cpus=0.5))
    await host.driver.start(spec)
    code, text = await host.exec(spec, "i=0; while [ $i -lt 60 ]; do sleep 30 & i=$((i+1)); done; echo all")
    assert "all" not in text or code != 0
    code, _ = await host.exec(spec, "head -c 100000000 /dev/zero | tail -c 99000000 > /dev/null")
    assert code != 0
    trees = cgroup_trees()
    name = "cpu.max" if trees.version == 2 else "cpu.cfs_quota_us"
    assert (trees.controllers["cpu"] / spec.cgroup.lstrip("/") / name).read_text().split()[0] == "50000"


async def test_out_of_memory_is_said(host: Host) -> None:
    spec = host.machine("/bin/tail", "-c", "200000000", "/dev/zero", resources=Resources(memory_bytes=32 << 20))
    await host.driver.start(spec)
    seen = await host.ended(spec)
    assert seen.exit is not None and (seen.exit.code, seen.exit.reason) == (137, "out of memory")


async def test_usage_grows(host: Host) -> None:
    spec = host.machine(*IDLE)
    await host.driver.start(spec)
    before = await host.driver.usage(spec)
    await host.exec(spec, "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done")
    assert (await host.driver.usage(spec)).cpu_seconds > before.cpu_seconds


# ---- templates


async def test_layers_lie_over_one_another_and_are_mounted_once(host: Host, tmp_path: Path) -> None:
    (tmp_path / "patch/etc").mkdir(parents=True)
    (tmp_path / "patch/etc/level").write_text("patched\n")
    upper = pack_layer(tmp_path / "patch", Path(host.harness.instance.state_dir) / "pool/layers/patch.erofs")
    layers = (*host.harness.layers, upper)
    specs = [host.machine(*IDLE, layers=layers) for _ in range(3)]
    for spec in specs:
        await host.driver.start(spec)
        assert await host.exec(spec, "cat /etc/level && test -x /bin/busybox") == (0, "patched\n")
    backing = [path.read_text().strip() for path in Path("/sys/block").glob("loop*/loop/backing_file")]
    assert [backing.count(layer.path) for layer in layers] == [1, 1]
    # A new launcher finds the device that the machines hold, and with it their page cache.
    await host.driver.close()
    host.driver = host.harness.make_driver()
    again = host.machine(*IDLE, layers=layers)
    await host.driver.start(again)
    backing = [path.read_text().strip() for path in Path("/sys/block").glob("loop*/loop/backing_file")]
    assert [backing.count(layer.path) for layer in layers] == [1, 1]


async def test_a_damaged_layer_is_said(host: Host, tmp_path: Path) -> None:
    image = Path(host.harness.instance.state_dir) / "pool/layers/damaged.erofs"
    image.write_bytes(bytes(2 << 20))
    spec = host.machine(*IDLE, layers=(LayerFile(digest="e" * 64, path=str(image), size_bytes=2 << 20),))
    with pytest.raises(Damaged, match=r"damaged\.erofs"):
        await host.driver.start(spec)


async def test_a_layer_that_was_replaced_is_seen(host: Host, tmp_path: Path) -> None:
    image = Path(host.harness.instance.state_dir) / "pool/layers/replaced.erofs"
    seen = []
    for text in ("one", "two"):
        busybox_tree(tmp_path / text)
        (tmp_path / text / "etc/which").write_text(text)
        image.unlink(missing_ok=True)
        packed = pack_layer(tmp_path / text, image)
        spec = host.machine(*IDLE, layers=(msgspec.structs.replace(packed, digest="c" * 64),))
        await host.driver.start(spec)
        seen.append((await host.exec(spec, "cat /etc/which"))[1])
        await host.driver.kill(spec)
    assert seen == ["one", "two"]


async def test_no_command_is_invalid(host: Host) -> None:
    with pytest.raises(Invalid, match="no command"):
        await host.driver.start(host.machine())


async def test_a_command_that_cannot_be_run_is_named(host: Host) -> None:
    with pytest.raises(MachineFailed, match=r"machine '.*' cannot run 'no-such': executable file"):
        await host.driver.start(host.machine("no-such"))
    for command, code in (("no-such", 127), ("/etc", 126)):
        far_end = FarEnd()
        assert (await host.driver.start_attached(host.machine(command), far_end, None)).code == code
        assert f"cannot run '{command}'".encode() in far_end.stderr


# ---- what programs see


async def test_a_broken_pipe_ends_a_writer(host: Host) -> None:
    """SIGPIPE must not be ignored inside, as it is in every Python process."""
    spec = host.machine(*shell("yes | head -n 1; exit 5"))
    await host.driver.start(spec)
    seen = await host.ended(spec)
    assert seen.exit is not None and seen.exit.code == 5


async def test_the_log_is_plain_and_of_all_runs(host: Host) -> None:
    spec = host.machine(*shell("printf 'no newline'; echo; echo err >&2; printf tail"))
    for _ in range(2):
        await host.driver.start(spec)
        await host.ended(spec)
    text = Path(spec.log_path).read_text()
    assert [text.count(piece) for piece in ("no newline\n", "err\n", "tail")] == [2, 2, 2]
    assert "stdout" not in text


async def test_the_log_of_what_happened_without_a_daemon(host: Host) -> None:
    spec = host.machine(*shell("sleep 1; echo alone; exit 4"))
    await host.driver.start(spec)
    await host.driver.close()
    await asyncio.sleep(1.5)
    host.driver = host.harness.make_driver()
    seen = await host.ended(spec)
    assert seen.exit is not None and seen.exit.code == 4
    assert Path(spec.log_path).read_text() == "alone\n"


async def test_a_system_machine_has_a_console(host: Host) -> None:
    spec = host.machine(init=Init.SYSTEM)
    await host.driver.start(spec)
    far_end = FarEnd(open_ended=True)
    task = asyncio.create_task(host.driver.console(spec, far_end))
    await asyncio.sleep(0.3)
    far_end.feed(Resize(90, 30))
    code, text = await host.exec(spec, "sleep 0.3; echo shown > /dev/console; stty size < /dev/console")
    assert (code, text) == (0, "30 90\n")
    async with asyncio.timeout(20):
        while "shown" not in Path(spec.log_path).read_text():
            await asyncio.sleep(0.05)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert (await host.driver.observe(spec)).status is Status.RUNNING
    await host.driver.stop(spec, 30)


# ---- deaths


async def test_a_killed_monitor_ends_its_machine(host: Host) -> None:
    spec = host.machine(*IDLE)
    await host.driver.start(spec)
    events = host.driver.events()
    assert (await anext(events)).status is Status.RUNNING
    monitor = host.driver._runs[spec.uuid].record.monitor
    send_signal(monitor, signal.SIGKILL)
    async with asyncio.timeout(30):
        while (seen := await anext(events)).uuid != spec.uuid:
            pass
    await events.aclose()
    assert (seen.status, seen.failed) == (Status.STOPPED, True)
    await host.driver.start(spec)


@pytest.mark.parametrize("init", list(Init))
async def test_a_killed_init(host: Host, init: Init) -> None:
    spec = host.machine(*(IDLE if init is Init.APP else ()), init=init)
    await host.driver.start(spec)
    pid = (await host.driver.observe(spec)).pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    seen = await host.ended(spec)
    assert seen.exit is not None and seen.exit.code == 137
    assert seen.failed is (init is Init.SYSTEM)


async def test_a_killed_launcher_is_started_again(host: Host) -> None:
    first, second = host.machine(*IDLE), host.machine(*IDLE)
    await host.driver.start(first)
    process = host.driver._launcher._process
    assert process is not None
    process.kill()
    await asyncio.sleep(0.2)
    await host.driver.start(second)
    assert (await host.driver.observe(first)).status is Status.RUNNING


@pytest.mark.parametrize("delay_ms", [1, 10, 30, 60])
async def test_a_launcher_killed_in_the_middle_of_starts(host: Host, delay_ms: int) -> None:
    warm = host.machine("/bin/true")
    await host.driver.start(warm)
    specs = [host.machine(*IDLE) for _ in range(4)]
    starts = [asyncio.create_task(host.driver.start(spec)) for spec in specs]
    await asyncio.sleep(delay_ms / 1000)
    process = host.driver._launcher._process
    assert process is not None
    process.kill()
    results = await asyncio.gather(*starts, return_exceptions=True)
    for spec, result in zip(specs, results, strict=True):
        status = (await host.driver.observe(spec)).status
        if result is None:
            assert status is Status.RUNNING
        else:
            assert isinstance(result, Unavailable), result
            assert status is Status.ABSENT
            await host.driver.start(spec)
        assert (await host.exec(spec, "echo alive")) == (0, "alive\n")


async def test_a_start_that_was_not_let_go_is_begun_anew(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon may die between making a container and letting it go."""
    from triarch.drivers.container import driver as module

    async def die(run: object) -> None:
        raise asyncio.CancelledError

    spec = host.machine(*IDLE)
    monkeypatch.setattr(module, "_let_go", die)
    monkeypatch.setattr(host.driver, "_undo", lambda *_: asyncio.sleep(0))
    with pytest.raises(asyncio.CancelledError):
        await host.driver.start(spec)
    monkeypatch.undo()
    await host.driver.close()
    host.driver = host.harness.make_driver()
    assert (await host.driver.observe(spec)).status is Status.STOPPED
    await host.driver.start(spec)
    assert (await host.exec(spec, "echo alive")) == (0, "alive\n")


@pytest.mark.parametrize("delay_ms", [0, 2, 5, 9, 14, 20, 28, 38, 50, 65, 85, 110, 150, 200])
async def test_a_daemon_killed_in_the_middle_of_a_start(host: Host, delay_ms: int, tmp_path: Path) -> None:
    first, spec = host.machine(*IDLE), host.machine(*IDLE)
    await host.driver.close()
    order = tmp_path / "order.json"
    order.write_bytes(msgspec.json.encode(Order(instance=host.harness.instance, first=first, spec=spec)))
    victim = await asyncio.create_subprocess_exec(
        sys.executable, str(VICTIM), str(order), stdout=asyncio.subprocess.PIPE
    )
    assert victim.stdout is not None
    async with asyncio.timeout(60):
        assert await victim.stdout.readline() == b"go\n"
    await asyncio.sleep(delay_ms / 1000)
    victim.kill()
    await victim.wait()
    host.driver = ContainerDriver(host.harness.instance)
    await host.driver.kill(spec)
    assert (await host.driver.observe(spec)).status in (Status.ABSENT, Status.STOPPED)
    # The delta is free, and nothing of the first attempt is in the way.
    await host.driver.start(spec)
    assert (await host.exec(spec, "echo alive")) == (0, "alive\n")


async def test_starts_leave_no_descriptor(host: Host) -> None:
    spec = host.machine("/bin/true")
    await host.driver.start(spec)
    await host.ended(spec)
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    for _ in range(10):
        await host.driver.start(spec)
        await host.ended(spec)
    assert len(os.listdir("/proc/self/fd")) <= before  # noqa: PTH208
