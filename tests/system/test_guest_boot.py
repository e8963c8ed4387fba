"""The guest pack under plain QEMU: exit codes, standard input and output, the agent, orderly ends."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from triarch.errors import Error, TimedOut
from triarch.guest.agent import Agent
from triarch.guest.keys import AgentKeys, generate_keys
from triarch.guest.pack import ensure_pack
from triarch.guest.protocol import (
    AGENT_PORT,
    CONTROL_PORT,
    DELTA_SERIAL,
    FW_CFG_KEY,
    REPORT_PORT,
    STDIN_WINDOW_BYTES,
    Credit,
    Ended,
    GuestConfig,
    GuestDecoder,
    GuestMessage,
    GuestProblem,
    Medium,
    Output,
    Ready,
    Stop,
    encode_config,
    encode_message,
    kernel_command_line,
    layer_serial,
)
from triarch.model.driver import Data, EndOfInput, ExecRequest, GuestPack, Input, Resize, Stream
from triarch.model.machine import Exit
from triarch.model.template import Init

PROGRAMS = ("sh", "cat", "sleep", "stty", "id", "head", "env", "ls", "touch", "sync")
NEEDED = ("qemu-system-x86_64", "mkfs.erofs", "mkfs.ext4", "mmdebstrap", "cc", "lz4")
BOOT_SECONDS = 120.0

pytestmark = [
    pytest.mark.skipif(
        any(shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None for name in NEEDED),
        reason=f"needs all of {', '.join(NEEDED)}",
    ),
]


@pytest.fixture(scope="module")
def pack() -> GuestPack:
    try:
        return asyncio.run(ensure_pack(lambda progress: None))
    except Error as error:
        pytest.skip(f"the guest pack cannot be built here: {error}")


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two layers: a few of the host's own programs with their libraries, and one that overrides a file."""
    base, top = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("top")
    for name in PROGRAMS:
        program = shutil.which(name, path="/usr/bin:/bin")
        assert program is not None
        libraries = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
        paths = {word for word in libraries.split() if word.startswith("/")}
        for path in (program, *paths):
            target = base / path.removeprefix("/usr").lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            target.chmod(0o755)
    (base / "usr").mkdir()
    (base / "usr/lib").symlink_to("../lib")
    (base / "usr/bin").symlink_to("../bin")
    for folder in ("etc", "proc", "sys", "dev", "run", "tmp", "root"):
        (base / folder).mkdir()
    (base / "etc/layer").write_text("base\n")
    (top / "etc").mkdir()
    (top / "etc/layer").write_text("top\n")
    return _pack_layer(base), _pack_layer(top)


