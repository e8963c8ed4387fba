"""Devices of machines: look, add, remove; and which virtual hardware a machine sees."""

from __future__ import annotations

from typing import Annotated

from litestar import Response, delete, get, post
from litestar.params import Parameter

from triarch.daemon.problems import problems
from triarch.daemon.routes.machines import Name
from triarch.daemon.routes.operations import accepted, change
from triarch.engine.engine import Engine
from triarch.model.device import DEVICE_NAME_PATTERN, AddDevice, DeviceView, HardwareInfo
from triarch.model.operation import Operation

TAGS = ["devices"]
PATH = "/machines/{name:str}/devices"
CHANGE_PROBLEMS = (404, 409, 413, 422, 503, 507)
Device = Annotated[str, Parameter(description="The device's name", schema_extra={"pattern": DEVICE_NAME_PATTERN})]


@get(PATH, operation_id="list_devices", tags=TAGS, responses=problems(404), sync_to_thread=False)
def list_devices(engine: Engine, name: Name) -> tuple[DeviceView, ...]:
    """What a machine has besides its delta and its first network card, and volumes that were detached and are kept."""
    return engine.devices.list(name)


@change(post, PATH, "add_device", TAGS, *CHANGE_PROBLEMS)
async def add_device(engine: Engine, name: Name, data: AddDevice) -> Response[Operation]:
    """Plug in a device, at once where the machine runs."""
    return accepted(await engine.devices.add(name, data))


@change(delete, f"{PATH}/{{device:str}}", "remove_device", TAGS, 404, 409, 422, 503)
async def remove_device(engine: Engine, name: Name, device: Device, purge: bool = False) -> Response[Operation]:
    """Unplug a device. A volume keeps its data unless `purge` removes it."""
    return accepted(await engine.devices.remove(name, device, purge=purge))


@get(
    "/machines/{name:str}/hardware",
    operation_id="machine_hardware",
    tags=TAGS,
    responses=problems(404, 409, 422, 503),
)
async def machine_hardware(engine: Engine, name: Name) -> HardwareInfo:
    """Which virtual hardware a running machine sees: the paravirtualization in effect."""
    return await engine.devices.hardware(name)


HANDLERS = (list_devices, add_device, remove_device, machine_hardware)
