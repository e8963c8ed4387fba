"""The modules layer: all modules of the pack's kernel in one image, which a guest mounts on `/lib/modules/RELEASE`.

No template carries them, since the kernel is no part of it; without them a guest's firewall, FUSE or loop devices fail.
"""

from __future__ import annotations

import shutil
from pathlib import Path, PurePosixPath

from triarch.errors import Damaged
from triarch.guest.initramfs import PackageTree
from triarch.guest.kernel import without_signature
from triarch.host.process import run

# The same packages make the same image, byte for byte.
_IMAGE_UUID = "00000000-0000-0000-0000-000000000000"
_IMAGE_TIME = "0"


def write_modules_image(tree: PackageTree, release: str, image: Path, workspace: Path) -> None:
    """Write the EROFS image of `lib/modules/RELEASE`, with the index that modprobe(8) looks modules up in.

    `workspace` is an empty directory for scratch files; it is left empty. Raises `Damaged` for packages without
    modules, `MissingProgram`, `CommandFailed`.
    """
    prefix = PurePosixPath("lib/modules", release)
    folder = workspace / prefix
    for name in tree.names():
        path = PurePosixPath(name)
        if not path.is_relative_to(prefix) or ".." in path.parts or not tree.is_file(name):
            continue
        target = workspace / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(without_signature(tree.read(name)))
    if not (folder / "kernel").is_dir():
        raise Damaged(f"the guest's packages hold no modules of kernel {release}")
    run(("depmod", "-b", str(workspace), release))
    form = ("-zlz4hc", "--all-root", "-T", _IMAGE_TIME, "-U", _IMAGE_UUID)
    run(("mkfs.erofs", "--quiet", *form, str(image), str(folder)))
    shutil.rmtree(workspace / "lib")