def _pack_layer(tree: Path) -> Path:
    image = tree.with_suffix(".erofs")
    subprocess.run(["mkfs.erofs", "--quiet", "-E", "noinline_data", str(image), str(tree)], check=True)
    os.truncate(image, -(-image.stat().st_size // (2 << 20)) * (2 << 20))
    return image


class Guest:
    """One QEMU process and its three ports."""

    def __init__(self, process: asyncio.subprocess.Process, folder: Path, keys: AgentKeys) -> None:
        self.process = process
        self.folder = folder
        self.agent = Agent(folder / "agent.sock", keys)

    async def messages(self) -> list[GuestMessage]:
        """Wait until QEMU is gone and return what the report port got."""
        await asyncio.wait_for(self.process.wait(), BOOT_SECONDS)
        return GuestDecoder().feed((self.folder / "report").read_bytes())

    @property
    def console(self) -> str:
        return (self.folder / "console").read_text(errors="replace")

    def check_delta(self) -> None:
        delta = str(self.folder / "delta.raw")
        header = subprocess.run(["dumpe2fs", "-h", delta], capture_output=True, text=True, check=True).stdout
        assert "needs_recovery" not in header
        subprocess.run(["e2fsck", "-fn", delta], capture_output=True, check=True)


def _config(command: tuple[str, ...], keys: AgentKeys, layers: tuple[Medium, ...] = (Medium.PMEM,)) -> GuestConfig:
    return GuestConfig(
        hostname="guest-test",
        init=Init.APP,
        layers=layers,
        host_key=keys.host_key,
        authorized_key=keys.client_public_key,
        command=command,
    )


@asynccontextmanager
async def boot(
    pack: GuestPack, images: tuple[Path, ...], config: GuestConfig, keys: AgentKeys, folder: Path, *, delta: bool = True
) -> AsyncIterator[Guest]:
    folder.joinpath("config").write_bytes(encode_config(config))
    _make_delta(folder / "delta.raw")
    process = await asyncio.create_subprocess_exec(*_command_line(pack, images, config, folder, delta=delta))
    guest = Guest(process, folder, keys)
    try:
        for _ in range(200):
            if (folder / "control.sock").exists():
                break
            await asyncio.sleep(0.05)
        yield guest
    finally:
        await guest.agent.close()
        if process.returncode is None:
            process.kill()
            await process.wait()


def _make_delta(image: Path) -> None:
    with image.open("wb") as stream:
        stream.truncate(64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m0", "-J", "size=4", str(image)], check=True)


def _command_line(
    pack: GuestPack, images: tuple[Path, ...], config: GuestConfig, folder: Path, *, delta: bool
) -> list[str]:
    command = ["qemu-system-x86_64", "-M", "q35", "-accel", "tcg,tb-size=32", "-cpu", "max", "-nodefaults"]
    command += ["-no-user-config", "-display", "none", "-no-reboot", "-m", "256,slots=4,maxmem=4G"]
    command += ["-kernel", pack.kernel_path, "-initrd", pack.initrd_path, "-append", kernel_command_line(config)]
    command += ["-chardev", f"file,id=console,path={folder}/console", "-serial", "chardev:console"]
    command += ["-fw_cfg", f"name={FW_CFG_KEY},file={folder}/config", "-device", "virtio-serial-pci"]
    for name, port in (("agent", AGENT_PORT), ("control", CONTROL_PORT)):
        command += ["-chardev", f"socket,id={name},path={folder}/{name}.sock,server=on,wait=off"]
        command += ["-device", f"virtserialport,chardev={name},name={port}"]
    command += ["-chardev", f"file,id=report,path={folder}/report"]
    command += ["-device", f"virtserialport,chardev=report,name={REPORT_PORT}"]
    for index, (medium, image) in enumerate(zip(config.layers, images, strict=True)):
        if medium is Medium.PMEM:
            backend = f"memory-backend-file,id=layer{index},mem-path={image},size={image.stat().st_size}"
            command += ["-object", f"{backend},share=on,readonly=on"]
            command += ["-device", f"virtio-pmem-pci,memdev=layer{index}"]
        else:
            command += ["-drive", f"if=none,id=layer{index},file={image},format=raw,readonly=on"]
            command += ["-device", f"virtio-blk-pci,drive=layer{index},serial={layer_serial(index)}"]
    if delta:
        command += ["-drive", f"if=none,id=delta,file={folder}/delta.raw,format=raw,discard=unmap"]
        command += ["-device", f"virtio-blk-pci,drive=delta,serial={DELTA_SERIAL}"]
    return command


@pytest.fixture(scope="module")
def keys() -> Iterator[AgentKeys]:
    yield generate_keys()


@pytest.mark.parametrize(
    ("script", "media", "expected"),
    [
        ("echo hello; cat /etc/layer; touch /root/mark", (Medium.PMEM,), Exit(code=0)),
        ("cat /etc/layer; exit 42", (Medium.BLOCK, Medium.PMEM), Exit(code=42)),
        ("kill -9 $$", (Medium.PMEM, Medium.PMEM), Exit(code=137, reason="killed by signal 9")),
    ],
    ids=["0", "42", "137"],
)
async def test_app_reports_its_exit_and_leaves_the_delta_clean(
    script: str,
    media: tuple[Medium, ...],
    expected: Exit,
    pack: GuestPack,
    layers: tuple[Path, Path],
    keys: AgentKeys,
    tmp_path: Path,
) -> None:
    config = _config(("sh", "-c", script), keys, media)
    async with boot(pack, layers[: len(media)], config, keys, tmp_path) as guest:
        assert await guest.messages() == [Ready(), Ended(expected)]
        if "cat" in script:
            assert ("top\n" if len(media) == 2 else "base\n") in guest.console
        guest.check_delta()


async def test_a_command_that_is_not_there_says_so(
    pack: GuestPack, layers: tuple[Path, Path], keys: AgentKeys, tmp_path: Path
) -> None:
    async with boot(pack, layers[:1], _config(("no-such",), keys), keys, tmp_path) as guest:
        assert await guest.messages() == [Ready(), Ended(Exit(code=127))]
        assert "triarch: cannot run 'no-such': No such file or directory" in guest.console


async def test_a_missing_delta_is_one_clear_line(
    pack: GuestPack, layers: tuple[Path, Path], keys: AgentKeys, tmp_path: Path
) -> None:
    async with boot(pack, layers[:1], _config(("sh",), keys), keys, tmp_path, delta=False) as guest:
        assert await guest.messages() == [GuestProblem("the disk with the delta is missing")]
        assert "triarch: the disk with the delta is missing\n" in guest.console.replace("\r", "")


class Control:
    """The host's end of the control port."""

    def __init__(self, folder: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(folder / "control.sock"))
        self._socket.setblocking(False)
        self._decoder = GuestDecoder()
        self._messages: list[GuestMessage] = []

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self._socket, data)

    async def next(self) -> GuestMessage | None:
        """The next message, None when QEMU is gone."""
        while not self._messages:
            data = await asyncio.wait_for(asyncio.get_running_loop().sock_recv(self._socket, 65536), BOOT_SECONDS)
            if not data:
                self._socket.close()
                return None
            self._messages += self._decoder.feed(data)
        return self._messages.pop(0)

    async def converse(self, data: bytes = b"") -> tuple[bytes, bytes, int, Exit | None]:
        """Send all of `data` and the end of input within the window; return stdout, stderr, credit and exit."""
        window, credit, at = STDIN_WINDOW_BYTES, 0, 0
        output = {Stream.STDOUT: b"", Stream.STDERR: b""}
        ended = None
        while True:
            piece = data[at : at + window]
            if piece:
                await self.send(encode_message(Data(piece)))
                at, window = at + len(piece), window - len(piece)
                if at == len(data):
                    await self.send(encode_message(EndOfInput()))
            match await self.next():
                case None:
                    return output[Stream.STDOUT], output[Stream.STDERR], credit, ended
                case Output(stream, text):
                    output[stream] += text
                case Credit(size):
                    window, credit = window + size, credit + size
                case Ended(exit):
                    ended = exit


async def test_attached_streams_are_separate_whole_and_flow_controlled(
    pack: GuestPack, layers: tuple[Path, Path], keys: AgentKeys, tmp_path: Path
) -> None:
    data = os.urandom(300_000)
    script = "sleep 1; cat; echo done >&2; exit 5"
    config = GuestConfig(
        hostname="attached",
        init=Init.APP,
        layers=(Medium.PMEM,),
        host_key=keys.host_key,
        authorized_key=keys.client_public_key,
        command=("sh", "-c", script),
        attached=True,
    )
    async with boot(pack, layers[:1], config, keys, tmp_path) as guest:
        stdout, stderr, credit, ended = await Control(tmp_path).converse(data)
        assert stdout == data
        assert stderr == b"done\n"
        assert credit == len(data)
        assert ended == Exit(code=5)
        assert (await guest.messages())[-1] == Ended(Exit(code=5))
        guest.check_delta()


async def test_attached_terminal_has_its_size_and_follows_it(
    pack: GuestPack, layers: tuple[Path, Path], keys: AgentKeys, tmp_path: Path
) -> None:
    config = GuestConfig(
        hostname="terminal",
        init=Init.APP,
        layers=(Medium.PMEM,),
        host_key=keys.host_key,
        authorized_key=keys.client_public_key,
        command=("sh", "-c", "stty size; read line; stty size; echo got $line"),
        attached=True,
        terminal=Resize(columns=100, rows=30),
    )
    async with boot(pack, layers[:1], config, keys, tmp_path) as guest:
        control = Control(tmp_path)
        assert await control.next() == Ready()
        shown = b""
        while b"30 100\r\n" not in shown:
            message = await control.next()
            assert isinstance(message, Output)
            shown += message.data
        await control.send(encode_message(Resize(columns=77, rows=11)))
        stdout, stderr, _, ended = await control.converse(b"words\n")
        assert b"11 77\r\n" in stdout
        assert b"got words\r\n" in stdout
        assert (stderr, ended) == (b"", Exit(code=0))
        await guest.messages()


async def test_stop_is_heard_though_nobody_reads_the_input(
    pack: GuestPack, layers: tuple[Path, Path], keys: AgentKeys, tmp_path: Path
) -> None:
    config = GuestConfig(
        hostname="stopped",
        init=Init.APP,
        layers=(Medium.BLOCK,),
        host_key=keys.host_key,
        authorized_key=keys.client_public_key,
        command=("sleep", "1000"),
        attached=True,
    )
    async with boot(pack, layers[:1], config, keys, tmp_path) as guest:
        control = Control(tmp_path)
        assert await control.next() == Ready()
        await control.send(encode_message(Data(bytes(STDIN_WINDOW_BYTES))))
        await control.send(encode_message(Stop()))
        assert (await guest.messages())[-1] == Ended(Exit(code=143, reason="killed by signal 15"))
        guest.check_delta()


class Far:
    """The far end of an exec."""

    def __init__(self, *pieces: Input, gone_after: int | None = None) -> None:
        self._pieces = list(pieces)
        self._gone_after = gone_after
        self.output = {Stream.STDOUT: b"", Stream.STDERR: b""}

    async def read(self) -> Input:
        return self._pieces.pop(0) if self._pieces else EndOfInput()

    async def write(self, stream: Stream, data: bytes) -> None:
        self.output[stream] += data
        if self._gone_after is not None and len(self.output[Stream.STDOUT]) >= self._gone_after:
            raise ConnectionResetError("the far end is gone")


async def _run(agent: Agent, *command: str, **options: object) -> tuple[Exit, bytes, bytes]:
    far = Far(*options.pop("pieces", ()))  # type: ignore[misc]
    ended = await agent.exec(ExecRequest(command=command, **options), far)  # type: ignore[arg-type]
    return ended, far.output[Stream.STDOUT], far.output[Stream.STDERR]


async def test_agent(pack: GuestPack, layers: tuple[Path, Path], keys: AgentKeys, tmp_path: Path) -> None:
    async with boot(pack, layers[:1], _config(("sleep", "1000"), keys), keys, tmp_path) as guest:
        agent = guest.agent
        await agent.wait_ready(BOOT_SECONDS)
        assert await _run(agent, "cat", pieces=(Data(b"a"), Data(b"b"))) == (Exit(code=0), b"ab", b"")
        assert await _run(agent, "sh", "-c", "echo o; echo e >&2; exit 42") == (Exit(code=42), b"o\n", b"e\n")
        killed = await _run(agent, "sh", "-c", "kill -9 $$")
        assert killed[0].code == 137
        missing = await _run(agent, "no-such")
        assert (missing[0].code, missing[2]) == (127, b"triarch: no-such: No such file or directory\n")

        hostile = "x\n'\"$(id)\\ \x01 \t ü"
        words = await _run(agent, "sh", "-c", 'printf "%s|%s|" "$1" "$A"', "-", hostile, environment={"A": hostile})
        assert words[1] == f"{hostile}|{hostile}|".encode()
        long = "y" * 100_000
        assert (await _run(agent, "sh", "-c", "echo ${#1}", "-", long))[1] == b"100000\n"

        who = await _run(agent, "sh", "-c", "id -u; id -g; pwd", user="33:44", directory="/tmp")
        assert who[1] == b"33\n44\n/tmp\n"
        terminal = await _run(agent, "sh", "-c", "stty size; echo e >&2", terminal=True, columns=91, rows=21)
        assert terminal[1:] == (b"21 91\r\ne\r\n", b"")

        together = await asyncio.gather(*(_run(agent, "sh", "-c", f"sleep 1; exit {n}") for n in range(8)))
        assert [ended.code for ended, _, _ in together] == list(range(8))

        with pytest.raises(ConnectionResetError):
            script = "trap 'touch /root/hung-up; exit' HUP; echo here; while :; do sleep 1; done"
            await agent.exec(ExecRequest(command=("sh", "-c", script)), Far(gone_after=1))
        assert (await _run(agent, "ls", "/root"))[1] == b"hung-up\n"

        await agent.close()
        assert (await _run(agent, "cat", "/etc/layer"))[1] == b"base\n"
        await agent.close()

        stranger = Agent(tmp_path / "agent.sock", generate_keys())
        with pytest.raises(Error) as refused:
            await stranger.wait_ready(60)
        assert not isinstance(refused.value, TimedOut)
        assert "key" in refused.value.message
        await stranger.close()
