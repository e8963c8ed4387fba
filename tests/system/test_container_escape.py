"""What a container's root tries against its host: all of it is refused."""

from __future__ import annotations

import asyncio
import hashlib
import os
import platform
import shutil
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from container_rig import ContainerHarness, pack_layer

from triarch.drivers.container.driver import ContainerDriver
from triarch.errors import Error, Unavailable
from triarch.model.driver import ExecRequest, MachineSpec
from triarch.model.template import Init
from triarch.testing.driver_rig import IDLE, FarEnd, shell

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="system call numbers of x86_64"),
]

ATTACKS = Path(__file__).with_name("attacks.c")
SYSCALLS = {
    "bpf": (321, 5, 0),
    "perf_event_open": (298, 0, 0),
    "init_module": (175, 0, 0),
    "finit_module": (313, 0, 0),
    "delete_module": (176, 0, 0),
    "kexec_load": (246, 0, 0),
    "kexec_file_load": (320, 0, 0),
    "io_uring_setup": (425, 1, 0),
    "fanotify_init": (300, 0, 0),
    "userfaultfd": (323, 0, 0),
    "swapon": (167, 0, 0),
    "acct": (163, 0, 0),
    "iopl": (172, 3, 0),
    "quotactl": (179, 0, 0),
    "lookup_dcookie": (212, 0, 0),
}


@dataclass
class Prison:
    """Two machines of each init kind, and a secret on the host."""

    harness: ContainerHarness
    driver: ContainerDriver
    machines: dict[Init, MachineSpec]
    neighbour: MachineSpec
    secret: Path

    async def run(self, init: Init, *command: str) -> tuple[int, str]:
        far_end = FarEnd()
        async with asyncio.timeout(60):
            done = await self.driver.exec(self.machines[init], ExecRequest(command=command), far_end)
        return done.code if done.code is not None else -1, (far_end.stdout + far_end.stderr).decode(errors="replace")

    async def refused(self, init: Init, *attack: str) -> str:
        """The attack was tried, and the kernel said no."""
        code, text = await self.run(init, "/bin/attack", *attack)
        assert (code, text[:8]) == (1, "refused:"), f"{attack}: {text}"
        return text


def compile_attacks(target: Path) -> None:
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    subprocess.run(["gcc", "-static", "-O1", "-o", str(target), str(ATTACKS)], check=True)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def prison(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Prison]:
    root = tmp_path_factory.mktemp("escape")
    harness = ContainerHarness(root)
    driver = harness.make_driver()
    try:
        await driver.probe()
    except Unavailable as error:
        await driver.close()
        harness.close()
        pytest.skip(f"containers cannot run here: {error}")
    compile_attacks(root / "tree/bin/attack")
    layer = pack_layer(root / "tree", root / "state/pool/layers/attack.erofs")
    machines = {init: harness.spec(IDLE, init=init, layers=(layer,)) for init in Init}
    neighbour = harness.spec(shell("echo private > /root/private; echo ready; sleep 1000"), layers=(layer,))
    secret = root / "secret"
    secret.write_text("the host's")
    secret.chmod(0o600)
    specs = (*machines.values(), neighbour)
    for spec in specs:
        await driver.start(spec)
    try:
        yield Prison(harness, driver, machines, neighbour, secret)
    finally:
        for spec in specs:
            await driver.kill(spec)
            await driver.delete(spec)
        await driver.close()
        left = harness.leaks()
        harness.close()
        assert not left


@pytest.fixture(params=list(Init), ids=lambda init: init.value)
def init(request: pytest.FixtureRequest) -> Init:
    kind: Init = request.param
    return kind


@pytest.mark.parametrize("name", sorted(SYSCALLS))
async def test_calls_into_the_whole_kernel(prison: Prison, init: Init, name: str) -> None:
    number, first, second = SYSCALLS[name]
    text = await prison.refused(init, "syscall", str(number), str(first), str(second))
    # Refused by the filter, not because the arguments were wrong.
    assert "not permitted" in text or "not implemented" in text, text


async def test_settings_of_the_host(prison: Prison, init: Init) -> None:
    before = Path("/proc/sys/kernel/core_pattern").read_text()
    for path in ("core_pattern", "hostname", "modprobe", "panic", "random/boot_id"):
        if path != "hostname" and Path(f"/proc/sys/kernel/{path}").exists():
            await prison.refused(init, "write", f"/proc/sys/kernel/{path}", "|/bin/sh")
    await prison.refused(init, "write", "/proc/sysrq-trigger", "h")
    await prison.refused(init, "write", "/proc/sys/vm/drop_caches", "3")
    assert Path("/proc/sys/kernel/core_pattern").read_text() == before


