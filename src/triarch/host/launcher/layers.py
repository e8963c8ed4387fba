"""Template layers, mounted once per host and shared by all machines on them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from triarch.errors import Damaged, NotFound
from triarch.host.launcher.protocol import LayerSource
from triarch.host.loop import attach_loop, find_shared_loop, loop_path
from triarch.host.syscalls import MNT_DETACH, MS_NOATIME, MS_NODEV, MS_RDONLY, mount, unmount


@dataclass(frozen=True, slots=True)
class _FileId:
    device: int
    inode: int


class Layers:
    """The layers that this launcher has mounted, each at `directory/DIGEST` in its own mount namespace."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._mounted: dict[LayerSource, _FileId] = {}

    def mount(self, source: LayerSource) -> None:
        """Mount the layer unless it is. Raises `NotFound`, `Damaged` or `OSError`."""
        self._drop_removed()
        if source in self._mounted:
            return
        try:
            file_fd = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError as error:
            raise NotFound(f"there is no template layer {source.path}", path=source.path) from error
        try:
            file = _id_of(os.fstat(file_fd))
            shared_fd = find_shared_loop(file_fd)
            device_fd = attach_loop(file_fd, source.path, read_only=True) if shared_fd is None else shared_fd
            try:
                self._mount_device(source, device_fd)
            finally:
                os.close(device_fd)
        finally:
            os.close(file_fd)
        self._mounted[source] = file

    def path(self, source: LayerSource) -> str:
        return f"{self._directory}/{source.digest}"

    def _mount_device(self, source: LayerSource, device_fd: int) -> None:
        target = self.path(source)
        Path(target).mkdir(exist_ok=True)
        try:
            mount(loop_path(device_fd), target, "erofs", MS_RDONLY | MS_NODEV | MS_NOATIME)
        except OSError as error:
            raise Damaged(f"template layer {source.path} is no EROFS image that this kernel can mount") from error

    def _drop_removed(self) -> None:
        """Let go of layers whose file was deleted or replaced: a mount would keep its disk space."""
        for source, file in list(self._mounted.items()):
            try:
                if _id_of(os.stat(source.path)) == file:  # noqa: PTH116
                    continue
            except FileNotFoundError:
                pass
            unmount(self.path(source), MNT_DETACH)
            del self._mounted[source]


def _id_of(file: os.stat_result) -> _FileId:
    return _FileId(file.st_dev, file.st_ino)
