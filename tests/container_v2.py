"""`python container_v2.py DIRECTORY`: one life of a machine where only control groups v2 are to be seen.

Run in a mount namespace of its own, whose version 2 tree need not have any controller.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from container_rig import ContainerHarness

from triarch.host.cgroup import cgroup_trees
from triarch.model.driver import ExecRequest
from triarch.model.state import Status
from triarch.model.template import Init
from triarch.testing.driver_rig import FarEnd, shell


async def main() -> None:
    assert cgroup_trees().version == 2
    harness = ContainerHarness(Path(sys.argv[1]))
    driver = harness.make_driver()
    spec = harness.spec((), init=Init.SYSTEM)
    group = Path("/sys/fs/cgroup") / spec.cgroup.lstrip("/")
    try:
        await driver.start(spec)
        far_end = FarEnd()
        script = "mkdir -p /sys/fs/cgroup/a/b && echo $$ > /sys/fs/cgroup/a/b/cgroup.procs && echo made"
        await driver.exec(spec, ExecRequest(command=shell(script)), far_end)
        assert far_end.stdout == b"made\n", far_end.stderr
        assert (group / "a/b").is_dir()
        far_end = FarEnd()
        script = "echo 1 > /sys/fs/cgroup/cgroup.max.depth || echo 1 > /sys/fs/cgroup/cgroup.freeze"
        assert (await driver.exec(spec, ExecRequest(command=shell(script)), far_end)).code != 0
        await driver.pause(spec)
        assert (await driver.observe(spec)).status is Status.PAUSED
        await driver.resume(spec)
        assert (await driver.observe(spec)).status is Status.RUNNING
        await driver.pause(spec)
        await driver.kill(spec)
        assert not group.exists()
    finally:
        await driver.kill(spec)
        await driver.delete(spec)
        await driver.close()
    assert not group.parent.exists()
    assert not harness.leaks()
    harness.close()
    print("lived")


if __name__ == "__main__":
    asyncio.run(main())