async def test_settings_of_the_host_through_a_new_proc(prison: Prison) -> None:
    code, _ = await prison.run(
        Init.SYSTEM, "/bin/unshare", "-m", "/bin/sh", "-c", "umount -l /proc/sysrq-trigger; mkdir -p /p;"
        " mount -t proc proc /p; /bin/attack write /p/sysrq-trigger h || /bin/attack write /p/sys/kernel/core_pattern x"
    )  # fmt: skip
    assert code == 1


@pytest.mark.parametrize(("kind", "major", "minor"), [("0060000", 254, 0), ("0060000", 7, 0), ("0020000", 1, 1)])
async def test_device_nodes(prison: Prison, init: Init, kind: str, major: int, minor: int) -> None:
    await prison.refused(init, "device", kind, str(major), str(minor))


async def test_devices_of_the_host(prison: Prison, init: Init) -> None:
    await prison.refused(init, "loop")
    for path in ("/dev/mem", "/dev/kmsg", "/dev/kvm", "/dev/vda", "/dev/sda", "/dev/fuse"):
        await prison.refused(init, "read", path)


async def test_mounts_of_images_and_devices(prison: Prison, init: Init) -> None:
    await prison.run(init, "/bin/sh", "-c", "dd if=/dev/zero of=/root/image bs=1024 count=64; mkdir -p /root/m")
    for source in ("/root/image", "/dev/vda", "/dev/loop0"):
        for kind in ("ext4", "erofs"):
            await prison.refused(init, "mount", source, "/root/m", kind, "0")


async def test_the_template_stays_read_only(prison: Prison) -> None:
    digest = prison.machines[Init.SYSTEM].layers[0].digest
    code, _ = await prison.run(Init.SYSTEM, "/bin/sh", "-c", "echo changed > /etc/passwd; mount -o remount,rw /")
    layer = Path(prison.machines[Init.SYSTEM].layers[0].path)
    assert hashlib.sha256(layer.read_bytes()).hexdigest() == digest, code
    _, other = await prison.run(Init.APP, "/bin/cat", "/etc/passwd")
    assert "changed" not in other


async def test_the_overlay_cannot_be_turned(prison: Prison) -> None:
    """Options that would make files of the host appear are refused to the machine's own root mount."""
    for option in ("lowerdir=/proc/1/root", "redirect_dir=on", "metacopy=on"):
        code, _ = await prison.run(Init.SYSTEM, "/bin/mount", "-o", f"remount,{option}", "/")
        _, table = await prison.run(Init.SYSTEM, "/bin/grep", " / / ", "/proc/self/mountinfo")
        assert code != 0 or option not in table


async def test_control_groups(prison: Prison, init: Init) -> None:
    code, _ = await prison.run(
        init, "/bin/sh", "-c", "for f in $(ls -d /sys/fs/cgroup/*/release_agent /sys/fs/cgroup/release_agent"
        " /sys/fs/cgroup/*/*limit* /sys/fs/cgroup/*.max /sys/fs/cgroup/*/devices.allow /sys/fs/cgroup/*/*quota_us"
        " 2>/dev/null); do echo 1 > $f && echo wrote $f && exit 0; done; exit 1"
    )  # fmt: skip
    assert code == 1
    code, _ = await prison.run(
        init, "/bin/sh", "-c",
        "mkdir -p /root/g; mount -t cgroup -o memory none /root/g && echo /x > /root/g/release_agent",
    )  # fmt: skip
    assert code != 0


async def test_namespaces_of_the_host(prison: Prison, init: Init) -> None:
    # Inside, process 1 is the machine's own: there is no way to name one of the host's.
    _, first = await prison.run(
        init, "/bin/sh", "-c", "for name in pid mnt user; do readlink /proc/1/ns/$name; done"
    )  # fmt: skip
    for name, seen in zip(("pid", "mnt", "user"), first.split(), strict=True):
        assert seen != os.readlink(f"/proc/self/ns/{name}")  # noqa: PTH115
    code, _ = await prison.run(init, "/bin/ls", f"/proc/{os.getpid()}/root{prison.secret}")
    assert code != 0


