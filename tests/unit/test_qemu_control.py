"""The control port against a scripted guest on a socket pair: order, window, and hostile bytes."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from triarch.drivers.qemu.control import ControlPort
from triarch.errors import Damaged
from triarch.guest.protocol import STDIN_WINDOW_BYTES, FrameType
from triarch.model.driver import Data
from triarch.testing.driver_rig import FarEnd


def frame(kind: FrameType, payload: bytes = b"") -> bytes:
    return bytes((kind,)) + len(payload).to_bytes(4, "big") + payload


@asynccontextmanager
async def wired() -> AsyncIterator[tuple[ControlPort, asyncio.StreamReader, asyncio.StreamWriter]]:
    """A control port, and the guest's end of it."""
    host, guest = socket.socketpair()
    host_reader, host_writer = await asyncio.open_connection(sock=host)
    guest_reader, guest_writer = await asyncio.open_connection(sock=guest)
    try:
        yield ControlPort(host_reader, host_writer), guest_reader, guest_writer
    finally:
        host_writer.close()
        guest_writer.close()


async def read_frame(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readexactly(5)
    return head[0], await reader.readexactly(int.from_bytes(head[1:], "big"))


async def test_output_is_shown_and_the_end_of_the_guest_ends_it() -> None:
    async with wired() as (control, _, guest):
        far_end = FarEnd(open_ended=True)
        guest.write(frame(FrameType.STDOUT, b"out") + frame(FrameType.READY) + frame(FrameType.STDERR, b"err"))
        guest.write_eof()
        async with asyncio.timeout(10):
            await control.carry(far_end)
        assert (far_end.stdout, far_end.stderr) == (b"out", b"err")


async def test_input_waits_for_room_in_the_window() -> None:
    data = bytes(3 * STDIN_WINDOW_BYTES)
    async with wired() as (control, guest_reader, guest):
        carrying = asyncio.create_task(control.carry(FarEnd(Data(data))))
        kind, first = await read_frame(guest_reader)
        assert (kind, len(first)) == (FrameType.STDIN, STDIN_WINDOW_BYTES)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(guest_reader.read(1), 0.2)
        got = first
        while len(got) < len(data):
            guest.write(frame(FrameType.CREDIT, (1000).to_bytes(4, "big")))
            kind, piece = await read_frame(guest_reader)
            assert kind == FrameType.STDIN and len(piece) <= STDIN_WINDOW_BYTES
            got += piece
        guest.write(frame(FrameType.CREDIT, (1000).to_bytes(4, "big")))
        assert await read_frame(guest_reader) == (FrameType.END_OF_INPUT, b"")
        guest.close()
        await carrying
        assert got == data


@pytest.mark.parametrize(
    "hostile",
    [
        b"\x00" * 50,
        frame(FrameType.CREDIT, (1).to_bytes(4, "big")),
        bytes((FrameType.STDOUT,)) + b"\xff\xff\xff\xff",
    ],
    ids=["no frame", "credit for what was never given", "a frame too long"],
)
async def test_a_hostile_guest_is_told_from_a_broken_host(hostile: bytes) -> None:
    async with wired() as (control, _, guest):
        guest.write(hostile)
        with pytest.raises(Damaged):
            await asyncio.wait_for(control.carry(FarEnd(open_ended=True)), 10)


async def test_a_far_end_that_is_gone_ends_it() -> None:
    async with wired() as (control, _, guest):
        far_end = FarEnd(open_ended=True)
        far_end.gone = True
        guest.write(frame(FrameType.STDOUT, b"out"))
        with pytest.raises(ConnectionError):
            await asyncio.wait_for(control.carry(far_end), 10)
