"""What of the host can be handed to a machine: looking at it, and claiming it so that nobody else uses it meanwhile."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from triarch.errors import Busy, Denied, InUse, Invalid, NotFound
from triarch.host.locks import lock_file
from triarch.model.device import Device, DiskDevice, FolderDevice, HostDevice, UsbDevice

_USB_DEVICES = Path("/sys/bus/usb/devices")
_USB_NODES = Path("/dev/bus/usb")
_DISK_HINT = "lsblk -f"


def check_source(device: Device) -> None:
    """Raise `NotFound`, `Invalid` or `InUse` for a device that this host does not have, or not to give."""
    match device:
        case FolderDevice(source=source):
            if not stat.S_ISDIR(_status(source, "directory").st_mode):
                raise Invalid(f"{source} is not a directory", path=source)
        case DiskDevice(source=source, read_only=read_only):
            os.close(open_disk(source, read_only=read_only))
        case HostDevice(source=source):
            if not stat.S_ISCHR(_status(source, "device").st_mode):
                raise Invalid(f"{source} is not a character device", hint="ls -l /dev", path=source)
        case UsbDevice(id=usb_id):
            usb_node(usb_id)
        case _:
            pass


def _status(path: str, what: str) -> os.stat_result:
    try:
        return os.stat(path)  # noqa: PTH116
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"there is no {what} {path} on this host", path=path) from error
    except PermissionError as error:
        raise Denied(f"cannot look at {path}: permission denied", path=path) from error
    except OSError as error:
        raise Invalid(f"cannot look at {path}: {(error.strerror or str(error)).lower()}", path=path) from error


def is_block_device(path: str) -> bool:
    """Whether the path leads to a block device now."""
    try:
        return stat.S_ISBLK(os.stat(path).st_mode)  # noqa: PTH116
    except OSError:
        return False


def open_disk(path: str, *, read_only: bool) -> int:
    """Open a block device or raw image for one machine alone; the descriptor (close-on-exec) holds the claim.

    A block device is opened with O_EXCL, which the kernel refuses while it, or a part of it, is mounted or otherwise
    claimed (open(2)); an image is locked. Raises `NotFound`, `Invalid`, `InUse` or `Denied`.
    """
    mode = _status(path, "block device or image").st_mode
    if stat.S_ISREG(mode):
        return _open_image(path, read_only=read_only)
    if not stat.S_ISBLK(mode):
        raise Invalid(f"{path} is neither a block device nor a raw image", hint=_DISK_HINT, path=path)
    try:
        return os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise InUse(f"{path} is mounted, or in use by the host", hint=_DISK_HINT, path=path) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise Denied(f"cannot open {path}: {(error.strerror or '').lower()}", path=path) from error
        if error.errno in (errno.ENXIO, errno.ENODEV, errno.ENOMEDIUM):
            raise NotFound(f"there is no disk behind {path}", hint=_DISK_HINT, path=path) from error
        raise


def _open_image(path: str, *, read_only: bool) -> int:
    real = os.path.realpath(path)
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            if entry.read_text().rstrip("\n") == real:
                raise InUse(f"{path} is in use by the host as /dev/{entry.parts[3]}", hint=_DISK_HINT, path=path)
        except OSError:
            continue
    try:
        return lock_file(real, writable=not read_only)
    except Busy as error:
        raise InUse(f"{path} is in use: something else holds its lock", path=path) from error


def usb_node(usb_id: str) -> str:
    """The device file of the USB device with this vendor and product. Raises `NotFound`, or `Invalid` for two of it."""
    vendor, _, product = usb_id.partition(":")
    nodes = []
    for entry in sorted(_USB_DEVICES.glob("*")):
        try:
            found = [(entry / name).read_text().strip() for name in ("idVendor", "idProduct")]
            if found == [vendor, product]:
                numbers = (int((entry / name).read_text()) for name in ("busnum", "devnum"))
                nodes.append(_USB_NODES.joinpath(*(f"{number:03}" for number in numbers)))
        except (OSError, ValueError):
            continue
    if not nodes:
        raise NotFound(f"there is no USB device {usb_id} on this host", hint="lsusb", id=usb_id)
    if len(nodes) > 1:
        raise Invalid(f"this host has {len(nodes)} USB devices {usb_id}; which one is meant cannot be said", id=usb_id)
    return str(nodes[0])
