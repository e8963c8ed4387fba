"""Sizes as people write and read them, and the limits of what may be asked for."""

from __future__ import annotations

import msgspec
import pytest

from triarch.errors import Invalid
from triarch.model.resources import Resources, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("1048576", 1 << 20),
        ("512M", 512 << 20),
        ("512m", 512 << 20),
        ("512MB", 512 << 20),
        ("512 MiB", 512 << 20),
        (" 2G ", 2 << 30),
        ("1.5GiB", 3 << 29),
        ("0.5K", 512),
        ("1T", 1 << 40),
        ("9007199254740993", 9_007_199_254_740_993),
        ("8388607T", 8_388_607 << 40),
    ],
)
def test_sizes(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize(
    "text",
    [
        *(
            "",
            "M",
            "-1M",
            "+1M",
            "1,5G",
            "1e9",
            "0x10",
            "1P",
            "1.G",
            ".5G",
            "1 2",
            "inf",
            "nan",
            "٣M",
            "1M\nx",
            "1_000",
        ),
        *("8388608T", "9" * 19 + "T", "9" * 400, "9" * 100_000),
    ],
    ids=lambda text: ascii(text[:20]),
)
def test_illegal_sizes(text: str) -> None:
    with pytest.raises(Invalid) as refusal:
        parse_size(text)
    assert len(refusal.value.message) < 400 and "\n" not in refusal.value.message


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (512 << 20, "512.0 MiB"),
        (3 << 29, "1.5 GiB"),
        (5 << 40, "5.0 TiB"),
        (1 << 60, "1048576.0 TiB"),
    ],
)
def test_format(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text


@pytest.mark.parametrize(
    "body",
    [
        '{"cpus": 0}',
        '{"cpus": -1}',
        '{"cpus": 4097}',
        '{"memory_bytes": 1048576}',
        '{"memory_bytes": 1.5}',
        '{"memory_bytes": 99999999999999999999999}',
        '{"pids": 1}',
        '{"io_weight": 1001}',
        '{"disk_bytes": null}',
        '{"disk_bytes": "10G"}',
    ],
)
def test_what_may_not_be_asked_for(body: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(body, type=Resources)


def test_what_may() -> None:
    body = b'{"cpus": 0.5, "memory_bytes": 16777216, "pids": 16, "io_weight": 1000, "disk_bytes": 67108864}'
    limits = msgspec.json.decode(body, type=Resources)
    assert limits == Resources(cpus=0.5, memory_bytes=16 << 20, pids=16, io_weight=1000, disk_bytes=64 << 20)
