"""The daemon's one process: an engine behind an HTTP server on a unix socket."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import signal
from collections.abc import Callable, Iterator
from socket import socket

import uvicorn

from triarch.daemon.app import create_app
from triarch.daemon.door import sweep_doors
from triarch.drivers import DRIVERS, HIDDEN, driver_factory
from triarch.drivers.base import Driver, DriverFactory
from triarch.engine.architectures import Architectures
from triarch.engine.engine import Engine, open_engine
from triarch.model.instance import Instance
from triarch.model.request import Check
from triarch.model.stream import MAX_MESSAGE_BYTES

log = logging.getLogger(__name__)

KEEP_ALIVE_SECONDS = 300
# A ping is how a client that vanished is noticed while nothing is read from it. A slow client need not answer.
PING_SECONDS = 5.0
GRACE_SECONDS = 1
# `down` has been answered; its caller gets this long to fetch the answer.
FAREWELL_SECONDS = 0.1


class Server(uvicorn.Server):
    """uvicorn that sleeps until it is told to stop, where the original wakes ten times a second."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        self.should_exit = True
        self._stopping.set()

    async def main_loop(self) -> None:
        await self._stopping.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT are the ordinary ways to end, and leave exit code 0."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        yield


async def serve(instance: Instance, listener: socket, ready: Callable[[], None]) -> bool:
    """Serve until told to stop; whether that was `down`, after which nothing is left to come back to.

    `ready` is called when the engine is open; what keeps it from opening is raised.
    """
    sweep_doors(instance)
    engine = await open_engine(instance, _factories())
    try:
        server = _server(engine)
        ready()
        log.info("serving %s on %s", instance.state_dir, instance.socket_path)
        farewell = asyncio.create_task(_end_after_down(engine, server))
        await server.serve(sockets=[listener])
        farewell.cancel()
        return engine.down_finished.is_set()
    finally:
        await engine.close()
        log.info("ended")


def _factories() -> dict[str, DriverFactory] | None:
    """The host's own drivers (None), unless a test asks for the fake one: `1` beside them, `only` instead of them."""
    enable = os.environ.get("TRIARCH_ENABLE_FAKE")
    if enable not in ("1", "only"):
        return None
    names = ("fake",) if enable == "only" else ("fake", *(name for name in DRIVERS if name not in HIDDEN))
    return {name: functools.partial(_make_driver, name) for name in names}


def _make_driver(name: str, instance: Instance) -> Driver:
    return driver_factory(name)(instance)


async def _end_after_down(engine: Engine, server: Server) -> None:
    await engine.down_finished.wait()
    await asyncio.sleep(FAREWELL_SECONDS)
    server.stop()


def _server(engine: Engine) -> Server:
    config = uvicorn.Config(
        create_app(engine),
        http="h11",
        ws="wsproto",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=GRACE_SECONDS,
        ws_max_size=MAX_MESSAGE_BYTES,
        ws_ping_interval=PING_SECONDS,
        ws_ping_timeout=None,
        ws_per_message_deflate=False,
    )
    return Server(config)


async def doctor(instance: Instance) -> tuple[Check, ...]:
    """Check this host without a daemon and without changing anything."""
    from triarch.engine.doctor import run_checks

    architectures = Architectures(instance, lambda *_: None, _factories())
    try:
        return await run_checks(instance, {name: architectures.driver(name) for name in architectures.names()})
    finally:
        await architectures.close()
