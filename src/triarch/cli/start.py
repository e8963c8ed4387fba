"""Starting the daemon when a command needs it and it does not run."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import msgspec

from triarch.client import Client
from triarch.client.problems import error_of
from triarch.errors import CommandFailed, DaemonUnavailable
from triarch.model.instance import DEFAULT_TAG, Instance
from triarch.model.operation import Problem

UNIT = "triarchd.socket"
UNIT_DIRECTORIES = ("/etc/systemd/system", "/run/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")
# Another daemon may be starting or ending at this moment.
PATIENCE_SECONDS = 10.0


def start_daemon(instance: Instance, root: str | None) -> Client:
    """A client of the daemon that was started. Raises what kept the daemon from starting."""
    if _has_unit(instance):
        _start_unit()
    else:
        _spawn(instance, root)
    return _connect(instance)


def _has_unit(instance: Instance) -> bool:
    """Whether systemd runs this host and is to run this daemon (sd_booted(3))."""
    if instance.tag != DEFAULT_TAG or not instance.of_root or not Path("/run/systemd/system").is_dir():
        return False
    return any((Path(directory) / UNIT).exists() for directory in UNIT_DIRECTORIES)


def _start_unit() -> None:
    argv = ("systemctl", "start", UNIT)
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CommandFailed(argv, done.returncode, done.stderr)


def daemon_argv(root: str | None, *options: str) -> list[str]:
    """How to run this installation's `triarchd`."""
    return [sys.executable, "-m", "triarch.daemon", *(("--root", root) if root else ()), *options]


def _spawn(instance: Instance, root: str | None) -> None:
    """Start a daemon of our own in a new session and return when it serves."""
    process = subprocess.Popen(
        daemon_argv(root, "--background"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        start_new_session=True,
    )
    assert process.stdout is not None
    with process.stdout:
        word = process.stdout.read()
    # It lives on as somebody else's child; Popen must not warn about that.
    process.returncode = 0
    if word == b"ready\n":
        return
    try:
        problem = msgspec.json.decode(word, type=Problem)
    except msgspec.MsgspecError as error:
        log = Path(instance.run_dir) / "triarchd.log"
        raise DaemonUnavailable("the daemon ended while it started", hint=f"tail {log}") from error
    if problem.code != "busy":
        raise error_of(problem)


def _connect(instance: Instance) -> Client:
    client = Client(instance)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            client.connect()
            return client
        except DaemonUnavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
