"""An engine on the fake driver with a real pool and a real store, for tests of the engine itself."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

from triarch.drivers.base import DriverFactory
from triarch.drivers.fake.driver import FakeDriver
from triarch.engine.engine import Engine, open_engine
from triarch.errors import MachineFailed
from triarch.model.driver import EndOfInput, Input, MachineSpec, Stream
from triarch.model.instance import Instance, instance_at
from triarch.model.machine import CreateMachine
from triarch.model.operation import Operation, OperationStatus
from triarch.model.settings import Settings
from triarch.model.template import Init, Template, template_digest
from triarch.storage.directory import DirectoryPool
from triarch.store.sqlite import SqliteStore


class OtherFakeDriver(FakeDriver):
    """A second architecture to switch to; a machine with `other.fail-start` in its environment does not start on it."""

    name = "other"

    async def start(self, spec: MachineSpec) -> None:
        reason = spec.machine.environment.get("other.fail-start")
        if reason is not None:
            raise MachineFailed(f"machine '{spec.machine.name}' did not start: {reason}")
        await super().start(spec)


FACTORIES: Mapping[str, DriverFactory] = {"fake": FakeDriver, "other": OtherFakeDriver}


class Engineer:
    """An engine and shorthands for what tests do with it all the time."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def done(self, operation: Operation) -> Operation:
        """Wait for success; a failure is the test's failure, with the operation's own words."""
        ended = await self.engine.wait(operation.id, 30)
        assert ended.status is OperationStatus.SUCCEEDED, ended
        return ended

    async def failed(self, operation: Operation) -> str:
        """Wait for a failure and return its message."""
        ended = await self.engine.wait(operation.id, 30)
        assert ended.status is OperationStatus.FAILED, ended
        assert ended.error is not None
        return ended.error.message

    async def launch(self, name: str, *command: str, start: bool = True, **environment: str) -> None:
        await self.done(await self.engine.create(machine_request(name, *command, start=start, **environment)))

    async def bring_down(self) -> None:
        """What `triarch down` and the end of its daemon do."""
        await self.done(await self.engine.down())
        await self.engine.close()
        shutil.rmtree(self.engine.instance.run_dir, ignore_errors=True)

    async def idle(self) -> None:
        """Until no operation runs."""
        while any(not operation.status.ended for operation in self.engine.operations()):
            await asyncio.sleep(0.01)


def machine_request(name: str, *command: str, start: bool = True, **environment: str) -> CreateMachine:
    environment = {key.replace("__", ".").replace("_", "-"): value for key, value in environment.items()}
    return CreateMachine(
        name=name,
        template="tiny",
        architecture="fake",
        command=command or ("sleep", "infinity"),
        settings=Settings(network="none", environment=environment),
        start=start,
    )


async def add_tiny_template(instance: Instance, directory: Path) -> Template:
    """Record a template over one small layer; the fake driver never looks inside."""
    from triarch.engine.records import TemplateRecords

    image = directory / "tiny.image"
    image.write_bytes(b"tiny" * 1024)
    pool = DirectoryPool("default", Path(instance.state_dir) / "pool")
    pool.prepare()
    layer = pool.add_layer(image)
    template = Template(
        name="tiny",
        level=1,
        digest=template_digest((layer,)),
        layers=(layer,),
        init=Init.SYSTEM,
        created_at=datetime.now(UTC),
    )
    store = SqliteStore(Path(instance.state_dir) / "triarch.db")
    await store.open()
    await TemplateRecords(store).add(template)
    await store.close()
    return template


async def new_engine(instance: Instance) -> Engine:
    """As after a start of the daemon."""
    return await open_engine(instance, FACTORIES)


@asynccontextmanager
async def engineer_at(directory: Path) -> AsyncIterator[Engineer]:
    """An engine of its own in `directory`, brought down at the end."""
    instance = instance_at(directory / "root")
    Path(instance.state_dir).mkdir()
    await add_tiny_template(instance, directory)
    engineer = Engineer(await new_engine(instance))
    try:
        yield engineer
    finally:
        await engineer.bring_down()


class Collected:
    """A far end that sends nothing and keeps what it gets."""

    def __init__(self) -> None:
        self.output: dict[Stream, bytes] = {Stream.STDOUT: b"", Stream.STDERR: b""}

    async def read(self) -> Input:
        return EndOfInput()

    async def write(self, stream: Stream, data: bytes) -> None:
        self.output[stream] += data
