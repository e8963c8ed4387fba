"""Package databases as a difference reads them: what they say, and that no nonsense breaks it."""

from __future__ import annotations

import sqlite3
import struct
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from triarch.engine.packages import Package, parse_apk, parse_dpkg, parse_rpm, parse_rpm_header

STATUS = b"""Package: nano
Status: install ok installed
Architecture: amd64
Version: 7.2-1
Description: small editor
 Status: not a field

Package: gone
Status: deinstall ok config-files
Version: 1
"""


def test_dpkg_says_what_is_installed_and_whose_the_files_are() -> None:
    contents = {
        b"var/lib/dpkg/status": STATUS,
        b"var/lib/dpkg/info/nano:amd64.list": b"/.\n/usr\n/usr/bin/nano\n",
    }
    assert parse_dpkg(contents) == [Package(name="nano", version="7.2-1", files=frozenset((b"usr", b"usr/bin/nano")))]


def test_apk_says_the_same() -> None:
    content = b"P:busybox\nV:1.36-r1\nF:bin\nR:busybox\nF:\nR:rootfile\n\nP:musl\nV:1.2\n"
    assert parse_apk(content) == [
        Package(name="busybox", version="1.36-r1", files=frozenset((b"bin/busybox", b"rootfile"))),
        Package(name="musl", version="1.2"),
    ]


def header(*tags: tuple[int, int, bytes, int]) -> bytes:
    index, data = b"", b""
    for tag, kind, value, count in tags:
        data += bytes(-len(data) % 4)
        index += struct.pack(">IIII", tag, kind, len(data), count)
        data += value
    return struct.pack(">II", len(tags), len(data)) + index + data


NANO = header(
    (1000, 6, b"nano\0", 1),
    (1001, 6, b"7.2\0", 1),
    (1002, 6, b"3.el9\0", 1),
    (1116, 4, struct.pack(">II", 0, 1), 2),
    (1117, 8, b"nano\0nanorc\0", 2),
    (1118, 8, b"/usr/bin/\0/etc/\0", 2),
)


def test_rpm_says_the_same(tmp_path: Path) -> None:
    expected = Package(name="nano", version="7.2-3.el9", files=frozenset((b"usr/bin/nano", b"etc/nanorc")))
    database = sqlite3.connect(tmp_path / "rpmdb.sqlite")
    database.execute("CREATE TABLE Packages (hnum INTEGER PRIMARY KEY, blob BLOB NOT NULL)")
    database.executemany("INSERT INTO Packages (blob) VALUES (?)", [(NANO,), (b"nonsense",)])
    database.commit()
    database.close()
    assert parse_rpm((tmp_path / "rpmdb.sqlite").read_bytes()) == [expected]


@given(st.binary(max_size=400), st.integers(0, len(NANO) - 1), st.integers(0, 255))
def test_no_nonsense_breaks_it(noise: bytes, at: int, byte: int) -> None:
    parse_rpm_header(noise)
    parse_rpm_header(NANO[:at] + bytes([byte]) + NANO[at + 1 :])
    parse_apk(noise)
    parse_dpkg({b"var/lib/dpkg/status": noise})
    parse_rpm(b"SQLite format 3\0" + noise)


def test_a_view_in_the_place_of_rpms_table_is_not_followed_for_ever(tmp_path: Path) -> None:
    database = sqlite3.connect(tmp_path / "rpmdb.sqlite")
    many = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n LIMIT 300000) SELECT 'no' AS blob FROM n"
    database.execute(f"CREATE VIEW Packages AS {many} UNION ALL SELECT x'{NANO.hex()}'")
    database.commit()
    database.close()
    # Nano comes after all that; nobody waits for it.
    assert parse_rpm((tmp_path / "rpmdb.sqlite").read_bytes()) == []
