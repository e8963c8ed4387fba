"""One question to a running machine: is it well? However it hangs or floods, the answer comes in time and is short."""

from __future__ import annotations

import asyncio

from triarch.drivers.base import Exec
from triarch.engine.services import Services
from triarch.errors import Error, Invalid, Unsupported
from triarch.host.reach import connect_tcp, http_status
from triarch.model.command import check_command
from triarch.model.driver import EndOfInput, ExecRequest, Input, Stream
from triarch.model.machine import Machine
from triarch.model.network import NO_NETWORK, USER_NETWORK, Protocol
from triarch.model.policy import HealthCheck, Probe

KEPT_BYTES = 512
MAX_OUTPUT_BYTES = 1 << 20


class ShortOutput:
    """The far end of a check's command: no input, the end of the output, and a limit on all of it."""

    def __init__(self) -> None:
        self.tail = b""
        self._taken_bytes = 0

    async def read(self) -> Input:
        return EndOfInput()

    async def write(self, stream: Stream, data: bytes) -> None:
        self._taken_bytes += len(data)
        self.tail = (self.tail + data)[-KEPT_BYTES:]
        if self._taken_bytes > MAX_OUTPUT_BYTES:
            raise ConnectionError

    @property
    def flooded(self) -> bool:
        return self._taken_bytes > MAX_OUTPUT_BYTES

    @property
    def last_line(self) -> str:
        lines = self.tail.decode(errors="replace").strip().splitlines()
        return lines[-1].strip() if lines else ""


def check_health(machine: Machine) -> None:
    """Refuse a health check that cannot work for `machine`. Pure. Raises `Invalid`."""
    check = machine.health
    if check is None:
        return
    subject = f"the health check of machine '{machine.name}'"
    if check.probe is Probe.COMMAND:
        if not check.command:
            raise Invalid(f"{subject} has no command to run")
        check_command(check.command, {})
        return
    if check.port is None:
        raise Invalid(f"{subject} asks by {check.probe.value} and needs a port")
    if not (check.path.startswith("/") and check.path.isascii() and check.path.isprintable() and " " not in check.path):
        raise Invalid(f"{subject} has the illegal path {check.path[:80]!r}: it needs printable ASCII after a '/'")
    if machine.network == NO_NETWORK:
        raise Invalid(f"{subject} asks by {check.probe.value}, and the machine has no network")
    if machine.network == USER_NETWORK and _forwarded(machine, check.port) is None:
        raise Invalid(
            f"{subject} asks for port {check.port}, which network 'user' reaches only through a forward",
            hint=f"-p {check.port}:{check.port}",
        )


def _forwarded(machine: Machine, port: int) -> tuple[str, int] | None:
    """Where on the host a port of the machine is found."""
    for forward in machine.forwards:
        if forward.machine_port == port and forward.protocol is Protocol.TCP:
            return ("127.0.0.1" if forward.host_address == "0.0.0.0" else forward.host_address), forward.host_port
    return None


def _place(machine: Machine, port: int) -> tuple[str, int]:
    if machine.network == USER_NETWORK:
        place = _forwarded(machine, port)
    else:
        place = (machine.nic.ip or machine.nic.ip6, port) if machine.nic is not None else None
    if place is None or not place[0]:
        raise Invalid(f"machine '{machine.name}' has no address that this host knows")
    return place


async def ask(services: Services, machine: Machine, check: HealthCheck) -> str | None:
    """None for a good answer, else why it was none. Takes `check.timeout_seconds` at most, and raises nothing."""
    try:
        async with asyncio.timeout(check.timeout_seconds):
            return await _answer(services, machine, check)
    except TimeoutError:
        return f"no answer within {check.timeout_seconds:g} s"
    except Error as error:
        return error.message
    except (OSError, ValueError) as error:
        return (getattr(error, "strerror", None) or str(error) or type(error).__name__).lower()


async def _answer(services: Services, machine: Machine, check: HealthCheck) -> str | None:
    if check.probe is Probe.COMMAND:
        return await _run(services, machine, check.command)
    assert check.port is not None
    address, port = _place(machine, check.port)
    if check.probe is Probe.TCP:
        await connect_tcp(address, port)
        return None
    status = await http_status(address, port, check.path, machine.name)
    return None if status < 400 else f"status {status} for {check.path}"


async def _run(services: Services, machine: Machine, command: tuple[str, ...]) -> str | None:
    driver = services.driver(machine)
    if not isinstance(driver, Exec):
        raise Unsupported(f"architecture '{machine.architecture}' has no exec, which the health check needs")
    output = ShortOutput()
    ended = await driver.exec(services.spec(machine), ExecRequest(command=command), output)
    if output.flooded:
        return f"it wrote more than {MAX_OUTPUT_BYTES >> 20} MiB"
    if ended.code == 0:
        return None
    said = f": {output.last_line}" if output.last_line else ""
    return f"exit code {'unknown' if ended.code is None else ended.code}{said}"
