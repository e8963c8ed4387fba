"""The fork server: reads requests, forks a child for each, passes its answer on."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import selectors
import signal
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from triarch.errors import Damaged, Error, Exhausted
from triarch.host.cgroup import cgroup_trees
from triarch.host.launcher.launch import Steps, launch, probe, sources
from triarch.host.launcher.layers import Layers
from triarch.host.launcher.plug import plug, unplug
from triarch.host.launcher.protocol import (
    MAX_MESSAGE_BYTES,
    Cancel,
    Done,
    Join,
    Launch,
    Place,
    Plug,
    Probe,
    Refused,
    Reply,
    Request,
    Unplug,
    Visit,
    Work,
    place_in,
)
from triarch.host.launcher.visit import join, visit
from triarch.host.syscalls import (
    CLONE_NEWNS,
    MNT_DETACH,
    MS_NODEV,
    MS_NOSUID,
    MS_REC,
    MS_SLAVE,
    die_with_parent,
    mount,
    unmount,
    unshare,
)

_CODES_OF_ERRNO = {
    errno.ENOSPC: Exhausted.code,
    errno.EMFILE: Exhausted.code,
    errno.ENFILE: Exhausted.code,
    errno.ENOMEM: Exhausted.code,
    errno.EUCLEAN: Damaged.code,
    errno.EBADMSG: Damaged.code,
}
# A pipe holds 64 KiB; the child must never wait for its reader.
_MAX_TEXT = 4096
_MAX_FDS = 3


@dataclass(frozen=True, slots=True)
class _Child:
    request_id: int
    pid: int
    pidfd: int
    answer_fd: int
    # Its own end is the end of a program that was run, and no answer is the answer.
    visits: bool


class Server:
    """Serves one daemon over `connection` until that closes."""

    def __init__(self, run_dir: str, connection: socket.socket) -> None:
        self._run_dir = Path(run_dir)
        self._place = place_in(run_dir)
        self._broken: Error | OSError | None = None
        self._layers = Layers(self._place.layers)
        self._connection = connection
        self._selector = selectors.DefaultSelector()
        self._children: dict[int, _Child] = {}
        self._pid = os.getpid()

    def serve(self) -> None:
        """Return when the daemon is gone."""
        try:
            self._lock_fd = _take_place(self._run_dir, self._place)
        except (Error, OSError) as error:
            # Whoever asks for a machine is told; there is nobody else to tell.
            self._broken = error
        self._decoder: msgspec.json.Decoder[Request] = msgspec.json.Decoder(Request)
        self._selector.register(self._connection, selectors.EVENT_READ)
        # Children then share these pages instead of copying them when the collector touches them.
        gc.collect()
        gc.freeze()
        gc.disable()
        while True:
            for key, _ in self._selector.select():
                if isinstance(key.data, _Child):
                    self._finish(key.data)
                elif not self._accept():
                    return

    def _accept(self) -> bool:
        try:
            message, fds, _, _ = socket.recv_fds(self._connection, MAX_MESSAGE_BYTES, _MAX_FDS)
        except ConnectionError:
            return False
        if not message:
            return False
        request = self._decoder.decode(message)
        if isinstance(request, Cancel):
            child = self._children.get(request.id)
            if child is not None:
                os.kill(child.pid, signal.SIGKILL)
        else:
            self._begin(request, fds)
        for fd in fds:
            os.close(fd)
        return True

    def _begin(self, request: Work, fds: list[int]) -> None:
        if self._broken is not None:
            self._send(refusal(request.id, "enter a mount namespace", self._broken))
            return
        steps = Steps()
        try:
            with steps("mount the template"):
                for source in sources(request):
                    self._layers.mount(source)
            with steps("fork"):
                answer_read, answer_write = os.pipe()
                pid = os.fork()
        except (Error, OSError) as error:
            self._send(refusal(request.id, steps.current, error))
            return
        if pid == 0:
            self._run_child(request, fds, answer_write)
        os.close(answer_write)
        child = _Child(request.id, pid, os.pidfd_open(pid), answer_read, isinstance(request, Visit | Join))
        self._children[request.id] = child
        self._selector.register(child.pidfd, selectors.EVENT_READ, child)

    def _run_child(self, request: Work, fds: list[int], answer_write: int) -> None:
        steps = Steps()
        answer: Reply
        try:
            die_with_parent(signal.SIGKILL)
            if os.getppid() != self._pid:
                os._exit(1)
            try:
                match request:
                    case Launch():
                        answer = launch(request, self._place, steps)
                    case Probe():
                        probe(request, self._place, steps)
                        answer = Done(id=request.id)
                    case Visit():
                        visit(request, fds, self._place, steps)
                    case Join():
                        join(request, fds, steps)
                    case Plug():
                        plug(request, self._place, steps)
                        answer = Done(id=request.id)
                    case Unplug():
                        unplug(request, steps)
                        answer = Done(id=request.id)
            except (Error, OSError) as error:
                answer = refusal(request.id, steps.current, error)
            os.write(answer_write, msgspec.json.encode(answer))
        except Exception as error:  # noqa: BLE001 — the daemon logs and shows it
            answer = Refused(id=request.id, step=steps.current, message=repr(error)[:_MAX_TEXT])
            os.write(answer_write, msgspec.json.encode(answer))
        finally:
            os._exit(0)

    def _finish(self, child: _Child) -> None:
        """The child's mount namespace is gone when its pidfd is readable: only then is a failed start undone."""
        self._selector.unregister(child.pidfd)
        del self._children[child.request_id]
        answer = os.read(child.answer_fd, MAX_MESSAGE_BYTES) if _readable(child.answer_fd) else b""
        os.close(child.answer_fd)
        os.close(child.pidfd)
        _, status = os.waitpid(child.pid, 0)
        if not answer and child.visits:
            answer = msgspec.json.encode(Done(id=child.request_id))
        if not answer:
            message = f"the process that launched it ended with status {os.waitstatus_to_exitcode(status)}"
            answer = msgspec.json.encode(Refused(id=child.request_id, step="launch", message=message))
        with suppress(ConnectionError):
            self._connection.send(answer)

    def _send(self, reply: Reply) -> None:
        with suppress(ConnectionError):
            self._connection.send(msgspec.json.encode(reply))


