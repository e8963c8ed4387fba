"""The two ed25519 keys of a machine's agent channel: the guest proves itself to the host, the host to the guest."""

from __future__ import annotations

import struct

import msgspec


class AgentKeys(msgspec.Struct, frozen=True, kw_only=True):
    """`host_key` is for the guest, in dropbear's format; the public parts and `client_key` in OpenSSH's.

    `host_key` and `client_key` are secret: whoever keeps them keeps them at mode 0600.
    """

    host_key: bytes
    host_public_key: str
    client_key: str
    client_public_key: str


def generate_keys() -> AgentKeys:
    """Fresh keys. They cost about a millisecond, so that every start of a machine may have its own."""
    # Imported here because they are heavy and most processes never need them.
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

    host, client = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()

    def public(key: Ed25519PrivateKey) -> str:
        return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()

    seed = host.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
    point = host.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
    return AgentKeys(
        host_key=_ssh_string(b"ssh-ed25519") + _ssh_string(seed + point),
        host_public_key=public(host),
        client_key=client.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()).decode(),
        client_public_key=public(client),
    )


def _ssh_string(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data
