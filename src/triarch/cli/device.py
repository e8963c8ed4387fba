"""Commands about devices of machines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

import click

from triarch.cli.arguments import NounGroup, completes, machine_argument
from triarch.cli.dry_run import dry_run_option, would
from triarch.cli.listing import Listing, list_options
from triarch.cli.output import Column
from triarch.cli.progress import finish
from triarch.cli.session import Session
from triarch.errors import Invalid, NotFound
from triarch.model.device import (
    AddDevice,
    Device,
    DeviceView,
    DiskDevice,
    FolderDevice,
    HostDevice,
    NicDevice,
    UsbDevice,
    VolumeDevice,
)
from triarch.model.resources import format_size

_MAX_NAME = 15


class DeviceGroup(NounGroup):
    """`rm` removes."""

    aliases: ClassVar[dict[str, str]] = {"ls": "list", "rm": "remove"}


@click.group(
    "device",
    short_help="Plug devices into machines and out of them.",
    cls=DeviceGroup,
    epilog="Examples: triarch device add web data volume path=/data size=20G; triarch device list web; "
    "triarch device remove web data",
)
def device_command() -> None:
    """Plug disks, folders, network cards and host devices into machines and out of them."""


_next_start = click.option("--next-start", is_flag=True, help="Leave a running machine as it is until its next start.")


def _details(view: DeviceView) -> str:
    match view.device:
        case VolumeDevice(path=path, size_bytes=size_bytes):
            return f"{format_size(size_bytes)} at {path}"
        case DiskDevice(source=source, read_only=read_only):
            return f"{source} as /dev/disk/by-name/{view.name}{' (read-only)' if read_only else ''}"
        case FolderDevice(source=source, path=path, read_only=read_only):
            return f"{source} at {path}{' (read-only)' if read_only else ''}"
        case NicDevice(network=network, address=address):
            return f"{network}{f' {address}' if address else ''}"
        case HostDevice(source=source):
            return source
        case UsbDevice(id=usb_id):
            return usb_id
        case None:
            return "detached, its data is kept"


def _kind(view: DeviceView) -> str:
    return "volume" if view.device is None else str(view.device.__struct_config__.tag)


COLUMNS = (
    Column[DeviceView]("NAME", lambda each: each.name),
    Column[DeviceView]("KIND", _kind),
    Column[DeviceView]("DETAILS", _details),
    Column[DeviceView]("FROM", lambda each: each.origin),
    Column[DeviceView]("ATTACHED", lambda each: "yes" if each.attached else "no"),
)


def read_device(kind: str, words: Sequence[str]) -> Device:
    """`path=/data size=10G`. Raises `Invalid` that names the word."""
    import msgspec

    from triarch.model.setting_forms import DEVICE

    pairs: dict[str, str] = {"kind": kind}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals and key != "read-only":
            raise Invalid(f"illegal word '{word}': it needs KEY=VALUE", hint="triarch device add --help")
        pairs[key] = value if equals else "true"
    try:
        device: Device = msgspec.convert(DEVICE.read(dict(pairs)), Device)
    except ValueError as error:
        reason = str(error).partition(" - at `")[0].replace("_bytes", "")
        raise Invalid(f"illegal {kind}: {reason[:1].lower()}{reason[1:]}", hint="triarch device add --help") from error
    return device


@device_command.command(
    "add",
    short_help="Plug a device into a machine.",
    epilog="Examples: triarch device add web data volume path=/data size=20G; "
    "triarch device add web raw disk source=/dev/sdb; "
    "triarch device add web src folder source=/srv path=/srv read-only; "
    "triarch device add web eth1 nic network=backend; triarch device add web tty host source=/dev/ttyS1; "
    "triarch device add web key usb id=046d:c077",
)
@machine_argument()
@click.argument("device")
@click.argument("kind", type=click.Choice(("volume", "disk", "folder", "nic", "host", "usb")))
@click.argument("words", metavar="[KEY=VALUE]...", nargs=-1)
@_next_start
@click.pass_obj
def device_add(session: Session, name: str, device: str, kind: str, words: tuple[str, ...], next_start: bool) -> None:
    """Plug a device into a machine, at once where it runs.

    volume: path, size. disk: source, read-only. folder: source, path, read-only. nic: network, address, address6,
    receive, send. host: source. usb: id.
    """
    _add(session, name, device, read_device(kind, words), next_start)


def _add(session: Session, name: str, device: str, value: Device, next_start: bool) -> None:
    client = session.client
    finish(client, client.devices.add(name, AddDevice(name=device, device=value, live=not next_start)))
    view = DeviceView(name=device, device=value, origin="machine")
    print(f"device {device} of {name}: {_details(view)}" + (", from its next start on" if next_start else ""))


@device_command.command(
    "remove",
    epilog="Examples: triarch device remove web data; triarch device remove web data --purge",
)
@machine_argument()
@click.argument("device", shell_complete=completes("devices"))
@click.option("--purge", is_flag=True, help="Delete a volume's data too.")
@dry_run_option
@click.pass_obj
def device_remove(session: Session, name: str, device: str, purge: bool, dry_run: bool) -> None:
    """Unplug a device from a machine. A volume keeps its data, for when it is added again under its name."""
    client = session.client
    if dry_run:
        found = next((each for each in client.devices.list(name) if each.name == device), None)
        if found is None:
            raise NotFound(f"machine '{name}' has no device '{device}'", hint=f"triarch device list {name}")
        lost = ", and its data" if purge and _kind(found) == "volume" else ""
        would("remove", f"device {device} of {name} ({_kind(found)}){lost}")
        return
    finish(client, client.devices.remove(name, device, purge=purge))


@device_command.command(
    "list",
    short_help="List the devices of a machine.",
    epilog="Examples: triarch device list web; triarch device list web kind=volume -o json",
)
@machine_argument()
@list_options(COLUMNS)
@click.pass_obj
def device_list(session: Session, name: str, listing: Listing[DeviceView]) -> None:
    """List the devices of a machine, and volumes that were detached from it and are kept."""
    listing.print(session.client.devices.list(name))


def split_place(text: str) -> tuple[str, str]:
    """`NAME:/path`. Raises `Invalid`."""
    name, colon, path = text.partition(":")
    if not colon or not name or not path.startswith("/"):
        raise Invalid(f"illegal place '{text}': it needs NAME:/PATH, such as web:/srv")
    return name, path if path == "/" else path.rstrip("/")


def device_name_for(path: str, taken: Sequence[str]) -> str:
    """A name that says where the folder is: `/srv/www` is `srv-www`."""
    stem = re.sub(r"[^a-z0-9]+", "-", path.lower()).strip("-")
    stem = (stem if re.match(r"[a-z]", stem) else f"folder-{stem}")[:_MAX_NAME].strip("-")
    for number in range(1, 1000):
        ending = "" if number == 1 else f"-{number}"
        name = stem[: _MAX_NAME - len(ending)].rstrip("-") + ending
        if name not in taken:
            return name
    raise Invalid(f"there is no free name for a device at {path}")


@click.command(
    "mount",
    short_help="Show a directory of the host in a machine.",
    epilog="Examples: triarch mount /srv/www web:/var/www; triarch mount . web:/src --read-only",
)
@click.argument("folder", type=click.Path(exists=True, file_okay=False, resolve_path=True))
@click.argument("place", metavar="NAME:/PATH")
@click.option("--read-only", is_flag=True, help="The machine may not write to it.")
@_next_start
@click.pass_obj
def mount_command(session: Session, folder: str, place: str, read_only: bool, next_start: bool) -> None:
    """Show a directory of the host in a machine; files of the host's root are those of the machine's root."""
    name, path = split_place(place)
    taken = [view.name for view in session.client.devices.list(name)]
    device = FolderDevice(source=folder, path=path, read_only=read_only)
    _add(session, name, device_name_for(path, taken), device, next_start)


@click.command("unmount", epilog="Examples: triarch unmount web:/var/www")
@click.argument("place", metavar="NAME:/PATH")
@click.pass_obj
def unmount_command(session: Session, place: str) -> None:
    """Take a directory of the host out of a machine again."""
    client = session.client
    name, path = split_place(place)
    for view in client.devices.list(name):
        if isinstance(view.device, FolderDevice) and view.device.path == path:
            finish(client, client.devices.remove(name, view.name))
            return
    raise NotFound(f"machine '{name}' has no folder at {path}", hint=f"triarch device list {name}")
