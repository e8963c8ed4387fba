"""Configuration file and control frames: what the C program and the host must agree on, and hostile input."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triarch.errors import Damaged, Invalid
from triarch.guest import protocol
from triarch.guest.protocol import (
    MAX_FRAME_BYTES,
    Credit,
    Ended,
    FrameType,
    GuestCard,
    GuestConfig,
    GuestDecoder,
    GuestMessage,
    GuestNetwork,
    GuestProblem,
    Medium,
    Output,
    Ready,
    Stop,
    encode_config,
    encode_message,
    kernel_command_line,
)
from triarch.model.driver import Data, EndOfInput, Resize, Stream
from triarch.model.machine import Exit
from triarch.model.template import Init

HEADER = Path(protocol.__file__).parent / "init" / "protocol.h"


def config(**changes: object) -> GuestConfig:
    plain: dict[str, object] = {
        "hostname": "web",
        "init": Init.APP,
        "layers": (Medium.PMEM,),
        "host_key": b"\x00key\n",
        "authorized_key": "ssh-ed25519 AAAA",
        "command": ("true",),
    }
    return GuestConfig(**{**plain, **changes})  # type: ignore[arg-type]


def records(encoded: bytes) -> list[tuple[str, bytes]]:
    """What `read_config` in boot.c makes of it."""
    found = []
    at = 0
    while at < len(encoded):
        space = encoded.index(b" ", at)
        colon = encoded.index(b":", space)
        length = int(encoded[space + 1 : colon])
        found.append((encoded[at:space].decode(), encoded[colon + 1 : colon + 1 + length]))
        at = colon + 1 + length
        assert encoded[at : at + 1] == b"\n"
        at += 1
    return found


def frame(kind: int, payload: bytes) -> bytes:
    return struct.pack(">BI", kind, len(payload)) + payload


def test_the_c_header_says_the_same() -> None:
    text = HEADER.read_text()
    strings = dict(re.findall(r'#define (\w+) "(.*)"', text))
    assert strings == {
        "AGENT_PORT": protocol.AGENT_PORT,
        "CONTROL_PORT": protocol.CONTROL_PORT,
        "REPORT_PORT": protocol.REPORT_PORT,
        "FW_CFG_KEY": protocol.FW_CFG_KEY,
        "DELTA_SERIAL": protocol.DELTA_SERIAL,
        "MODULES_SERIAL": protocol.MODULES_SERIAL,
        "LAYER_SERIAL": protocol.layer_serial(7).removesuffix("7"),
    }
    numbers = {name: int(value) for name, value in re.findall(r"#define (\w+) (\d+)", text)}
    for name in ("MAX_LAYERS", "MAX_CONFIG_BYTES", "MAX_RECORDS", "MAX_FRAME_BYTES", "STDIN_WINDOW_BYTES"):
        assert numbers[name] == getattr(protocol, name)
    frames = {name: int(value) for name, value in re.findall(r"FRAME_(\w+) = (\d+)", text)}
    assert frames == {kind.name: kind.value for kind in FrameType}


@given(
    command=st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8")), min_size=1, max_size=5),
    environment=st.dictionaries(
        st.text(st.characters(exclude_characters="\0=", codec="utf-8"), min_size=1),
        st.text(st.characters(exclude_characters="\0", codec="utf-8")),
        max_size=3,
    ),
)
def test_no_value_passes_for_a_record(command: list[str], environment: dict[str, str]) -> None:
    found = records(encode_config(config(command=tuple(command), environment=environment)))
    assert [value.decode() for key, value in found if key == "argv"] == command
    assert [value.decode() for key, value in found if key == "env"] == [f"{k}={v}" for k, v in environment.items()]
    assert {key for key, _ in found} <= {"hostname", "init", "hostkey", "authorized", "layer", "argv", "env"}


def test_the_whole_configuration() -> None:
    network = GuestNetwork(address="10.77.0.9/16", gateway="10.77.0.1", nameserver="10.77.0.1", domain="triarch")
    found = records(
        encode_config(
            config(
                layers=(Medium.BLOCK, Medium.PMEM),
                network=network,
                attached=True,
                terminal=Resize(columns=80, rows=24),
            )
        )
    )
    assert found == [
        ("hostname", b"web"),
        ("init", b"app"),
        ("hostkey", b"\x00key\n"),
        ("authorized", b"ssh-ed25519 AAAA"),
        ("layer", b"block"),
        ("layer", b"pmem"),
        ("argv", b"true"),
        ("network", b"1"),
        ("address", b"10.77.0.9"),
        ("netmask", b"255.255.0.0"),
        ("gateway", b"10.77.0.1"),
        ("nameserver", b"10.77.0.1"),
        ("domain", b"triarch"),
        ("attached", b"1"),
        ("columns", b"80"),
        ("rows", b"24"),
    ]


def test_ipv6_and_further_cards() -> None:
    network = GuestNetwork(address="", address6="fd00::9/64", gateway6="fd00::1")
    cards = (
        GuestCard(name="eth1", mac="02:00:00:00:20:01", address="10.9.0.2/24", address6="fd00:9::2/64"),
        GuestCard(name="lan", mac="02:00:00:00:40:01"),
    )
    found = records(encode_config(config(network=network, cards=cards)))
    assert found[-5:] == [
        ("network", b"1"),
        ("address6", b"fd00::9/64"),
        ("gateway6", b"fd00::1"),
        ("card", b"eth1 02:00:00:00:20:01 10.9.0.2 255.255.255.0 fd00:9::2/64"),
        ("card", b"lan 02:00:00:00:40:01 - - -"),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cards": (GuestCard(name="a b", mac="02:00:00:00:20:01"),)}, "illegal network card"),
        ({"cards": (GuestCard(name="eth1", mac="02:00:00:00:20:01\n"),)}, "illegal network card"),
        ({"command": ("a\0b",)}, "the command has a NUL"),
        ({"environment": {"A": "\0"}}, "the environment has a NUL"),
        ({"environment": {"": "x"}}, "illegal variable name ''"),
        ({"environment": {"A=B": "x"}}, "illegal variable name 'A=B'"),
        ({"command": ()}, "has no command"),
        ({"command": ("x" * 70_000,)}, "takes at most 65536 bytes"),
        ({"environment": {f"V{n}": "" for n in range(4100)}}, "in 4106 parts"),
        ({"layers": ()}, "has 0 layers"),
        ({"layers": (Medium.PMEM,) * 33}, "has 33 layers"),
        ({"hostname": "web systemd.unit=x"}, "illegal machine name"),
        ({"terminal": Resize(columns=0, rows=24)}, "illegal terminal size 0x24"),
        ({"network": GuestNetwork(address="10.0.0.2/24", domain="a\nnameserver 6.6.6.6")}, "illegal domain"),
    ],
)
def test_what_no_guest_can_be_given_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(Invalid, match=re.escape(message)):
        encode_config(config(**changes))


def test_a_system_guest_masks_units_below_run() -> None:
    app, system = encode_config(config()), encode_config(config(init=Init.SYSTEM))
    assert b"\nlink " not in app
    assert b":system/systemd-udevd.service /dev/null\n" in system
    assert b":system-generators/systemd-getty-generator /dev/null\n" in system


def test_kernel_command_line() -> None:
    app, system = kernel_command_line(config()), kernel_command_line(config(init=Init.SYSTEM))
    assert "systemd" not in app
    assert " systemd.hostname=web " in system
    assert len(system) < 2048, "the kernel cuts its command line there (COMMAND_LINE_SIZE)"
    with pytest.raises(Invalid):
        kernel_command_line(config(init=Init.SYSTEM, hostname="web init=/bin/sh"))


MESSAGES: list[tuple[bytes, GuestMessage]] = [
    (frame(16, b""), Ready()),
    (frame(17, b"out"), Output(Stream.STDOUT, b"out")),
    (frame(18, b""), Output(Stream.STDERR, b"")),
    (frame(19, b"\0\1\0\0"), Credit(65536)),
    (frame(20, b"\0\0\0\x89killed by signal 9"), Ended(Exit(code=137, reason="killed by signal 9"))),
    (frame(21, b"no \x1b[31mdisk\n\xff"), GuestProblem("no ?[31mdisk?\ufffd")),
]


@given(st.lists(st.sampled_from(MESSAGES)), st.integers(1, 9))
def test_messages_arrive_however_the_bytes_are_cut(chosen: list[tuple[bytes, GuestMessage]], step: int) -> None:
    stream = b"".join(raw for raw, _ in chosen)
    decoder = GuestDecoder()
    got = [message for at in range(0, len(stream), step) for message in decoder.feed(stream[at : at + step])]
    assert got == [message for _, message in chosen]


@given(st.binary(max_size=200))
def test_noise_is_decoded_or_refused(noise: bytes) -> None:
    try:
        GuestDecoder().feed(noise)
    except Damaged as error:
        assert "frame" in error.message


@pytest.mark.parametrize(
    "raw",
    [
        struct.pack(">BI", 17, MAX_FRAME_BYTES + 1),
        struct.pack(">BI", 17, 0xFFFFFFFF),
        frame(0, b""),
        frame(FrameType.STDIN, b"from the guest?"),
        frame(FrameType.READY, b"x"),
        frame(FrameType.CREDIT, b"\0"),
        frame(FrameType.EXIT, b"\0\0"),
        frame(FrameType.EXIT, b"\0\0\1\0"),
    ],
)
def test_malformed_frames_are_refused(raw: bytes) -> None:
    with pytest.raises(Damaged, match="the guest sent a"):
        GuestDecoder().feed(raw)


def test_a_problem_is_one_short_line() -> None:
    (problem,) = GuestDecoder().feed(frame(21, b"a" * 5000 + b"\n"))
    assert problem == GuestProblem("a" * 500)


def test_host_messages() -> None:
    assert encode_message(Stop()) == frame(4, b"")
    assert encode_message(EndOfInput()) == frame(2, b"")
    assert encode_message(Resize(columns=100, rows=30)) == frame(3, b"\0\x64\0\x1e")
    assert encode_message(Resize(columns=1 << 20, rows=-1)) == frame(3, b"\xff\xff\0\0")
    long = bytes(MAX_FRAME_BYTES) + b"x"
    assert encode_message(Data(long)) == frame(1, bytes(MAX_FRAME_BYTES)) + frame(1, b"x")
    assert encode_message(Data(b"")) == b""
