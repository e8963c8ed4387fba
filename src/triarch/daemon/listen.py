"""How a daemon takes possession of its instance: run directory, lock, socket."""

from __future__ import annotations

import contextlib
import fcntl
import grp
import os
import shutil
import socket
import stat
import time
from pathlib import Path

from triarch.errors import Busy, Denied, Error, Unavailable
from triarch.model.instance import DEFAULT_TAG, Instance

GROUP = "triarch"
SOCKET_MODE = 0o660
BACKLOG = 512
HANDOVER_SECONDS = 10.0
_FIRST_PASSED_DESCRIPTOR = 3


def prepare_run_dir(instance: Instance) -> None:
    """Make the run directory. Raises `Denied` when it cannot be made, or when another user could replace things in it.

    The run directory of an ordinary user may lie in /tmp, where anybody can be first to take a name.
    """
    path = Path(instance.run_dir)
    try:
        path.mkdir(mode=0o755 if instance.of_root else 0o700, parents=True, exist_ok=True)
        directories = [path] if instance.of_root else [path.parent, path]
        found = [(directory, directory.lstat()) for directory in directories]
    except OSError as error:
        raise Denied(f"cannot make the run directory {path}: {error.strerror}", hint="triarch doctor") from error
    for directory, status in found:
        foreign = status.st_uid != instance.user_id or status.st_mode & 0o022
        if not stat.S_ISDIR(status.st_mode) or foreign:
            raise Denied(
                f"{directory} is not safe to use: it must be a directory that only user {instance.user_id} writes"
            )


def claim(instance: Instance) -> int:
    """Lock the instance for this process and write its pid; the open descriptor is the lock.

    A daemon that is just ending is waited for. Raises `Busy` that names the other daemon's pid.
    """
    path = Path(instance.run_dir) / "triarchd.pid"
    deadline = time.monotonic() + HANDOVER_SECONDS
    descriptor = _open_lock(path)
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, path):
                break
            # A daemon that came down took the file with it while this one waited for its lock.
            os.close(descriptor)
            prepare_run_dir(instance)
            descriptor = _open_lock(path)
        except BlockingIOError:
            if _answers(instance.socket_path) or time.monotonic() > deadline:
                pid = os.pread(descriptor, 32, 0).decode().strip()
                os.close(descriptor)
                raise Busy(
                    f"another triarchd (pid {pid}) already serves {instance.state_dir}",
                    hint="triarch down" if instance.tag == DEFAULT_TAG else f"triarch --root {instance.state_dir} down",
                    pid=pid,
                ) from None
            time.sleep(0.02)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


def passed_socket() -> socket.socket | None:
    """The listening socket that systemd passed (sd_listen_fds(3)), if it did."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS") != "1":
        return None
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    listener = socket.socket(fileno=_FIRST_PASSED_DESCRIPTOR)
    listener.set_inheritable(False)
    if listener.family != socket.AF_UNIX or not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        raise Unavailable(
            "the socket that systemd passed is not a listening unix socket", hint="systemctl cat triarchd.socket"
        )
    return listener


def bind_socket(instance: Instance) -> socket.socket:
    """Listen on the instance's socket: mode 0660, group `triarch` where there is one.

    It appears under its name only when it listens, so that nobody meets a socket that refuses.
    """
    path = instance.socket_path
    temporary = path.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(temporary))
        temporary.chmod(SOCKET_MODE)
        if instance.of_root:
            # No such group, no right to give files away, or no such id in this user namespace: then it is root's alone.
            with contextlib.suppress(KeyError, OSError):
                os.chown(temporary, 0, grp.getgrnam(GROUP).gr_gid)
        listener.listen(BACKLOG)
        temporary.rename(path)
    except OSError as error:
        listener.close()
        raise Unavailable(f"cannot listen on {path}: {error.strerror or error}") from error
    return listener


class Possession:
    """The lock and the socket of an instance, as a context; on leaving, the socket's name goes before the lock does.

    With `clear` the whole run directory goes, as after `down`.
    """

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._lock = -1
        self._own_socket = False
        self.clear = False

    def __enter__(self) -> socket.socket:
        prepare_run_dir(self._instance)
        self._lock = claim(self._instance)
        try:
            passed = passed_socket()
            self._own_socket = passed is None
            return passed or bind_socket(self._instance)
        except Error:
            os.close(self._lock)
            raise

    def __exit__(self, *_: object) -> None:
        if self._own_socket:
            self._instance.socket_path.unlink(missing_ok=True)
        if self.clear and self._own_socket:
            shutil.rmtree(self._instance.run_dir, ignore_errors=True)
        os.close(self._lock)
