"""The first boot: what a machine does once, before it is called running for the first time.

A template that carries cloud-init gets a NoCloud seed in its tree before it starts, and is waited for. In any other
the work is done by commands in the machine: users, their keys, files, packages, commands, in this order. Whatever fails
ends the machine, which is kept, failed, with what was said last; its next start does all of it again.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import msgspec

from triarch.drivers.base import Exec
from triarch.engine.first_boot_scripts import FILE, PACKAGES, READY, SSH_KEYS, USER
from triarch.engine.procedure import LetStand
from triarch.engine.services import Services
from triarch.engine.trees import Tree
from triarch.errors import Error, Failed, Invalid, MachineFailed, TimedOut, Unavailable, Unsupported
from triarch.model.command import check_command
from triarch.model.driver import Data, EndOfInput, ExecRequest, Input, Stream
from triarch.model.file_protocol import (
    FileEntry,
    FileKind,
    Frame,
    FrameReader,
    data_header,
    decode_fault,
    encode_entry,
    finish_request,
    sync_request,
)
from triarch.model.machine import Exit, Machine
from triarch.model.operation import Progress
from triarch.model.policy import FirstBoot
from triarch.model.state import State, Status
from triarch.model.template import Init, Template

if TYPE_CHECKING:
    from triarch.engine.machine_actions import MachineActions

READY_SECONDS = 300.0
READY_POLL_SECONDS = 0.2
PIECE_SECONDS = 120.0
LONG_SECONDS = 3600.0
TAIL_BYTES = 2000
STEP = "first-boot"

SEED = "var/lib/cloud/seed/nocloud"
# Addresses are Triarch's to give, and there is no other source of data to look for.
_CLOUD_CONFIG = b"datasource_list: [NoCloud, None]\nnetwork: {config: disabled}\n"

_PACKAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9+._:=~/-]{0,127}\Z")
_WORD = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}\Z")
_OWNER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,31})?\Z")
_HASH = re.compile(r"[!-~]{0,255}\Z")
_SHELL = re.compile(r"(/[A-Za-z0-9_.+-]+)*\Z")


class Piece(msgspec.Struct, frozen=True, kw_only=True):
    """One command of the first boot. `what` completes "the first boot failed at …"."""

    what: str
    command: tuple[str, ...]
    input_bytes: bytes = b""
    timeout_seconds: float = PIECE_SECONDS


def check_first_boot(name: str, first_boot: FirstBoot | None, template: Template) -> None:
    """Refuse what cannot work. Pure. Raises `Invalid`, `Unsupported`."""
    if first_boot is None:
        return
    if first_boot.user_data and not template.cloud_init:
        raise Unsupported(
            f"machine '{name}' has user data for its first boot: template '{template.ref}' carries no cloud-init",
            hint="say users, ssh-keys, packages, files and commands instead",
        )
    for package in first_boot.packages:
        _match(_PACKAGE, package, "package")
    for user in first_boot.users:
        _match(_SHELL, user.shell, "shell")
        _match(_HASH, user.password_hash, "password hash")
        if ":" in user.password_hash or "|" in user.password_hash:
            raise Invalid(f"illegal password hash of user '{user.name}': it needs what crypt(5) makes")
        for group in user.groups:
            _match(_WORD, group, "group")
    for file in first_boot.files:
        _match(_OWNER, file.owner, "owner")
    for key in (*first_boot.ssh_keys, *(key for user in first_boot.users for key in user.ssh_keys)):
        if "\n" in key or not key.isprintable() or " " not in key.strip():
            raise Invalid(f"illegal ssh key {key[:60]!r}: it needs one line of a .pub file")
    for command in first_boot.commands:
        check_command(command, {})
        if not command:
            raise Invalid("a command of the first boot has no words")


def _match(pattern: re.Pattern[str], text: str, what: str) -> None:
    if not pattern.match(text):
        raise Invalid(f"illegal {what} {text[:80]!r} in the first boot")


def pieces(first_boot: FirstBoot) -> Iterator[Piece]:
    """The work of a machine without cloud-init, in order."""
    for user in first_boot.users:
        words = (user.name, user.shell, ",".join(user.groups), user.password_hash, "sudo" if user.sudo else "")
        yield Piece(what=f"user {user.name}", command=("/bin/sh", "-c", USER, "sh", *words))
    keys = [("root", first_boot.ssh_keys), *((user.name, user.ssh_keys) for user in first_boot.users)]
    for name, lines in keys:
        if lines:
            yield Piece(
                what=f"ssh keys of {name}",
                command=("/bin/sh", "-c", SSH_KEYS, "sh", name),
                input_bytes="".join(f"{line.strip()}\n" for line in lines).encode(),
            )
    for file in first_boot.files:
        yield Piece(
            what=f"file {file.path}",
            command=("/bin/sh", "-c", FILE, "sh", file.path, file.mode, file.owner),
            input_bytes=file.content.encode(),
        )
    if first_boot.packages:
        yield Piece(
            what=f"packages {' '.join(first_boot.packages)}",
            command=("/bin/sh", "-c", PACKAGES, "sh", *first_boot.packages),
            timeout_seconds=LONG_SECONDS,
        )
    for command in first_boot.commands:
        shown = command[2] if command[:2] == ("sh", "-c") and len(command) == 3 else " ".join(command)
        yield Piece(what=f"command {shown[:80]}", command=command, timeout_seconds=LONG_SECONDS)


# -- cloud-init


def seed_files(machine: Machine, first_boot: FirstBoot) -> dict[str, bytes]:
    """What cloud-init finds in its tree (NoCloud), by path; JSON is YAML too."""
    meta = {"instance-id": machine.uuid, "local-hostname": machine.name}
    return {
        f"{SEED}/meta-data": msgspec.json.encode(meta) + b"\n",
        f"{SEED}/user-data": (first_boot.user_data or cloud_config(first_boot)).encode(),
        f"{SEED}/vendor-data": b"",
        "etc/cloud/cloud.cfg.d/95-triarch.cfg": _CLOUD_CONFIG,
    }


def cloud_config(first_boot: FirstBoot) -> str:
    """The same work in cloud-init's own words."""
    users: list[object] = [
        {
            "name": user.name,
            "ssh_authorized_keys": list(user.ssh_keys),
            "groups": list(user.groups),
            **({"shell": user.shell} if user.shell else {}),
            **({"sudo": "ALL=(ALL) NOPASSWD:ALL"} if user.sudo else {}),
            **({"hashed_passwd": user.password_hash, "lock_passwd": False} if user.password_hash else {}),
        }
        for user in first_boot.users
    ]
    if first_boot.ssh_keys:
        users.append({"name": "root", "ssh_authorized_keys": list(first_boot.ssh_keys)})
    config = {
        "disable_root": False,
        "users": users,
        "write_files": [
            # Owners may be users that are made after the other files are written.
            {
                "path": file.path,
                "content": file.content,
                "permissions": file.mode,
                "owner": file.owner if ":" in file.owner else f"{file.owner}:{file.owner}",
                "defer": True,
            }
            for file in first_boot.files
        ],
        "package_update": bool(first_boot.packages),
        "packages": list(first_boot.packages),
        "runcmd": [list(command) for command in first_boot.commands],
    }
    return (
        "#cloud-config\n" + msgspec.json.encode({key: value for key, value in config.items() if value != []}).decode()
    )


