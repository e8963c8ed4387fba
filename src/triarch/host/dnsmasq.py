"""One dnsmasq as the name server of one bridge. It outlives the daemon; a new daemon knows it by its command line."""

from __future__ import annotations

import asyncio
import grp
import os
import pwd
import shutil
import signal
from ipaddress import IPv4Address
from pathlib import Path

from triarch.errors import Failed, Unavailable
from triarch.host.pidfd import ProcessId, find_by_argument, is_alive, process_id, send_signal, wait_for_end
from triarch.host.process import find_program, run

STOP_SECONDS = 5.0
_USERS = ("dnsmasq", "nobody")


class Dnsmasq:
    """The name server of one instance: its files are in `directory`, its records one file per name in `hosts/`."""

    def __init__(self, directory: Path, domain: str) -> None:
        self._directory = directory
        self._domain = domain
        self._hosts = directory / "hosts"
        self._pid_file = directory / "dnsmasq.pid"
        self._process: ProcessId | None = None

    def argv(self, address: IPv4Address) -> tuple[str, ...]:
        """It answers for the domain from our records alone, asks the host's resolvers for the rest, and drops root.

        Queries for the domain, for bare names and for private addresses are never sent on (dnsmasq(8)). Raises
        `Unavailable` where it has nobody to become.
        """
        user, group = _identity()
        return (
            "dnsmasq",
            "--conf-file=/dev/null",
            f"--pid-file={self._pid_file}",
            f"--user={user}",
            f"--group={group}",
            "--bind-interfaces",
            f"--listen-address={address}",
            "--no-hosts",
            f"--hostsdir={self._hosts}",
            f"--domain={self._domain}",
            f"--local=/{self._domain}/",
            "--expand-hosts",
            "--domain-needed",
            "--bogus-priv",
            "--cache-size=1000",
        )

    def running(self, address: IPv4Address) -> ProcessId | None:
        """The process, if it runs with just the arguments that we would give it now."""
        if self._process is None or not is_alive(self._process):
            program, *arguments = self.argv(address)
            found = self._recorded()
            wanted = [find_program(program), *arguments]
            self._process = found if found is not None and _command_line(found) == wanted else None
        return self._process

    async def ensure(self, address: IPv4Address) -> None:
        """Running, and listening on `address`, when this returns. Raises `MissingProgram` or `CommandFailed`."""
        if self.running(address) is not None:
            return
        # One that lost its pid file, or that an earlier release started differently, still holds the port.
        await self.stop()
        self._make_directories()
        await asyncio.to_thread(run, self.argv(address))
        if self.running(address) is None:
            raise Failed(f"dnsmasq ended right after its start on {address}", hint="journalctl -t dnsmasq")

    async def stop(self) -> None:
        """End it, whoever started it. Not running is success."""
        self._process = None
        for process in await asyncio.to_thread(find_by_argument, f"--pid-file={self._pid_file}"):
            for number in (signal.SIGTERM, signal.SIGKILL):
                send_signal(process, number)
                try:
                    await asyncio.wait_for(wait_for_end(process), STOP_SECONDS)
                    break
                except TimeoutError:
                    continue
        self._pid_file.unlink(missing_ok=True)

    async def clear(self) -> None:
        """End it and remove its files."""
        await self.stop()
        shutil.rmtree(self._directory, ignore_errors=True)

    def publish(self, name: str, address: IPv4Address) -> None:
        """Answer for `name` and `name.DOMAIN` from now on; dnsmasq watches the directory.

        `name` must be a checked machine name: it becomes a file name and a line.
        """
        self._make_directories()
        # dnsmasq ignores names that begin with a dot; it hears of the renamed file when that is complete and readable.
        draft = self._hosts / f".{name}"
        draft.write_text(f"{address} {name}\n")
        draft.chmod(0o644)
        draft.rename(self._hosts / name)

    def withdraw(self, name: str) -> None:
        """Forget a name; dnsmasq sees the file go (from release 2.88 on). Absent is success."""
        (self._hosts / name).unlink(missing_ok=True)

    def _make_directories(self) -> None:
        self._hosts.mkdir(parents=True, exist_ok=True)
        for directory in (self._directory, self._hosts):
            directory.chmod(0o755)

    def _recorded(self) -> ProcessId | None:
        """Who the pid file names, if it is a dnsmasq with that very pid file."""
        try:
            found = process_id(int(self._pid_file.read_text()))
        except (OSError, ValueError):
            return None
        if found is None or not is_alive(found):
            return None
        return found if f"--pid-file={self._pid_file}" in _command_line(found) else None


def _command_line(process: ProcessId) -> list[str]:
    try:
        return os.fsdecode(Path(f"/proc/{process.pid}/cmdline").read_bytes()).rstrip("\0").split("\0")
    except OSError:
        return []


def _identity() -> tuple[str, str]:
    """The user and group it runs as: Debian's package makes a user for it. Raises `Unavailable` without one."""
    for name in _USERS:
        try:
            entry = pwd.getpwnam(name)
            group = grp.getgrgid(entry.pw_gid).gr_name
        except KeyError:
            continue
        if _is_mapped(entry.pw_uid):
            return name, group
    raise Unavailable(f"dnsmasq cannot give up root: this host has none of the users {' and '.join(_USERS)}")


def _is_mapped(uid: int) -> bool:
    """Whether the user exists in our user namespace: in that of a lone user there is nobody but root."""
    lines = Path("/proc/self/uid_map").read_text().splitlines()
    ranges = (tuple(map(int, line.split())) for line in lines)
    return any(first <= uid < first + count for first, _, count in ranges)
