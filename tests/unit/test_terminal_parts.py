"""Detach keys, moments, and what an exec may ask for."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triarch.cli.terminal import KeyWatch, parse_keys
from triarch.drivers.container.account import login_command
from triarch.errors import Invalid
from triarch.model.command import check_exec
from triarch.model.driver import ExecRequest
from triarch.model.moment import parse_moment

NOW = datetime(2026, 1, 31, 12, 0, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("ctrl-]", b"\x1d"),
        ("Ctrl-P,ctrl-q", b"\x10\x11"),
        ("ctrl-a,d", b"\x01d"),
        ("^]", b"\x1d"),
        ("~", b"~"),
        (",", b","),
        ("none", b""),
        ("", b""),
    ],
)
def test_keys(text: str, keys: bytes) -> None:
    assert parse_keys(text) == keys


@pytest.mark.parametrize("text", ["ctrl-", "ctrl-1", "ctrl-pq", "abc", "a,,b", "é", "\x1d"])
def test_illegal_keys(text: str) -> None:
    with pytest.raises(Invalid):
        parse_keys(text)


@given(
    st.lists(st.binary(max_size=4).map(lambda b: bytes(97 + c % 3 for c in b)), max_size=8),
    st.sampled_from([b"a", b"ab", b"aab", b"aba"]),
)
def test_keys_are_found_however_they_come(pieces: list[bytes], keys: bytes) -> None:
    watch, passed, left = KeyWatch(keys), b"", False
    for piece in pieces:
        typed, left = watch.take(piece)
        passed += typed
        if left:
            break
    whole = b"".join(pieces)
    assert left == (keys in whole)
    if left:
        assert passed == whole[: whole.index(keys)]
    else:
        held = whole[len(passed) :]
        assert whole.startswith(passed) and keys.startswith(held) and len(held) < len(keys)


def test_without_keys_all_is_passed_on() -> None:
    assert KeyWatch(b"").take(b"\x1dabc") == (b"\x1dabc", False)


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("10m", NOW - timedelta(minutes=10)),
        ("90", NOW - timedelta(seconds=90)),
        ("1.5h", NOW - timedelta(minutes=90)),
        ("2026-01-30", NOW - timedelta(hours=36)),
        ("2026-01-31T11:59:00", NOW - timedelta(minutes=1)),
        ("2026-01-31T12:59:00+01:00", NOW - timedelta(minutes=1)),
        ("2026-01-31T11:59:00Z", NOW - timedelta(minutes=1)),
    ],
)
def test_moments(text: str, moment: datetime) -> None:
    assert parse_moment(text, NOW) == moment


@given(st.text(max_size=30) | st.from_regex(r"[0-9]{1,40}(\.[0-9]+)?[smhd]?", fullmatch=True))
def test_any_text_is_a_moment_or_refused(text: str) -> None:
    try:
        assert parse_moment(text, NOW).tzinfo is not None
    except Invalid as error:
        assert "illegal time" in error.message


@pytest.mark.parametrize(
    "request_",
    [
        ExecRequest(),
        ExecRequest(command=("ls",), login=True),
        ExecRequest(command=("",)),
        ExecRequest(command=("ls",), user="a:b:c"),
        ExecRequest(command=("ls",), directory="tmp"),
        ExecRequest(command=("ls",), directory="/a\0b"),
        ExecRequest(command=("ls",), columns=0),
        ExecRequest(command=("ls",), rows=65536),
        ExecRequest(command=("ls",), timeout_seconds=0),
        ExecRequest(command=("ls",), timeout_seconds=-1),
        ExecRequest(command=("ls",), timeout_seconds=float("nan")),
        ExecRequest(command=("ls",), timeout_seconds=1e12),
        ExecRequest(command=("ls",), environment={"A=B": ""}),
    ],
)
def test_impossible_requests_are_refused(request_: ExecRequest) -> None:
    with pytest.raises(Invalid):
        check_exec("web", request_)


def test_login_shells() -> None:
    assert login_command("/bin/bash", "bash") == ("/bin/bash", "-c", 'exec -a "$0" "$1"', "-bash", "/bin/bash")
    assert login_command("/bin/sh", "dash") == ("/bin/sh", "-l")
    assert login_command("/bin/sh", "busybox")[-2:] == ("-sh", "/bin/sh")