def refusal(request_id: int, step: str, error: Error | OSError) -> Refused:
    """The answer that tells of a failed step."""
    if isinstance(error, Error):
        return Refused(id=request_id, step=step, message=error.message[:_MAX_TEXT], code=error.code)
    return Refused(
        id=request_id,
        step=step,
        message=(error.strerror or str(error))[:_MAX_TEXT],
        code=_CODES_OF_ERRNO.get(error.errno or 0),
    )


def _take_place(run_dir: Path, place: Place) -> int:
    """Wait until an earlier launcher and its children are gone, then enter a mount namespace of our own.

    The returned descriptor holds the lock; children inherit it, so that the lock tells of them as well.
    """
    base = Path(place.lock).parent
    for directory in (base, Path(place.layers), Path(place.machine)):
        directory.mkdir(mode=0o711, parents=True, exist_ok=True)
    # Container root must be able to traverse the way to its tree ("make root private" fails otherwise).
    run_dir.chmod(run_dir.stat().st_mode | 0o011)
    lock_fd = os.open(place.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock_fd, fcntl.LOCK_EX)
    unshare(CLONE_NEWNS)
    mount(None, "/", None, MS_REC | MS_SLAVE)
    mount("tmpfs", place.layers, "tmpfs", MS_NOSUID | MS_NODEV, "mode=711,size=1m")
    hybrid_root = cgroup_trees().hybrid_root
    if hybrid_root is not None:
        # crun 1.8 refuses hosts that have both versions when it creates a container.
        unmount(str(hybrid_root), MNT_DETACH)
    return lock_fd


def _readable(fd: int) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(fd, selectors.EVENT_READ)
        return bool(selector.select(0))
