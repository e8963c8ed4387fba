"""What the guest's init does for a device, as the rows that `init/devices.c` reads."""

from __future__ import annotations

from triarch.errors import Invalid
from triarch.guest.protocol import GuestCard, encode_card

BUSY = 16


def volume_row(serial: str, path: str) -> bytes:
    """Mount the filesystem on the disk with this serial."""
    return _row("volume", serial, path)


def folder_row(tag: str, path: str, *, read_only: bool) -> bytes:
    """Mount the directory of the host that QEMU offers under `tag`."""
    return _row("folder", tag, path, "ro" if read_only else "rw")


def disk_row(name: str) -> bytes:
    """Name the disk with this serial in `/dev/disk/by-name`."""
    return _row("disk", name)


def card_row(card: GuestCard) -> bytes:
    """Name and configure a card that is plugged in now."""
    return _row("card", encode_card(card).decode())


def unmount_row(path: str) -> bytes:
    """Let go of a volume or folder; `BUSY` where something uses it."""
    return _row("unmount", path)


def release_row(name: str) -> bytes:
    """Let go of a disk; `BUSY` where something uses it."""
    return _row("release", name)


def hardware_row() -> bytes:
    """Tell which hardware the kernel sees, as `key value` lines."""
    return _row("hardware")


def _row(*words: str) -> bytes:
    encoded = [word.encode() for word in words]
    if any(b"\0" in word for word in encoded):
        raise Invalid("a device's path has a NUL character; no program can be given that")
    return b"".join(b"%d:%s" % (len(word), word) for word in encoded)