async def test_ids_of_the_host(prison: Prison, init: Init) -> None:
    """Host id 0 is no id inside: there is none to become."""
    machine = prison.machines[init].machine
    _, text = await prison.run(init, "/bin/cat", "/proc/self/uid_map", "/proc/self/gid_map")
    assert [line.split() for line in text.splitlines()] == [["0", str(machine.ids.base), str(machine.ids.count)]] * 2
    for uid in (65536, 65537, 1 << 31, machine.ids.base):
        await prison.refused(init, "setuid", str(uid))


async def test_handles_and_clock_and_limits(prison: Prison, init: Init) -> None:
    for attack in ("handle", "clock", "core-limit"):
        await prison.refused(init, attack)


async def test_capabilities_are_podmans_or_fewer(prison: Prison) -> None:
    _, text = await prison.run(Init.APP, "/bin/grep", "-E", "Cap(Bnd|Eff|Prm)|Seccomp:", "/proc/self/status")
    podman = sum(1 << bit for bit in (0, 1, 3, 4, 5, 6, 7, 8, 10, 18, 31))
    for line in text.splitlines():
        name, value = line.split()
        if name == "Seccomp:":
            assert value == "2"
        else:
            assert int(value, 16) & ~podman == 0


async def test_files_of_neighbours_and_host(prison: Prison, init: Init) -> None:
    run_dir = prison.harness.instance.run_dir
    for path in (
        prison.secret,
        prison.neighbour.delta_path,
        f"{run_dir}/launcher/machine/root/root/private",
        f"{prison.neighbour.run_dir}/config.json",
        "/root/private",
    ):
        code, _ = await prison.run(init, "/bin/cat", str(path))
        assert code != 0, path


async def test_signals_stay_inside(prison: Prison, init: Init) -> None:
    pid = (await prison.driver.observe(prison.neighbour)).pid
    code, _ = await prison.run(init, "/bin/kill", "-9", str(pid))
    assert code != 0
    assert (await prison.driver.observe(prison.neighbour)).pid == pid


@pytest.mark.parametrize("name", ["resolv.conf", "hosts", "hostname"])
@pytest.mark.parametrize("trap", ["link", "proc", "directory", "fifo", "loop"])
async def test_traps_where_files_are_mounted_at_the_next_start(prison: Prison, name: str, trap: str) -> None:
    """What a machine plants in its own tree never leads the host to a file of its own."""
    host_file = prison.secret.with_name("victim")
    host_file.write_text("untouched")
    host_file.chmod(0o666)
    plant = {
        "link": f"ln -s ../../../../../..{host_file} /etc/{name}",
        "proc": f"ln -s /proc/self/attr/current /etc/{name}",
        "directory": f"mkdir /etc/{name}",
        "fifo": f"mkfifo /etc/{name} || mknod /etc/{name} p",
        "loop": f"ln -s {name} /etc/{name}",
    }[trap]
    driver = prison.driver
    spec = prison.harness.spec(
        shell(f"test -e /first || {{ touch /first; umount /etc/{name}; rm /etc/{name}; mv /etc /e; mkdir /etc; {plant};"
              " sync; exit 7; }; echo evil > /etc/" + name + "; exit 8"),
        layers=prison.neighbour.layers,
    )  # fmt: skip
    try:
        for _ in range(2):
            try:
                await driver.start(spec)
            except Error as error:
                # Refusing to start is a fair answer; touching the host would not be.
                assert "cannot" in str(error)
                continue
            async with asyncio.timeout(60):
                while (await driver.observe(spec)).exit is None:
                    await asyncio.sleep(0.02)
        assert host_file.read_text() == "untouched"
    finally:
        await driver.kill(spec)
        await driver.delete(spec)


async def test_a_trap_in_the_user_database(prison: Prison) -> None:
    """crun reads /etc/passwd for HOME, inside: a link to the host's file finds the machine's own root."""
    await prison.run(Init.APP, "/bin/sh", "-c", f"cp /etc/passwd /p; rm /etc/passwd; ln -s {prison.secret} /etc/passwd")
    code, text = await prison.run(Init.APP, "/bin/env")
    assert code == 0 and "the host's" not in text
    await prison.run(Init.APP, "/bin/sh", "-c", "rm /etc/passwd; mv /p /etc/passwd")
