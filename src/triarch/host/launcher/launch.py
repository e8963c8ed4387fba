"""One start: runs in a child of the launcher, which dies when this is done.

Everything it mounts is in its own mount namespace, which the monitor inherits: when the last process of the machine is
gone, so are the mounts, the loop device and the delta's lock, whatever ended it. What it makes outside of that (the
host's end of the veth pair, control groups, the runtime's state) the driver removes, after a failure too.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from triarch.errors import Failed
from triarch.host.cgroup import cgroup_trees, delegate
from triarch.host.idmap import NamespaceMaker, NamespacePair, attach_mapped, filesystem_ids
from triarch.host.launcher.connect import connect
from triarch.host.launcher.protocol import (
    CREATE_STEP,
    MONITOR_ERRORS,
    Launch,
    Launched,
    LayerSource,
    Place,
    Probe,
    Visit,
)
from triarch.host.locks import lock_file
from triarch.host.loop import attach_loop, loop_path
from triarch.host.pidfd import process_id
from triarch.host.syscalls import (
    CLONE_NEWNS,
    MNT_DETACH,
    MS_BIND,
    MS_NOATIME,
    MS_NODEV,
    MS_NOSUID,
    die_with_parent,
    mount,
    unmount,
    unshare,
)

EXT4_OPTIONS = "discard,noinit_itable,errors=remount-ro"
# Every flush waits for the disk below, at the mount and at its end; only a power cut can tell the difference (ext4(5)).
_WITHOUT_FLUSHES = ",nobarrier"
# A delta then holds nothing that another kernel, or the rebase of a template, could not read.
_OVERLAY_OPTIONS = "redirect_dir=off,metacopy=off,index=off"
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Steps:
    """Remembers what is being done, so that a failure can say it."""

    def __init__(self) -> None:
        self.current = "begin"

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        self.current = name
        yield


def launch(request: Launch, place: Place, steps: Steps) -> Launched:
    """Do it all; the container waits at its start fifo afterwards. Raises `Error` or `OSError`; `steps` says where."""
    layers = tuple(f"{place.layers}/{layer.digest}" for layer in request.layers)
    options = EXT4_OPTIONS if request.durable else EXT4_OPTIONS + _WITHOUT_FLUSHES
    namespaces = assemble(request.delta_path, options, layers, request.id_base, request.id_count, place, steps)
    # Changing file system ids had cleared it (prctl(2)).
    die_with_parent(signal.SIGKILL)
    with steps("put small files beside the tree"):
        _write_files(request, place)
        _pin(namespaces.user_fd, place.user_namespace)
        _pin(namespaces.network_fd, place.network_namespace)
    with steps("set up the network"):
        connect(request.interfaces, namespaces.network_fd)
    with steps("make control groups"):
        _cover_hybrid_root()
        delegate(request.cgroup, request.id_base)
    with steps(CREATE_STEP):
        return _run_monitor(request)


def probe(request: Probe, place: Place, steps: Steps) -> None:
    """The same, without network and container, over an empty tree."""
    assemble(request.image_path, EXT4_OPTIONS, (), request.id_base, request.id_count, place, steps)
    with steps("write through the overlay"), filesystem_ids(request.id_base):
        (Path(place.root) / "probe").write_bytes(b"")


def sources(request: object) -> tuple[LayerSource, ...]:
    return request.layers if isinstance(request, Launch | Visit) else ()


def assemble(
    delta_path: str, options: str, layers: tuple[str, ...], id_base: int, id_count: int, place: Place, steps: Steps
) -> NamespacePair:
    """Lock the delta and mount the machine's tree at `root` below the working directory, in a new mount namespace."""
    with steps("fork"):
        maker = NamespaceMaker()
    with steps("lock the delta"):
        delta_fd = lock_file(delta_path)
    with steps("attach the delta to a loop device"):
        device_fd = attach_loop(delta_fd, delta_path, read_only=False)
        # From here on the loop device alone owns the locked description.
        os.close(delta_fd)
    with steps("enter a mount namespace"):
        unshare(CLONE_NEWNS)
        mount("tmpfs", place.machine, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
        os.chdir(place.machine)
        for name in ("delta", "mapped", "root", "files", *map(str, range(max(1, len(layers))))):
            Path(name).mkdir(mode=0o755)
    with steps("mount the delta"):
        mount(loop_path(device_fd), "delta", "ext4", MS_NODEV | MS_NOATIME, options)
        os.close(device_fd)
    with steps("make user and network namespaces"):
        namespaces = maker.finish(id_base, id_count)
    with steps("map ids of the layers and the delta"):
        for number, layer in enumerate(layers):
            attach_mapped(layer, str(number), namespaces.user_fd)
        attach_mapped("delta", "mapped", namespaces.user_fd)
    with steps("mount the overlay"):
        _mount_overlay(max(1, len(layers)), id_base)
    with steps("let go of what the overlay holds by itself"):
        for name in ("delta", "mapped", *map(str, range(len(layers))), place.layers):
            unmount(name, MNT_DETACH)
    return namespaces


def _mount_overlay(layer_count: int, id_base: int) -> None:
    # Relative names: as many layers as there may be fit into one page of options.
    lower = ":".join(str(number) for number in reversed(range(layer_count)))
    options = f"lowerdir={lower},upperdir=mapped/upper,workdir=mapped/work,{_OVERLAY_OPTIONS}"
    with filesystem_ids(id_base):
        mount("overlay", "root", "overlay", MS_NODEV | MS_NOATIME, options)


def _write_files(request: Launch, place: Place) -> None:
    for file in request.files:
        path = Path(place.file(file.name))
        path.write_text(file.text)
        path.chmod(0o644)
        os.chown(path, request.id_base, request.id_base)


def _cover_hybrid_root() -> None:
    """Let the runtime have a version 2 tree of the machine's own.

    The launcher hid the host's. Of the bare directory below crun would make one more version 1 tree, where nobody
    removes its groups.
    """
    hybrid_root = cgroup_trees().hybrid_root
    if hybrid_root is not None:
        Path("groups").mkdir(mode=0o755)
        mount("groups", str(hybrid_root), None, MS_BIND)


def _pin(namespace_fd: int, target: str) -> None:
    """Give a namespace a name in this mount namespace, for the runtime's configuration."""
    Path(target).touch()
    mount(f"/proc/self/fd/{namespace_fd}", target, None, MS_BIND)


def _run_monitor(request: Launch) -> Launched:
    sync_read, sync_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        _become_monitor(request, sync_write)
    os.close(sync_write)
    with os.fdopen(sync_read, "rb") as sync:
        line = sync.readline()
    report = json.loads(line) if line else {}
    init_pid = report.get("data", -1)
    monitor, init = process_id(pid), process_id(init_pid) if init_pid > 0 else None
    if monitor is None or init is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        errors = (Path(request.directory) / MONITOR_ERRORS).read_text(errors="replace").strip().splitlines()
        raise Failed(
            report.get("message", "").strip() or (errors[-1] if errors else "the monitor ended without a word")
        )
    return Launched(id=request.id, monitor=monitor, init=init)


def _become_monitor(request: Launch, sync_write: int) -> None:
    try:
        os.setsid()
        # conmon leaves a file here when the kernel kills something for want of memory.
        os.chdir(request.directory)
        # Python ignores these, and a program keeps what was ignored: a pipe in the machine would never break.
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        null = os.open("/dev/null", os.O_RDWR)
        errors = os.open(MONITOR_ERRORS, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        for source, target in ((null, 0), (null, 1), (errors, 2)):
            os.dup2(source, target)
        os.set_inheritable(sync_write, True)
        environment = {"PATH": _SYSTEM_PATH, "LC_ALL": "C.UTF-8", "_OCI_SYNCPIPE": str(sync_write)}
        os.execve(request.monitor[0], request.monitor, environment)
    finally:
        os._exit(127)
