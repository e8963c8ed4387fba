"""The capability `files`: a machine's files as it has them itself, and nothing but them."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from triarch.drivers.base import Exec, Files
from triarch.errors import Error, WrongState
from triarch.model.driver import Data, EndOfInput, MachineSpec
from triarch.model.file_protocol import (
    FileEntry,
    FileFault,
    FileKind,
    Flag,
    Frame,
    FrameReader,
    data_header,
    decode_data,
    decode_entry,
    decode_fault,
    decode_finish,
    encode_entry,
    finish_request,
    get_request,
    list_request,
    remove_request,
    stat_request,
    sync_request,
)
from triarch.testing.driver.fixtures import DriverFixtures, request
from triarch.testing.driver_rig import DriverRig, FarEnd

ODD_NAME = b"/tmp/odd \n\xff'\"$(id)"
CONTENT = bytes(range(256)) * 800


class Answer:
    """What a file server said."""

    def __init__(self, said: bytes) -> None:
        self.entries: list[FileEntry] = []
        self.faults: list[FileFault] = []
        self.content = bytearray()
        self.done = 0
        reader = FrameReader()
        reader.feed(said)
        for kind, payload in reader.frames():
            match kind:
                case Frame.ENTRY:
                    self.entries.append(decode_entry(payload))
                case Frame.ERROR:
                    self.faults.append(decode_fault(payload))
                case Frame.DATA:
                    offset, data = decode_data(payload)
                    self.content[offset : offset + len(data)] = data
                case Frame.FINISH:
                    self.content.extend(bytes(decode_finish(payload).size_bytes - len(self.content)))
                case Frame.DONE:
                    self.done += 1


def file_frames(entry: FileEntry, content: bytes) -> bytes:
    return encode_entry(entry) + data_header(0, len(content)) + content + finish_request(len(content))


def in_pieces(data: bytes) -> list[Data]:
    """As a client sends it."""
    return [Data(data[start : start + 50_000]) for start in range(0, len(data), 50_000)]


class CheckFiles(DriverFixtures):
    """Skipped where the driver lacks the capability."""

    def _can(self, rig: DriverRig) -> Files:
        driver = rig.driver
        if not isinstance(driver, Files):
            pytest.skip(f"driver '{driver.name}' lacks the capability 'files'")
        return driver

    async def _idle(self, rig: DriverRig) -> MachineSpec:
        self._can(rig)
        return await rig.idle()

    async def _ask(self, rig: DriverRig, spec: MachineSpec, requests: bytes) -> Answer:
        far_end = FarEnd(*in_pieces(requests))
        async with asyncio.timeout(rig.seconds(60)):
            await self._can(rig).serve_files(spec, far_end)
        return Answer(far_end.stdout)

    async def test_what_is_written_is_what_the_machine_sees(self, rig: DriverRig) -> None:
        spec = await self._idle(rig)
        entry = FileEntry(path=ODD_NAME, kind=FileKind.FILE, mode=0o4751, uid=1, gid=2, modified_ns=10**18 + 7)
        answer = await self._ask(rig, spec, file_frames(entry, b"content") + sync_request() + stat_request(ODD_NAME))
        assert not answer.faults
        assert answer.entries == [
            FileEntry(
                path=ODD_NAME, kind=FileKind.FILE, mode=0o4751, uid=1, gid=2, size_bytes=7, modified_ns=10**18 + 7
            )
        ]
        if isinstance(rig.driver, Exec):
            shown = FarEnd()
            await rig.driver.exec(spec, request("cat /tmp/odd*; stat -c ' %a %u %g' /tmp/odd*; rm /tmp/odd*"), shown)
            assert shown.stdout == b"content 4751 1 2\n"

    async def test_content_goes_in_and_comes_out(self, rig: DriverRig) -> None:
        spec = await self._idle(rig)
        entry = FileEntry(path=b"/tmp/big", kind=FileKind.FILE, size_bytes=len(CONTENT))
        answer = await self._ask(
            rig, spec, b"".join(file_frames(entry, CONTENT) for _ in range(3)) + get_request(b"/tmp/big")
        )
        assert not answer.faults
        assert answer.content == CONTENT

    async def test_links_pipes_and_directories(self, rig: DriverRig) -> None:
        spec = await self._idle(rig)
        tree = [
            FileEntry(path=b"/tmp/tree", kind=FileKind.DIRECTORY, mode=0o750),
            FileEntry(path=b"/tmp/tree/link", kind=FileKind.SYMLINK, target=b"/nowhere"),
            FileEntry(path=b"/tmp/tree/pipe", kind=FileKind.FIFO, mode=0o600),
        ]
        file = file_frames(FileEntry(path=b"/tmp/tree/file", kind=FileKind.FILE), b"x")
        linked = FileEntry(path=b"/tmp/tree/other", kind=FileKind.LINK, target=b"/tmp/tree/file")
        requests = b"".join(map(encode_entry, tree)) + file + encode_entry(linked) + sync_request()
        answer = await self._ask(rig, spec, requests + get_request(b"/tmp/tree", Flag.RECURSIVE | Flag.NO_DATA))
        assert not answer.faults
        found = {entry.path: entry for entry in answer.entries}
        assert sorted(found) == [b"", b"file", b"link", b"other", b"pipe"]
        assert (found[b""].kind, found[b""].mode) == (FileKind.DIRECTORY, 0o750)
        assert (found[b"link"].kind, found[b"link"].target) == (FileKind.SYMLINK, b"/nowhere")
        assert found[b"pipe"].kind is FileKind.FIFO
        assert {found[b"file"].kind, found[b"other"].kind} == {FileKind.FILE, FileKind.LINK}
        answer = await self._ask(rig, spec, remove_request(b"/tmp/tree", Flag.RECURSIVE) + stat_request(b"/tmp/tree"))
        assert [fault.number for fault in answer.faults] == [2]

    async def test_what_has_no_end_is_not_read(self, rig: DriverRig) -> None:
        spec = await self._idle(rig)
        answer = await self._ask(rig, spec, get_request(b"/dev/zero") + get_request(b"/proc", Flag.RECURSIVE))
        assert not answer.content
        assert answer.done == 2

    async def test_nothing_but_the_machine_is_seen(self, rig: DriverRig) -> None:
        spec = await self._idle(rig)
        up = b"/" + b"../" * 50
        answer = await self._ask(
            rig, spec, list_request(b"/") + list_request(up) + stat_request(spec.delta_path.encode())
        )
        names = sorted(entry.path for entry in answer.entries)
        assert names[::2] == names[1::2], "the way up from the root leads to the root"
        assert [fault.number for fault in answer.faults] == [2], "the host's files are not there"

    async def test_a_far_end_that_hangs_up_ends_it(self, rig: DriverRig) -> None:
        spec = await self._idle(rig)
        far_end = FarEnd(open_ended=True)
        task = asyncio.ensure_future(self._can(rig).serve_files(spec, far_end))
        await far_end.until(b"V", rig.seconds(30))
        far_end.feed(EndOfInput())
        async with asyncio.timeout(rig.seconds(30)):
            await task

    async def test_kill_does_not_wait_for_a_visitor(self, rig: DriverRig) -> None:
        self._can(rig)
        spec = await rig.ready()
        far_end = FarEnd(open_ended=True)
        task = asyncio.ensure_future(self._can(rig).serve_files(spec, far_end))
        await far_end.until(b"V", rig.seconds(30))
        async with asyncio.timeout(rig.seconds(30)):
            await rig.driver.kill(spec)
        far_end.feed(EndOfInput())
        async with asyncio.timeout(rig.seconds(30)):
            with suppress(Error):
                await task

    async def test_a_stopped_machine_is_refused(self, rig: DriverRig) -> None:
        files = self._can(rig)
        with pytest.raises(WrongState):
            await files.serve_files(await rig.machine(("/bin/true",)), FarEnd())
