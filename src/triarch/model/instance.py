"""An instance: one daemon with its own state, sockets, bridge, addresses and ids.

Everything that must not collide between two instances on one host follows from `tag`.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from triarch.errors import Exhausted, Unavailable
from triarch.model.machine import IdRange

DEFAULT_TAG = "0"
# Slots of 65,536 ids, 8,192 to each instance. The first 16 of all are the host's own; the very last holds the id -1,
# which the kernel maps for nobody.
MAX_MACHINES = 8192 - 17


class Instance(msgspec.Struct, frozen=True, kw_only=True):
    """Where an instance lives. `state_dir` outlives a reboot, `run_dir` does not (it is on a tmpfs)."""

    tag: str
    state_dir: str
    run_dir: str
    user_id: int = 0

    @property
    def of_root(self) -> bool:
        """Whose it is, and so where its files are; what its daemon may do is for `host.rights` to say."""
        return self.user_id == 0

    @property
    def socket_path(self) -> Path:
        return Path(self.run_dir) / "triarchd.sock"

    @property
    def bridge(self) -> str:
        return f"tri{self.tag}"

    def host_interface(self, index: int) -> str:
        """The host's end of machine `index`'s link: at most 15 characters (IFNAMSIZ)."""
        return f"tri{self.tag}m{index}"

    def machine_run_dir(self, uuid: str) -> Path:
        return Path(self.run_dir) / "m" / uuid

    def machine_state_dir(self, uuid: str) -> Path:
        return Path(self.state_dir) / "machines" / uuid

    def log_path(self, uuid: str) -> Path:
        """Console output of all runs, kept over reboots."""
        return self.machine_state_dir(uuid) / "console.log"

    def cgroup(self, uuid: str) -> str:
        return f"/triarch-{self.tag}/{uuid}"

    def id_range(self, index: int) -> IdRange:
        """Host ids of container `index`: 65,536 of them, aligned, apart from every other machine's.

        The default instance takes slots 16 … 8,191, another one a region that its tag picks. Raises `Exhausted`
        beyond `MAX_MACHINES`.
        """
        if not 1 <= index <= MAX_MACHINES:
            raise Exhausted(f"there are no ids for machine {index} of this instance: it can have {MAX_MACHINES}")
        region = 0 if self.tag == DEFAULT_TAG else 1 + int(self.tag, 16) % 7
        return IdRange(base=(region * 8192 + 15 + index) << 16)


def default_instance(user_id: int | None = None) -> Instance:
    """The host's own instance for root, or a private one under the home directory for anybody else."""
    uid = os.geteuid() if user_id is None else user_id
    if uid == 0:
        return Instance(tag=DEFAULT_TAG, state_dir="/var/lib/triarch", run_dir="/run/triarch")
    state = Path(os.environ.get("XDG_DATA_HOME") or home_directory() / ".local/share") / "triarch"
    return Instance(tag=DEFAULT_TAG, state_dir=str(state), run_dir=f"{_user_runtime(uid)}/triarch", user_id=uid)


def instance_at(root: str | Path, user_id: int | None = None) -> Instance:
    """The separate instance whose state is in `root`. Its run directory is short, so that socket paths fit."""
    uid = os.geteuid() if user_id is None else user_id
    path = Path(root).expanduser().resolve()
    tag = _sha256_hex(os.fsencode(path))[:6]
    run = "/run" if uid == 0 else _user_runtime(uid)
    return Instance(tag=tag, state_dir=str(path), run_dir=f"{run}/triarch-{tag}", user_id=uid)


def home_directory() -> Path:
    """The caller's. Raises `Unavailable` for a user id without a name, as a container may be started with."""
    try:
        return Path.home()
    except RuntimeError as error:
        raise Unavailable("this user has no home directory", hint="export HOME=DIR") from error


def _user_runtime(uid: int) -> str:
    return os.environ.get("XDG_RUNTIME_DIR") or f"/tmp/triarch-{uid}"


def _sha256_hex(data: bytes) -> str:
    try:
        # As in the standard library's random.py: hashlib loads OpenSSL, a tenth of a short command's life.
        from _sha256 import sha256  # type: ignore[import-not-found]
    except ImportError:
        from hashlib import sha256
    digest: str = sha256(data).hexdigest()
    return digest
