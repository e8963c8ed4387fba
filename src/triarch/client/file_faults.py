"""What did not work in a machine, as the errors that people read."""

from __future__ import annotations

import errno
import os

from triarch.errors import Busy, Denied, Error, Exhausted, Exists, Failed, InUse, Invalid, NotFound
from triarch.model.file_protocol import FileFault
from triarch.model.resources import format_size

_CLASSES: dict[int, type[Error]] = {
    errno.ENOENT: NotFound,
    errno.EEXIST: Exists,
    errno.EACCES: Denied,
    errno.EPERM: Denied,
    errno.EROFS: Denied,
    errno.EBUSY: InUse,
    errno.ENOTEMPTY: InUse,
    errno.EAGAIN: Busy,
    errno.EISDIR: Invalid,
    errno.ENOTDIR: Invalid,
    errno.EINVAL: Invalid,
    errno.ENAMETOOLONG: Invalid,
    errno.ELOOP: Invalid,
}
FULL = (errno.ENOSPC, errno.EDQUOT)


def error_of_fault(machine: str, verb: str, fault: FileFault, needed_bytes: int | None = None) -> Error:
    """`cannot push web/etc/x: …`; a full disk tells what was needed and what is free."""
    where = f"{machine}{os.fsdecode(fault.path)}" if fault.path.startswith(b"/") else os.fsdecode(fault.path)
    if fault.number in FULL:
        needed = "" if needed_bytes is None else f"{format_size(needed_bytes)} needed, "
        return Exhausted(
            f"cannot {verb} '{where}': the disk of machine '{machine}' is full: "
            f"{needed}{format_size(fault.free_bytes)} free",
            hint=f"triarch set {machine} disk=SIZE",
            machine=machine,
            needed_bytes=needed_bytes,
            free_bytes=fault.free_bytes,
        )
    if fault.number == errno.EOVERFLOW:
        return Invalid(
            f"cannot {verb} '{where}': its owner or group has an id that machine '{machine}' has none for",
            hint="triarch file push --uid 0 --gid 0 …",
            machine=machine,
        )
    kind = _CLASSES.get(fault.number, Failed)
    reason = os.strerror(fault.number).lower() if fault.number < 4096 else f"error {fault.number}"
    return kind(f"cannot {verb} '{where}': {reason}", machine=machine)
