"""One dnsmasq for one bridge: names, addresses for those that ask, router advertisements.

It outlives the daemon; a new daemon knows it by its command line.
"""

from __future__ import annotations

import asyncio
import grp
import os
import pwd
import shutil
import signal
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path

from triarch.errors import Failed, Unavailable
from triarch.host.pidfd import ProcessId, find_by_argument, is_alive, process_id, send_signal, wait_for_end
from triarch.host.process import find_program, run

STOP_SECONDS = 5.0
_USERS = ("dnsmasq", "nobody")
# Of --dhcp-host (dnsmasq(8)), in the place of a name: to a machine called `ignore` no address would be given.
_KEYWORDS = ("ignore", "infinite")


@dataclass(frozen=True, slots=True)
class Serving:
    """What one dnsmasq does. `dhcp` and `dhcp6` are the subnets in which it gives those that ask what is theirs.

    `address` and `address6` are its own on `bridge`; `routed6`: it is a way out over IPv6, not only a neighbour.
    """

    bridge: str
    address: IPv4Address
    address6: IPv6Address | None = None
    dns: bool = True
    dhcp: IPv4Network | None = None
    dhcp6: IPv6Network | None = None
    routed: bool = True
    routed6: bool = False


@dataclass(frozen=True, slots=True)
class Record:
    """One card: where its names are, and what it is told when it asks. `mac`, `address` and `address6` are checked."""

    names: tuple[str, ...]
    mac: str
    address: IPv4Address | None
    address6: IPv6Address | None


class Dnsmasq:
    """Its files are in `directory`: records one file per card in `hosts/` (names) and `leases/` (addresses)."""

    def __init__(self, directory: Path, domain: str) -> None:
        self._directory = directory
        self._domain = domain
        self._hosts = directory / "hosts"
        self._leases = directory / "leases"
        self._pid_file = directory / "dnsmasq.pid"
        self._process: ProcessId | None = None

    def argv(self, serving: Serving) -> tuple[str, ...]:
        """It answers for the domain from our records alone, asks the host's resolvers for the rest, and drops root.

        Queries for the domain, for bare names and for private addresses are never sent on (dnsmasq(8)). It knows every
        card beforehand, so it keeps no leases. Raises `Unavailable` where it has nobody to become.
        """
        user, group = _identity()
        return (
            "dnsmasq",
            "--conf-file=/dev/null",
            f"--pid-file={self._pid_file}",
            f"--user={user}",
            f"--group={group}",
            "--bind-dynamic",
            f"--interface={serving.bridge}",
            "--except-interface=lo",
            "--no-hosts",
            f"--hostsdir={self._hosts}",
            f"--domain={self._domain}",
            f"--local=/{self._domain}/",
            "--expand-hosts",
            "--domain-needed",
            "--bogus-priv",
            "--cache-size=1000",
            *(() if serving.dns else ("--port=0",)),
            *self._dhcp(serving),
        )

    def _dhcp(self, serving: Serving) -> tuple[str, ...]:
        if serving.dhcp is None and serving.dhcp6 is None:
            return ()
        options = ["--leasefile-ro", "--dhcp-authoritative", f"--dhcp-hostsdir={self._leases}"]
        if serving.dhcp is not None:
            options.append(f"--dhcp-range={serving.dhcp.network_address},static,{serving.dhcp.netmask},1h")
            # Without a value an option is not sent at all.
            options.append("--dhcp-option=option:router" + (f",{serving.address}" if serving.routed else ""))
            options.append("--dhcp-option=option:dns-server" + (f",{serving.address}" if serving.dns else ""))
        if serving.dhcp6 is not None:
            options.append("--enable-ra")
            options.append(f"--dhcp-range={serving.dhcp6.network_address},static,{serving.dhcp6.prefixlen},1h")
            options.append(f"--ra-param={serving.bridge},60,{1800 if serving.routed6 else 0}")
            if serving.dns:
                options.append(f"--dhcp-option=option6:dns-server,[{serving.address6}]")
        return tuple(options)

    def running(self, serving: Serving) -> ProcessId | None:
        """The process, if it runs with just the arguments that we would give it now."""
        if self._process is None or not is_alive(self._process):
            program, *arguments = self.argv(serving)
            found = self._recorded()
            wanted = [find_program(program), *arguments]
            self._process = found if found is not None and _command_line(found) == wanted else None
        return self._process

    async def ensure(self, serving: Serving) -> None:
        """Running, and doing just that, when this returns. Raises `MissingProgram` or `CommandFailed`."""
        if self.running(serving) is not None:
            return
        # One that lost its pid file, or that an earlier release started differently, still holds the port.
        await self.stop()
        self._make_directories()
        await asyncio.to_thread(run, self.argv(serving))
        if self.running(serving) is None:
            raise Failed(f"dnsmasq ended right after its start on {serving.bridge}", hint="journalctl -t dnsmasq")

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

    def publish(self, key: str, record: Record) -> None:
        """Know a card from now on; dnsmasq watches both directories.

        `key` becomes a file name and `names` become words of a line: both must be checked names.
        """
        self._make_directories()
        names = " ".join(record.names)
        own = [address for address in (record.address, record.address6) if address is not None]
        _write(self._hosts, key, "".join(f"{address} {names}\n" for address in own) if names else "")
        given = [str(record.address)] if record.address is not None else []
        given += [f"[{record.address6}]"] if record.address6 is not None else []
        hostname = [f"{name}.{self._domain}" if name in _KEYWORDS else name for name in record.names[:1]]
        changed = _write(self._leases, key, ",".join((record.mac, *given, *hostname)) + "\n" if given else "")
        if changed:
            self._read_again()

    def withdraw(self, key: str) -> None:
        """Forget a card; dnsmasq sees the file of names go (from release 2.88 on). Absent is success."""
        (self._hosts / key).unlink(missing_ok=True)
        (self._leases / key).unlink(missing_ok=True)

    def knows(self, key: str) -> bool:
        """Whether a record of the card is there."""
        return (self._leases / key).exists() or (self._hosts / key).exists()

    def keys(self) -> frozenset[str]:
        """The cards that it knows."""
        found = (
            path.name for directory in (self._hosts, self._leases) if directory.is_dir() for path in directory.iterdir()
        )
        return frozenset(name for name in found if not name.startswith("."))

    def _read_again(self) -> None:
        """A file that replaces another adds to what it said: only this makes dnsmasq forget the former (dnsmasq(8))."""
        process = self._recorded()
        if process is not None:
            send_signal(process, signal.SIGHUP)

    def _make_directories(self) -> None:
        for directory in (self._directory, self._hosts, self._leases):
            directory.mkdir(mode=0o755, parents=True, exist_ok=True)
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


def _write(directory: Path, key: str, text: str) -> bool:
    """Put a complete and readable file there, or none for no text; whether it took the place of another one.

    dnsmasq ignores names that begin with a dot, and hears of the renamed file.
    """
    path = directory / key
    before = path.read_text() if path.exists() else None
    if before == (text or None):
        return False
    if not text:
        path.unlink()
        return True
    draft = directory / f".{key}"
    draft.write_text(text)
    draft.chmod(0o644)
    draft.rename(path)
    return before is not None


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
