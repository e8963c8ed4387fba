"""A daemon in a process of its own, on an instance of its own, with the fake architecture: for tests of API and CLI."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

import msgspec

from triarch.client import Client
from triarch.errors import Error
from triarch.model.instance import Instance, instance_at
from triarch.model.machine import Machine
from triarch.model.template import Init, Template, TemplateRef, template_digest
from triarch.storage.directory import DirectoryPool
from triarch.store.base import Put
from triarch.store.sqlite import SqliteStore

SYSTEM_TEMPLATE, APP_TEMPLATE = "tiny", "app"
_MADE_AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)


class DaemonRig:
    """Use it as a context: on leaving, the instance is down, its daemon has ended and its run directory is gone."""

    def __init__(self, root: Path, *, machines: int = 0) -> None:
        """The instance in `root` gets a `system` and an `app` template and stopped machines `m0001`, `m0002`, …"""
        self.root = root
        self.instance: Instance = instance_at(root)
        self._machines = machines
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """For commands that are to use this instance, and daemons that they start."""
        return {**os.environ, "TRIARCH_ROOT": str(self.root), "TRIARCH_ENABLE_FAKE": "only", "NO_COLOR": "1"}

    def __enter__(self) -> DaemonRig:
        self.seed()
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.down()
        shutil.rmtree(self.instance.run_dir, ignore_errors=True)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def client(self) -> Client:
        return Client(self.instance)

    def start(self) -> None:
        """Start the daemon and return when it serves. Raises `AssertionError` with what it said when it does not."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "triarch.daemon", "--background"],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        word = self._process.stdout.read()
        assert word == b"ready\n", f"the daemon did not start: {word.decode()}\n{self.log()}"

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End the daemon, if it has not ended by itself; its exit code."""
        assert self._process is not None
        if self._process.poll() is None:
            self._process.send_signal(number)
        return self._process.wait(30)

    def down(self) -> None:
        """Clear the host of the instance (a bridge, its name server) and end the daemon, started again if need be."""
        assert self._process is not None
        if self._process.poll() is not None:
            self.start()
        try:
            with self.client() as client:
                client.finish(client.down())
            self._process.wait(30)
        except (Error, subprocess.TimeoutExpired):
            self.stop()
            raise

    def log(self) -> str:
        path = Path(self.instance.run_dir) / "triarchd.log"
        return path.read_text() if path.exists() else ""

    def run(
        self, *arguments: str, input_bytes: bytes = b"", extra: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        """One run of the command line."""
        return subprocess.run(
            triarch_argv(*arguments),
            env={**self.environment, **(extra or {})},
            input=input_bytes,
            capture_output=True,
            timeout=120,
            check=False,
        )

    def seed(self) -> None:
        asyncio.run(self._seed())

    async def _seed(self) -> None:
        state_dir = Path(self.instance.state_dir)
        state_dir.mkdir(parents=True, exist_ok=True)
        pool = DirectoryPool("default", state_dir / "pool")
        pool.prepare()
        image = state_dir / "layer"
        image.write_bytes(b"a layer of the fake architecture".ljust(2 << 20, b"\0"))
        layer = pool.add_layer(image)
        templates = [
            Template(
                name=name,
                level=1,
                digest=template_digest((layer,)),
                layers=(layer,),
                init=init,
                command=command,
                os_name="Tiny 1",
                created_at=_MADE_AT,
                source="a test",
            )
            for name, init, command in (
                (SYSTEM_TEMPLATE, Init.SYSTEM, ()),
                (APP_TEMPLATE, Init.APP, ("sh", "-c", "echo hello; sleep 3600")),
            )
        ]
        machines = [self._machine(index, templates[0]) for index in range(1, self._machines + 1)]
        store = SqliteStore(state_dir / "triarch.db")
        await store.open()
        await _put(store, [(f"templates/{t.name}/{t.level}", t) for t in templates])
        await _put(store, [(f"machines/{m.uuid}", m) for m in machines])
        await store.close()

    def _machine(self, index: int, template: Template) -> Machine:
        return Machine(
            name=f"m{index:04}",
            uuid=f"00000000-0000-4000-8000-{index:012}",
            index=index,
            template=TemplateRef(name=template.name, level=template.level, digest=template.digest),
            architecture="fake",
            init=template.init,
            network="none",
            ids=self.instance.id_range(index),
            created_at=_MADE_AT,
        )


async def _put(store: SqliteStore, records: Sequence[tuple[str, msgspec.Struct]]) -> None:
    writes = [Put(key=key, value=msgspec.json.encode(value)) for key, value in records]
    for start in range(0, len(writes), 100):
        await store.txn([], writes[start : start + 100])


def triarch_argv(*arguments: str) -> list[str]:
    """How to run this checkout's command line."""
    return [sys.executable, "-m", "triarch", *arguments]
