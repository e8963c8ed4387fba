"""What every command works with: the instance it speaks to, and a client of its daemon."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from triarch.model.instance import Instance, default_instance, instance_at

if TYPE_CHECKING:
    from triarch.client import Client


class Session:
    """One run of the command line, on the instance in `root` or TRIARCH_ROOT.

    The client is made, and the daemon started, when first asked for.
    """

    def __init__(self, root: str | None) -> None:
        root = root or os.environ.get("TRIARCH_ROOT")
        # The daemon that is started for it works in another directory.
        self.root = str(Path(root).absolute()) if root else None

    @cached_property
    def instance(self) -> Instance:
        """The instance in `root`; else the host's own where the caller may use it; else the caller's own."""
        if self.root:
            return instance_at(self.root)
        hosts_own = default_instance(0)
        if os.geteuid() != 0 and os.access(hosts_own.socket_path, os.W_OK):
            return hosts_own
        return default_instance()

    @cached_property
    def client(self) -> Client:
        """A client of the daemon, which is started when it does not run. Raises `DaemonUnavailable` or `Denied`."""
        return self.running_client() or self._started_client()

    def running_client(self) -> Client | None:
        """A client of the daemon if it runs."""
        from triarch.client import Client
        from triarch.errors import DaemonUnavailable

        client = Client(self.instance)
        try:
            client.connect()
        except DaemonUnavailable:
            return None
        return client

    def _started_client(self) -> Client:
        from triarch.cli.start import start_daemon

        return start_daemon(self.instance, self.root)

    @property
    def never_used(self) -> bool:
        """Whether this instance has no state yet, so that there is nothing to list and nothing to stop."""
        return not (Path(self.instance.state_dir) / "triarch.db").exists()
