"""`python container_victim.py SPEC`: a daemon in small, which starts one machine and is then killed by its test."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import msgspec

from triarch.drivers.container.driver import ContainerDriver
from triarch.model.driver import MachineSpec
from triarch.model.instance import Instance


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What the test hands over: where, what, and whether the launcher is to be warm before `go` is said."""

    instance: Instance
    first: MachineSpec
    spec: MachineSpec


async def main() -> None:
    order = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Order)
    driver = ContainerDriver(order.instance)
    await driver.start(order.first)
    await driver.kill(order.first)
    await driver.delete(order.first)
    print("go", flush=True)
    await driver.start(order.spec)
    print("started", flush=True)
    await asyncio.sleep(3600)


if __name__ == "__main__":
    asyncio.run(main())
