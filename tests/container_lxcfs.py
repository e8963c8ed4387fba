"""`python container_lxcfs.py DIRECTORY`: what a container sees of its limits where lxcfs runs.

Run in a mount namespace of its own: lxcfs is mounted where it always is, and must not be seen by anybody else.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import msgspec
from container_rig import ContainerHarness

from triarch.host.lxcfs import ROOT, own_view
from triarch.model.driver import ExecRequest, MachineSpec
from triarch.model.resources import Resources
from triarch.testing.driver_rig import IDLE, FarEnd, shell

MIB = 1 << 20


async def main() -> None:
    harness = ContainerHarness(Path(sys.argv[1]))
    driver = harness.make_driver()
    spec = harness.spec(IDLE, resources=Resources(memory_bytes=128 * MIB, cpu_set="0"))

    async def seen(machine: MachineSpec) -> list[str]:
        far_end = FarEnd()
        script = "grep -E '^MemTotal' /proc/meminfo; grep -c ^processor /proc/cpuinfo; nproc"
        await driver.exec(machine, ExecRequest(command=shell(script)), far_end)
        return far_end.stdout.decode().split()

    try:
        await driver.start(spec)
        assert await seen(spec) == ["MemTotal:", str(128 << 10), "kB", "1", "1"], await seen(spec)
        resources = msgspec.structs.replace(spec.machine.resources, memory_bytes=200 * MIB)
        larger = msgspec.structs.replace(spec, machine=msgspec.structs.replace(spec.machine, resources=resources))
        await driver.resize(larger)
        assert (await seen(spec))[1] == str(200 << 10)
        far_end = FarEnd()
        await driver.exec(spec, ExecRequest(command=shell("echo 1 >/proc/meminfo || echo refused")), far_end)
        assert far_end.stdout == b"refused\n"
    finally:
        await driver.kill(spec)
        await driver.delete(spec)
        await driver.close()
    assert not harness.leaks()
    harness.close()
    print("seen")


if __name__ == "__main__":
    assert not own_view()
    Path(ROOT).mkdir(parents=True, exist_ok=True)
    with subprocess.Popen(["lxcfs", "-f", "-p", f"{sys.argv[1]}/lxcfs.pid", ROOT], stderr=subprocess.DEVNULL) as lxcfs:
        try:
            deadline = time.monotonic() + 20
            while not own_view():
                assert lxcfs.poll() is None and time.monotonic() < deadline, "lxcfs does not mount its files"
                time.sleep(0.05)
            asyncio.run(main())
        finally:
            subprocess.run(["umount", "-l", ROOT], check=False)
            lxcfs.terminate()
