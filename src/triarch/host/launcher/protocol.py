"""What the daemon and the launcher say to each other: one JSON message per packet of a SOCK_SEQPACKET socket."""

from __future__ import annotations

from enum import StrEnum

import msgspec

from triarch.host.pidfd import ProcessId

MAX_MESSAGE_BYTES = 1 << 17


MONITOR_ERRORS = "monitor.err"


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where the launcher works: two directories of its own that the ids of containers may traverse (mode 0711).

    `layers` is where it mounts templates; on `machine` each start mounts its own tmpfs, in its own mount namespace.
    """

    layers: str
    machine: str
    lock: str

    @property
    def root(self) -> str:
        """The machine's assembled tree, as the runtime sees it."""
        return f"{self.machine}/root"

    @property
    def user_namespace(self) -> str:
        return f"{self.machine}/user-namespace"

    @property
    def network_namespace(self) -> str:
        return f"{self.machine}/network-namespace"

    def file(self, name: str) -> str:
        """A small file that the launch puts beside the tree."""
        return f"{self.machine}/files/{name}"


def place_in(run_dir: str) -> Place:
    base = f"{run_dir}/launcher"
    return Place(layers=f"{base}/layers", machine=f"{base}/machine", lock=f"{base}/lock")


class LayerSource(msgspec.Struct, frozen=True, kw_only=True):
    digest: str
    path: str


class Interface(msgspec.Struct, frozen=True, kw_only=True):
    """One card of the machine: a veth pair whose host end is plugged into `bridge`, or a macvlan on `parent`.

    Empty addresses and gateways are left out.
    """

    host_name: str
    mac: str
    name: str = "eth0"
    bridge: str = ""
    parent: str = ""
    address: str = ""
    address6: str = ""
    gateway: str = ""
    gateway6: str = ""


class SmallFile(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    text: str


# The step whose refusal may be about the machine's own command.
CREATE_STEP = "create the container"


class Launch(msgspec.Struct, frozen=True, kw_only=True, tag="launch"):
    """Prepare a machine's namespaces, tree, network and groups, then run `monitor` in them.

    `layers` are lowest first; `monitor` is conmon's command line: it reports to the descriptor that the environment
    variable `_OCI_SYNCPIPE` names. It runs in `directory`, where its standard error becomes the file `monitor.err`.
    A delta that is not `durable` need not outlive the host.
    """

    id: int
    layers: tuple[LayerSource, ...]
    delta_path: str
    durable: bool
    id_base: int
    id_count: int
    interfaces: tuple[Interface, ...]
    files: tuple[SmallFile, ...]
    cgroup: str
    monitor: tuple[str, ...]
    directory: str


class Probe(msgspec.Struct, frozen=True, kw_only=True, tag="probe"):
    """Try everything that a launch does to the host, on an empty ext4 image, and undo it."""

    id: int
    image_path: str
    id_base: int
    id_count: int


class Visit(msgspec.Struct, frozen=True, kw_only=True, tag="visit"):
    """Assemble a tree as a launch does and run a program alone in it, as its root, until the program ends.

    Comes with two descriptors: the program (a sealed memory file), and a socket that becomes its input and output. With
    `read_only` nothing is written, to the delta's file neither; without a delta the tree is the template's own.
    """

    id: int
    layers: tuple[LayerSource, ...]
    delta_path: str | None
    read_only: bool
    id_base: int
    id_count: int


class Join(msgspec.Struct, frozen=True, kw_only=True, tag="join"):
    """Run a program among the files of a container, in its user and mount namespaces and in its control group.

    It is in no other namespace of the container's, whose processes can neither see nor trace it. Comes with three
    descriptors: the two of `Visit`, and a pidfd of the container's first process.
    """

    id: int
    cgroup: str


class PlugKind(StrEnum):
    """What a plug puts into a container: a filesystem image, a directory of the host, or one device node."""

    VOLUME = "volume"
    FOLDER = "folder"
    NODE = "node"


class Plug(msgspec.Struct, frozen=True, kw_only=True, tag="plug"):
    """Mount `source` at `path` in a container that exists; there already is success.

    Ids of the files are those of the container, disk unchanged. `path` is resolved as the container's own root would
    resolve it, so that no link of its leads beyond it.
    """

    id: int
    first: ProcessId
    kind: PlugKind
    source: str
    path: str
    read_only: bool
    id_base: int


class Unplug(msgspec.Struct, frozen=True, kw_only=True, tag="unplug"):
    """Take away what a plug mounted. Not there is success; `in-use` where the container does not let go of it."""

    id: int
    first: ProcessId
    kind: PlugKind
    source: str
    path: str


class Cancel(msgspec.Struct, frozen=True, kw_only=True, tag="cancel"):
    """Give up `id`: it is answered with `Refused`. What a launch had begun outside is the driver's to clean."""

    id: int


class Launched(msgspec.Struct, frozen=True, kw_only=True, tag="launched"):
    """The container exists; its first process waits at the start fifo."""

    id: int
    monitor: ProcessId
    init: ProcessId


class Refused(msgspec.Struct, frozen=True, kw_only=True, tag="refused"):
    """`step` failed. `code` is a code of `errors.py`, None for what is no error of Triarch's own."""

    id: int
    step: str
    message: str
    code: str | None = None


class Done(msgspec.Struct, frozen=True, kw_only=True, tag="done"):
    """A probe found nothing missing, or the program of a visit has ended and its mounts are gone."""

    id: int


# What a child of the launcher does.
Work = Launch | Probe | Visit | Join | Plug | Unplug
Request = Work | Cancel
Reply = Launched | Refused | Done