WAIT_FOR_CLOUD_INIT = Piece(
    what="cloud-init",
    # 2: it is done, with something that it could do without.
    command=("/bin/sh", "-c", 'cloud-init status --wait --long; code=$?; [ "$code" = 2 ] || exit "$code"'),
    timeout_seconds=LONG_SECONDS,
)


class _Writing:
    """The far end of a file server that is told to write some files, and listens until all of them are there."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self._requests = iter(_requests(files))
        self._reader = FrameReader()
        self._done = asyncio.Event()
        self.problem: str | None = None

    async def read(self) -> Input:
        for request in self._requests:
            return Data(request)
        await self._done.wait()
        return EndOfInput()

    async def write(self, stream: Stream, data: bytes) -> None:
        self._reader.feed(data)
        for kind, payload in self._reader.frames():
            if kind is Frame.ERROR:
                fault = decode_fault(payload)
                self.problem = f"/{os.fsdecode(fault.path).lstrip('/')}: {os.strerror(fault.number).lower()}"
            elif kind is Frame.DONE:
                self._done.set()

    @property
    def is_done(self) -> bool:
        return self._done.is_set()


def _requests(files: dict[str, bytes]) -> Iterator[bytes]:
    made: set[str] = set()
    for path, content in files.items():
        parts = path.split("/")[:-1]
        for count in range(1, len(parts) + 1):
            folder = "/".join(parts[:count])
            if folder not in made:
                made.add(folder)
                yield encode_entry(FileEntry(path=f"/{folder}".encode(), kind=FileKind.DIRECTORY, mode=0o755))
        yield encode_entry(FileEntry(path=f"/{path}".encode(), kind=FileKind.FILE, mode=0o600, size_bytes=len(content)))
        if content:
            yield data_header(0, len(content)) + content
        yield finish_request(len(content))
    yield sync_request()


# -- doing it


class FirstBootWork:
    """Bound to one machine in the midst of its first start."""

    def __init__(self, services: Services, machine: MachineActions) -> None:
        self._services = services
        self._machine = machine

    @property
    def _wanted(self) -> FirstBoot:
        return self._machine.machine.first_boot or FirstBoot()

    @property
    def _has_cloud_init(self) -> bool:
        return self._services.template_of(self._machine.machine).cloud_init

    def _report(self, text: str, fraction: float | None = None) -> None:
        self._services.report(self._machine.target, Progress(step=STEP, text=text, fraction=fraction))

    async def seed(self) -> None:
        """Put what cloud-init reads into the tree of the machine, which does not run yet."""
        if not self._has_cloud_init:
            return
        spec = self._machine.spec
        writing = _Writing(seed_files(spec.machine, self._wanted))
        tree = Tree(layers=spec.layers, delta_path=spec.delta_path, ids=spec.machine.ids, read_only=False)
        await self._services.trees.serve(tree, writing)
        if writing.problem is not None or not writing.is_done:
            raise Failed(f"cannot give machine '{spec.machine.name}' its first boot's data: {writing.problem}")

    async def run(self) -> None:
        """All of it. Raises `LetStand` when something failed; the machine is ended and recorded as failed then."""
        work = (WAIT_FOR_CLOUD_INIT,) if self._has_cloud_init else tuple(pieces(self._wanted))
        try:
            if work:
                await self._until_ready()
            for count, piece in enumerate(work):
                self._report(piece.what, count / len(work))
                await self._do(piece)
        except Error as error:
            await self._fail(error)
            raise LetStand(error) from error
        await self._machine.update(first_booted=True)

    async def _until_ready(self) -> None:
        """Until a shell runs in it and its init is done. Raises `MachineFailed` when it ended, `TimedOut`."""
        self._report("waiting for the machine")
        name, init = self._machine.machine.name, self._machine.machine.init
        ask = Piece(what="shell", command=("/bin/sh", "-c", READY if init is Init.SYSTEM else ":"))
        reason = "it did not answer"
        try:
            async with asyncio.timeout(READY_SECONDS):
                while True:
                    try:
                        ended, said = await self._exec(ask)
                        if ended.code == 0:
                            return
                        reason = said or ended.reason or f"a shell ended with code {ended.code}"
                        if ended.code in (126, 127):
                            raise MachineFailed(f"the first boot of machine '{name}' needs /bin/sh: {reason}")
                    except (Unavailable, TimedOut, Failed) as error:
                        reason = error.message
                        observed = await self._machine.driver.observe(self._machine.spec)
                        if observed.status in (Status.STOPPED, Status.ABSENT) or "needs /bin/sh" in reason:
                            raise MachineFailed(f"machine '{name}' ended during its first boot: {reason}") from error
                    await asyncio.sleep(READY_POLL_SECONDS)
        except TimeoutError as error:
            raise TimedOut(
                f"machine '{name}' was not ready for its first boot within {READY_SECONDS:g} s: {reason}"
            ) from error

    async def _do(self, piece: Piece) -> None:
        ended, tail = await self._exec(piece)
        if ended.code == 0:
            return
        name = self._machine.machine.name
        how = f"exit code {ended.code}" if ended.code is not None else ended.reason
        said = f":\n{tail}" if tail else ""
        raise MachineFailed(
            f"the first boot of machine '{name}' failed at {piece.what} ({how}){said}",
            hint=f"triarch set {name} first-boot=none",
            machine=name,
        )

    async def _exec(self, piece: Piece) -> tuple[Exit, str]:
        """How the command ended, and the end of what it said."""
        driver = self._machine.driver
        if not isinstance(driver, Exec):
            raise Unsupported(f"architecture '{driver.name}' runs no commands, which the first boot needs")
        far_end = _Spoken(piece.input_bytes, lambda line: self._report(f"{piece.what}: {line}"))
        request = ExecRequest(command=piece.command, timeout_seconds=piece.timeout_seconds)
        ended = await driver.exec(self._machine.spec, request, far_end)
        return ended, far_end.tail

    async def _fail(self, error: Error) -> None:
        await self._machine.end_run()
        await self._machine.unplug()
        first_line = error.message.partition("\n")[0].removesuffix(":")
        await self._machine.update(
            state=State.FAILED, desired=State.STOPPED, last_exit=Exit(code=None, reason=first_line[:300])
        )
        self._machine.publish("failed", exit_code=None)


class _Spoken:
    """The far end of a command: gives it its input, keeps the end of its output, and hears its latest line."""

    def __init__(self, input_bytes: bytes, hear: Callable[[str], None]) -> None:
        self._input = [input_bytes] if input_bytes else []
        self._output = bytearray()
        self._hear = hear

    async def read(self) -> Input:
        return Data(self._input.pop()) if self._input else EndOfInput()

    async def write(self, stream: Stream, data: bytes) -> None:
        self._output += data
        del self._output[:-TAIL_BYTES]
        line = data.decode(errors="replace").strip().rpartition("\n")[2]
        if line:
            self._hear(line[:100])

    @property
    def tail(self) -> str:
        return self._output.decode(errors="replace").strip()
