"""What makes one machine itself, taken out of a copy of it: the other side of `normalize`, for a delta.

A copy that has run already gets new ids and keys in the place of those that it came with, and not nothing, because not
every system makes what is missing. What the original never made, the copy makes at its first start as any machine does.
"""

from __future__ import annotations

import re
import secrets
from pathlib import Path

from triarch.host.ext4_files import list_files, read_file, remove_file, replace_file

_UPPER = "upper"
_KEY = re.compile(r"ssh_host_([a-z0-9]+)_key\Z")
_KEY_FILE = re.compile(r"ssh_host_[A-Za-z0-9_]+_key(-cert)?(\.pub)?\Z")
_ALGORITHMS = {"rsa": "ssh-rsa", "ecdsa": "ecdsa-sha2-nistp256", "ed25519": "ssh-ed25519"}
_SEEDS = ("var/lib/systemd/random-seed", "var/lib/systemd/credential.secret", "var/lib/urandom/random-seed")


def renew_identity(delta: Path, old_name: str, new_name: str) -> None:
    """Give the machine whose delta this is another machine-id, other ssh host keys and its own name (blocking).

    The delta is mounted nowhere and clean; the caller checks it afterwards.
    """
    machine_id = f"{secrets.token_hex(16)}\n".encode()
    for directory in ("etc", "var/lib/dbus"):
        if "machine-id" in list_files(delta, f"{_UPPER}/{directory}"):
            path = f"{_UPPER}/{directory}/machine-id"
            # An empty one is filled by the first start; so is one that says so (machine-id(5)).
            if read_file(delta, path).strip() not in (b"", b"uninitialized"):
                replace_file(delta, path, machine_id, 0o444)
    _renew_ssh_keys(delta, new_name)
    for seed in _SEEDS:
        directory, _, name = seed.rpartition("/")
        if name in list_files(delta, f"{_UPPER}/{directory}"):
            remove_file(delta, f"{_UPPER}/{seed}")
    hostname = f"{_UPPER}/etc/hostname"
    if "hostname" in list_files(delta, f"{_UPPER}/etc") and read_file(delta, hostname).strip() == old_name.encode():
        replace_file(delta, hostname, f"{new_name}\n".encode(), 0o644)


def _renew_ssh_keys(delta: Path, name: str) -> None:
    directory = f"{_UPPER}/etc/ssh"
    found = [file for file in list_files(delta, directory) if _KEY_FILE.match(file)]
    for file in found:
        remove_file(delta, f"{directory}/{file}")
    for file in found:
        match = _KEY.match(file)
        if match is None or match[1] not in _ALGORITHMS:
            continue
        # A fifth of a second to import, and few copies need it.
        import asyncssh

        key = asyncssh.generate_private_key(_ALGORITHMS[match[1]], comment=f"root@{name}")
        replace_file(delta, f"{directory}/{file}", key.export_private_key("openssh"), 0o600)
        replace_file(delta, f"{directory}/{file}.pub", key.export_public_key("openssh"), 0o644)
