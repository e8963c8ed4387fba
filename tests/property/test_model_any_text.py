"""Names and sizes under any input: accepted exactly by the rule, refused in one short line."""

from __future__ import annotations

import string

from hypothesis import example, given
from hypothesis import strategies as st

from triarch.errors import Invalid
from triarch.model.names import check_machine_name, check_template_name
from triarch.model.resources import format_size, parse_size
from triarch.model.template import parse_template_name

LETTERS, INNER = set(string.ascii_lowercase), set(string.ascii_lowercase + string.digits + "-")
anything = st.one_of(st.text(), st.text("abz09-.@/\\ \n\0AZ_", max_size=70))


def follows_rule(name: str, inner: set[str]) -> bool:
    """The rule again, without a regular expression."""
    return 1 <= len(name) <= 63 and name[0] in LETTERS and set(name) <= inner and name[-1] not in "-."


@given(anything)
@example("a\n")
def test_machine_names(name: str) -> None:
    try:
        assert check_machine_name(name) == name
    except Invalid as refusal:
        assert not follows_rule(name, INNER)
        assert "\n" not in refusal.message and len(refusal.message) < 800
    else:
        assert follows_rule(name, INNER)


@given(anything)
def test_template_names(name: str) -> None:
    try:
        assert check_template_name(name) == name
    except Invalid:
        assert not follows_rule(name, INNER | {"."}) or ".." in name
    else:
        assert follows_rule(name, INNER | {"."}) and ".." not in name


@given(anything)
def test_template_references(text: str) -> None:
    try:
        name, level = parse_template_name(text)
    except Invalid:
        return
    assert text == (name if level is None else f"{name}@{level}")


@given(st.integers(0, (1 << 63) - 1))
def test_a_number_of_bytes_is_itself(size_bytes: int) -> None:
    assert parse_size(str(size_bytes)) == size_bytes


@given(st.integers(0, 1 << 22), st.sampled_from("KMGT"))
def test_units_are_powers_of_1024(count: int, unit: str) -> None:
    assert parse_size(f"{count}{unit}") == count << (10 * ("KMGT".index(unit) + 1))


@given(st.integers(0, 1 << 50))
def test_what_is_shown_can_be_typed(size_bytes: int) -> None:
    assert abs(parse_size(format_size(size_bytes)) - size_bytes) <= size_bytes * 0.05


@given(st.text())
def test_any_text_is_a_size_or_refused(text: str) -> None:
    try:
        assert parse_size(text) >= 0
    except Invalid as refusal:
        assert len(refusal.message) < 800
