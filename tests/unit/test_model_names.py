"""Names become file names, DNS labels and arguments: nothing else gets through."""

from __future__ import annotations

import pytest

from triarch.errors import Invalid
from triarch.model.names import MACHINE_NAME_RULE, TEMPLATE_NAME_RULE, check_machine_name, check_template_name
from triarch.model.template import check_digest, parse_template_name

HOSTILE = [
    "",
    ".",
    "..",
    "../etc",
    "a/b",
    "/etc/passwd",
    "a\\b",
    "a\0b",
    "a\n",
    "\na",
    "a b",
    " a",
    "a ",
    "-rf",
    "--help",
    "a-",
    "-",
    "1a",
    "A",
    "Web",
    "wEb",
    "a_b",
    "a:b",
    "a@b",
    "a$b",
    "a;b",
    "`id`",
    "$(id)",
    "a*",
    "a?",
    "a%00",
    "ü",
    "аpple",  # a Cyrillic letter that looks like Latin a
    "a\u200b",  # a space of no width
    "a\u0661",  # a digit that is not ASCII
    "\ud800",  # half a character
    "a" * 64,
    "a" * 1_000_000,
]


@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name[:20]))
def test_hostile_machine_names(name: str) -> None:
    with pytest.raises(Invalid) as refusal:
        check_machine_name(name)
    assert MACHINE_NAME_RULE in refusal.value.message
    assert "\n" not in refusal.value.message and len(refusal.value.message) < 800


@pytest.mark.parametrize("name", [*HOSTILE, "a..b", "a.", ".a", "a...b", "a@"], ids=lambda name: ascii(name[:20]))
def test_hostile_template_names(name: str) -> None:
    with pytest.raises(Invalid) as refusal:
        check_template_name(name)
    assert TEMPLATE_NAME_RULE in refusal.value.message
    assert "\n" not in refusal.value.message and len(refusal.value.message) < 800


@pytest.mark.parametrize("name", ["a", "web", "web-1", "a--b", "a1", "a" * 63])
def test_good_machine_names(name: str) -> None:
    assert check_machine_name(name) == name


@pytest.mark.parametrize("name", ["a", "bookworm", "debian-12.5", "a.b.c", "a" * 63])
def test_good_template_names(name: str) -> None:
    assert check_template_name(name) == name


def test_a_machine_name_has_no_dot() -> None:
    with pytest.raises(Invalid):
        check_machine_name("web.example")


@pytest.mark.parametrize(
    ("text", "parts"),
    [("bookworm", ("bookworm", None)), ("bookworm@1", ("bookworm", 1)), ("a.b@999999", ("a.b", 999_999))],
)
def test_template_references(text: str, parts: tuple[str, int | None]) -> None:
    assert parse_template_name(text) == parts


@pytest.mark.parametrize(
    "level",
    ["", "0", "-1", "+1", "1.0", "01", " 1", "1 ", "1\n", "x", "1@2", "\u0661", "\u00b2", "1000000", "9" * 9999],
)
def test_illegal_levels(level: str) -> None:
    with pytest.raises(Invalid) as refusal:
        parse_template_name(f"bookworm@{level}")
    assert len(refusal.value.message) < 400


@pytest.mark.parametrize("digest", ["", "0" * 63, "0" * 65, "A" * 64, "g" * 64, "../" + "0" * 61, "0" * 64 + "\n"])
def test_illegal_digests(digest: str) -> None:
    with pytest.raises(Invalid):
        check_digest(digest)


def test_a_digest() -> None:
    assert check_digest("0123456789abcdef" * 4) == "0123456789abcdef" * 4
