"""What can be plugged into a machine besides its delta and its first network card."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec

from triarch.model.network import IPv4Text, IPv6Text
from triarch.model.resources import DiskBytes, RateBytesPerSecond

DEVICE_NAME_PATTERN = r"^[a-z]([a-z0-9-]{0,13}[a-z0-9])?$(?!\n)"
DeviceName = Annotated[str, msgspec.Meta(pattern=DEVICE_NAME_PATTERN)]
GuestPath = Annotated[str, msgspec.Meta(pattern=r"^/[^\x00\n]{1,1023}$(?!\n)")]
HostPath = Annotated[str, msgspec.Meta(pattern=r"^/[^\x00\n]{0,1023}$(?!\n)")]
UsbId = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{4}:[0-9a-f]{4}$(?!\n)")]


KIND = "kind"


class Hardware(StrEnum):
    """Which virtual hardware a VM sees: made for guests that know they are guests, or that of real machines."""

    PARAVIRT = "paravirt"
    EMULATED = "emulated"


class VolumeDevice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field=KIND, tag="volume"):
    """A filesystem of the machine's own (ext4, `size_bytes`), mounted at `path`; it is kept when it is detached."""

    path: GuestPath
    size_bytes: DiskBytes = 10 << 30


class DiskDevice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field=KIND, tag="disk"):
    """A block device or raw image of the host, handed over as a block device whose serial is the device's name."""

    source: HostPath
    read_only: bool = False


class FolderDevice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field=KIND, tag="folder"):
    """A directory of the host at `path` in the machine; the host's owner 0 is the machine's owner 0."""

    source: HostPath
    path: GuestPath
    read_only: bool = False


class NicDevice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field=KIND, tag="nic"):
    """One more network card; the device's name is the interface's (`eth1`). What is None is chosen by the network."""

    network: str
    address: IPv4Text | None = None
    address6: IPv6Text | None = None
    receive_bytes_per_second: RateBytesPerSecond | None = None
    send_bytes_per_second: RateBytesPerSecond | None = None


class HostDevice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field=KIND, tag="host"):
    """A character device of the host (`/dev/ttyS1`, `/dev/dri/renderD128`) at the same path in the machine."""

    source: HostPath


class UsbDevice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field=KIND, tag="usb"):
    """A USB device of the host by its vendor and product, as `lsusb` shows them (`046d:c077`)."""

    id: UsbId


Device = VolumeDevice | DiskDevice | FolderDevice | NicDevice | HostDevice | UsbDevice


class AddDevice(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Body of adding a device. Without `live` a running machine gets it at its next start only."""

    name: DeviceName
    device: Device
    live: bool = True


class DeviceView(msgspec.Struct, frozen=True, kw_only=True):
    """A device as lists show it. `origin` is the profile that it comes from, or `machine`.

    One that is not `attached` is a volume which was detached and kept: adding it under its name brings its data back.
    """

    name: str
    device: Device | None
    origin: str
    attached: bool = True


class HardwareInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a running machine sees: the paravirtualization in effect, `none` where there is none.

    `kernel`: how the guest's kernel knows its hypervisor (`kvmclock`, `pvh`, `xen`, `shared` for a container).
    `drivers`: whose drivers it does I/O with (`virtio`, `xen`, `emulated`, `host` for a container).
    """

    kernel: tuple[str, ...]
    drivers: tuple[str, ...]
    detail: str = ""
