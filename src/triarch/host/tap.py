"""Tap interfaces: the host's end of a VM's network card (Documentation/networking/tuntap.rst)."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import tempfile
from contextlib import suppress
from pathlib import Path

from triarch.errors import Denied, Error, Exists, Failed, InUse, NotFound, Unsupported
from triarch.host.netlink import Netlink

TAP_DEVICE = "/dev/net/tun"
_TUNSETIFF = 0x400454CA
_IFF_TAP, _IFF_NO_PI, _IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
_IFREQ = struct.Struct("16sH22x")

_ERRORS: dict[int, type[Error]] = {
    errno.EBUSY: InUse,
    errno.ENOENT: Unsupported,
    errno.ENODEV: Unsupported,
    errno.EPERM: Denied,
    errno.EACCES: Denied,
}


def open_tap(name: str, bridge: str) -> int:
    """Create the tap `name`, raise it and plug it into `bridge`; return its descriptor (close-on-exec).

    The interface lives as long as the descriptor: when the VM ends, whatever ended it, the tap is gone. Raises `InUse`
    when the name is taken, `NotFound` when there is no such bridge, `Denied` without CAP_NET_ADMIN.
    """
    with Netlink() as netlink:
        bridge_index = netlink.index_of(bridge)
        if bridge_index is None:
            raise NotFound(f"there is no bridge '{bridge}' for interface '{name}'", bridge=bridge)
        fd = _create(name)
        try:
            index = netlink.index_of(name)
            if index is None:
                raise Failed(f"interface '{name}' is gone right after it was made", interface=name)
            netlink.add_to_bridge(index, bridge_index)
            netlink.set_up(index)
        except BaseException:
            os.close(fd)
            raise
    return fd


def open_macvtap(name: str, parent: str, mac: str) -> int:
    """Create the macvtap `name` on the interface `parent`, raise it and return its descriptor (close-on-exec).

    It stays when the descriptor is closed, so one that an earlier run left is replaced. Raises as `open_tap` does.
    """
    with Netlink() as netlink:
        parent_index = netlink.index_of(parent)
        if parent_index is None:
            raise NotFound(f"there is no interface '{parent}' for interface '{name}'", interface=parent)
        try:
            netlink.add_macvlan(name, parent_index, mac, tap=True)
        except Exists:
            left_over = netlink.index_of(name)
            if left_over is not None:
                netlink.delete(left_over)
            netlink.add_macvlan(name, parent_index, mac, tap=True)
        index = netlink.index_of(name)
        if index is None:
            raise Failed(f"interface '{name}' is gone right after it was made", interface=name)
        try:
            netlink.set_up(index)
            return _open_node(name, index)
        except BaseException:
            with suppress(Error):
                netlink.delete(index)
            raise


def _open_node(name: str, index: int) -> int:
    """Its character device, by a node of our own: /dev has one only where somebody makes them."""
    try:
        major, minor = Path(f"/sys/class/net/{name}/tap{index}/dev").read_text().split(":")
        with tempfile.TemporaryDirectory(prefix="triarch-tap-") as directory:
            node = f"{directory}/tap"
            os.mknod(node, stat.S_IFCHR | 0o600, os.makedev(int(major), int(minor)))
            fd = os.open(node, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(name.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR))
    except OSError as error:
        kind = _ERRORS.get(error.errno or 0, Failed)
        raise kind(f"cannot open interface '{name}': {(error.strerror or '').lower()}", interface=name) from error
    return fd


def _create(name: str) -> int:
    fd = -1
    try:
        fd = os.open(TAP_DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        fcntl.ioctl(fd, _TUNSETIFF, _IFREQ.pack(name.encode(), _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR))
    except OSError as error:
        if fd >= 0:
            os.close(fd)
        kind = _ERRORS.get(error.errno or 0, Failed)
        raise kind(f"cannot create interface '{name}': {(error.strerror or '').lower()}", interface=name) from error
    return fd
