"""Users as a machine's own, hostile files tell of them. The guest's C code is held to the same answers."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triarch.errors import Invalid
from triarch.guest import pack
from triarch.model.account import Account, NoSuchUser, UserWanted, find_account, parse_user

PASSWD = b"root:x:0:0:root:/root:/bin/bash\nbob:x:1000:1001::/home/bob:/bin/zsh\nempty:x:7:7:::\n"
GROUP = b"root:x:0:\nbob:x:1001:\nvideo:x:44:bob,root\naudio:x:29:bob\ntwice:x:44:bob\nodd:x:9:rob,bobby\n"
BOB = Account(uid=1000, gid=1001, groups=(44, 29), name="bob", home="/home/bob", shell="/bin/zsh")


def found(text: str, passwd: bytes = PASSWD, group: bytes = GROUP) -> Account:
    return find_account(parse_user(text), passwd, group)


@pytest.mark.parametrize("text", ["bob", "1000", "01000"])
def test_by_name_and_by_number(text: str) -> None:
    assert found(text) == BOB


def test_a_group_takes_the_place_of_all_others() -> None:
    assert (found("bob:video").gid, found("bob:video").groups) == (44, ())
    assert (found("bob:7").gid, found("1000:7").uid, found("5:audio").gid) == (7, 1000, 29)


def test_a_number_needs_no_entry() -> None:
    assert found("33") == Account(uid=33, gid=33)
    assert found("0", b"", b"") == Account(uid=0, gid=0, home="/root")


def test_empty_fields_have_defaults() -> None:
    assert found("empty") == Account(uid=7, gid=7, name="empty", home="/", shell="/bin/sh")
    assert found("empty").environment == {"HOME": "/", "SHELL": "/bin/sh", "USER": "empty", "LOGNAME": "empty"}
    assert found("33").environment == {"HOME": "/", "SHELL": "/bin/sh"}


@pytest.mark.parametrize("text", ["nobody", "bob:nobody", "rob"])
def test_who_is_not_there(text: str) -> None:
    with pytest.raises(NoSuchUser):
        found(text)


@pytest.mark.parametrize("text", ["", ":", "bob:", ":bob", "a:b:c", "a b", "a\n", "a/b", "\0", "4294967295", "x" * 257])
def test_illegal_users(text: str) -> None:
    with pytest.raises(Invalid):
        parse_user(text)


@pytest.mark.parametrize(
    "line",
    [
        b"eve:x:0:0::/root",
        b"eve:x:0:0::/root:/bin/sh:more",
        b"eve:x:-1:0::/:/bin/sh",
        b"eve:x:4294967295:0::/:/bin/sh",
        b"eve:x:0x0:0::/:/bin/sh",
        b"eve:x: 0:0::/:/bin/sh",
        "eve:x:٣:0::/:/bin/sh".encode(),
        b"eve:x:0:0::/:/bin/\0sh",
        b":x:0:0::/:/bin/sh",
    ],
)
def test_a_line_that_is_not_whole_counts_for_nothing(line: bytes) -> None:
    with pytest.raises(NoSuchUser):
        found("eve", line + b"\n")


FIELD = st.text("ab01:/,\n\0é ", max_size=5) | st.sampled_from(["root", "bob", "0", "1000", "4294967295", "/bin/sh"])
LINE = st.lists(FIELD, min_size=1, max_size=8).map(":".join)
FILE = st.lists(LINE, max_size=6).map("\n".join).map(str.encode)
WANTED = st.sampled_from(["root", "bob", "0", "1000", "bob:a", "a", "b:0", "0:1000", "ab"])


@given(WANTED, FILE, FILE)
def test_whatever_the_files_say_an_account_is_legal(text: str, passwd: bytes, group: bytes) -> None:
    try:
        account = found(text, passwd, group)
    except NoSuchUser:
        return
    assert all(0 <= number < (1 << 32) - 1 for number in (account.uid, account.gid, *account.groups))
    assert account.home.startswith("/") and account.shell.startswith("/")
    assert not any("\0" in word or "\n" in word for word in account.environment.values())


@given(st.text())
def test_any_text_is_a_user_or_refused(text: str) -> None:
    try:
        wanted = parse_user(text)
    except Invalid:
        return
    assert isinstance(wanted, UserWanted) and wanted.user


class _CAccount(ctypes.Structure):
    _fields_ = (
        ("uid", ctypes.c_uint),
        ("gid", ctypes.c_uint),
        ("groups", ctypes.POINTER(ctypes.c_uint)),
        ("group_count", ctypes.c_size_t),
        ("name", ctypes.c_char_p),
        ("home", ctypes.c_char_p),
        ("shell", ctypes.c_char_p),
    )


@pytest.fixture(scope="module")
def c_library(tmp_path_factory: pytest.TempPathFactory) -> tuple[ctypes.CDLL, Path]:
    """The guest's C code, reading other files than /etc's."""
    if shutil.which("cc") is None:
        pytest.skip("needs cc")
    folder = tmp_path_factory.mktemp("account")
    source = next(path for path in pack.init_sources() if path.name == "account.c")
    text = source.read_text().replace('read_some("/etc/', f'read_some("{folder}/')
    (folder / "account.c").write_text(text)
    flags = ("-shared", "-fPIC", "-std=gnu11", f"-I{source.parent}")
    subprocess.run(["cc", *flags, "-o", folder / "account.so", folder / "account.c"], check=True)
    return ctypes.CDLL(str(folder / "account.so")), folder


@given(text=WANTED, passwd=FILE, group=FILE)
@settings(deadline=None)
def test_the_guest_finds_the_same(c_library: tuple[ctypes.CDLL, Path], text: str, passwd: bytes, group: bytes) -> None:
    library, folder = c_library
    (folder / "passwd").write_bytes(passwd)
    (folder / "group").write_bytes(group)
    account = _CAccount()
    silence, kept = os.open(os.devnull, os.O_WRONLY), os.dup(2)
    os.dup2(silence, 2)
    try:
        there = library.find_account(ctypes.create_string_buffer(text.encode()), ctypes.byref(account)) & 0xFF
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(silence)
    try:
        expected = found(text, passwd, group)
    except NoSuchUser:
        assert not there
        return
    assert there
    assert (account.uid, account.gid) == (expected.uid, expected.gid)
    assert set(account.groups[: account.group_count]) == set(expected.groups)
    assert (account.name or b"").decode() == expected.name
    assert (account.home.decode(), account.shell.decode()) == (expected.home, expected.shell)
