"""Whether this host can run containers: by trying, and saying exactly what is missing."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from triarch.errors import DriverUnavailable, Error, MissingProgram, Unavailable
from triarch.host.cgroup import cgroup_trees, remove_if_empty, try_to_make
from triarch.host.ext4 import make_delta_image
from triarch.host.launcher.client import Launcher
from triarch.host.launcher.protocol import Probe
from triarch.host.process import find_program, run
from triarch.host.rights import rights
from triarch.model.instance import Instance

_PROGRAMS = ("crun", "conmon", "mkfs.ext4")
_FILESYSTEMS = ("overlay", "erofs", "ext4")
_CONTROLLERS = {1: ("cpu", "cpuacct", "cpuset", "devices", "freezer", "memory", "pids"), 2: ("cpu", "memory", "pids")}
_IMAGE_BYTES = 64 << 20


async def check_host(instance: Instance, launcher: Launcher) -> str:
    """crun's version, when a machine can be assembled here. Raises `DriverUnavailable` or `MissingProgram`."""
    if obstacle := rights().obstacle:
        raise DriverUnavailable(f"containers need root of the host: {obstacle.reason}", hint=obstacle.remedy)
    await asyncio.to_thread(_check_programs_and_kernel)
    _try_control_groups(instance)
    await _try_to_assemble(instance, launcher)
    return runtime_version().splitlines()[0].removeprefix("crun version ")


def runtime_version() -> str:
    """All that `crun --version` says, and the C library of seccomp filters that it uses."""
    library = sorted(Path("/usr/lib").glob("*/libseccomp.so.2.*"))
    return run(["crun", "--version"]).decode() + "".join(path.name for path in library)


def _check_programs_and_kernel() -> None:
    for program in _PROGRAMS:
        find_program(program)
    for name in _FILESYSTEMS:
        if name not in _known_filesystems():
            with suppress(Error):
                run(["modprobe", name])
            if name not in _known_filesystems():
                raise DriverUnavailable(f"the kernel does not know the filesystem {name}", hint=f"modprobe {name}")
    if not Path("/dev/loop-control").exists():
        with suppress(Error):
            run(["modprobe", "loop"])
        if not Path("/dev/loop-control").exists():
            raise DriverUnavailable("there are no loop devices: /dev/loop-control is missing", hint="modprobe loop")
    try:
        trees = cgroup_trees()
    except Unavailable as error:
        raise DriverUnavailable(error.message, hint=error.hint) from error
    missing = [name for name in _CONTROLLERS[trees.version] if name not in trees.controllers]
    if missing:
        raise DriverUnavailable(f"control groups v{trees.version} lack the controllers {', '.join(missing)}")


def _known_filesystems() -> frozenset[str]:
    return frozenset(line.split()[-1] for line in Path("/proc/filesystems").read_text().splitlines())


def _try_control_groups(instance: Instance) -> None:
    try:
        try_to_make(instance.cgroup("probe"))
    except OSError as error:
        raise DriverUnavailable(f"control groups cannot be made: {error.strerror}: {error.filename}") from error
    remove_if_empty(str(PurePosixPath(instance.cgroup("probe")).parent))


async def _try_to_assemble(instance: Instance, launcher: Launcher) -> None:
    """Loop device, ext4, user and network namespace, id-mapped mount, overlay: for real, on an image of a moment."""
    ids = instance.id_range(1)
    try:
        with TemporaryDirectory(prefix="triarch-probe-") as directory:
            image = Path(directory) / "delta.raw"
            await asyncio.to_thread(make_delta_image, image, _IMAGE_BYTES)
            await launcher.probe(Probe(id=0, image_path=str(image), id_base=ids.base, id_count=ids.count))
    except MissingProgram:
        raise
    except (Error, OSError) as error:
        raise DriverUnavailable(f"this host cannot assemble a container: {error}") from error
