"""Files of people: what is written is read back, and hostile text is refused with its line, in no time."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from triarch.errors import Invalid
from triarch.model.setting_forms import Written
from triarch.model.yaml_tree import MAX_BYTES, File, Node, find, read_file, write_yaml, written

TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n"), max_size=20)
KEYS = TEXT.filter(bool)
TREES: st.SearchStrategy[Written] = st.recursive(
    TEXT,
    lambda inner: st.lists(inner, min_size=1, max_size=3) | st.dictionaries(KEYS, inner, min_size=1, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(TREES)
def test_what_is_written_is_read_back(tree: Written) -> None:
    assert written(read_file("x", write_yaml(tree).encode()).root) == tree


@settings(max_examples=200, deadline=None)
@given(st.one_of(st.binary(max_size=60), st.text(alphabet="ab:-[]{}&*!|>?#'\"\n ,", max_size=60).map(str.encode)))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        assert isinstance(read_file("x", data), File)
    except Invalid as error:
        assert error.message.startswith("x")


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, "x, line 1: anchors and aliases are not taken"),
        ("a: *b", "x, line 1: anchors and aliases are not taken"),
        ("a: 1\nb: !!python/object/apply:os.system ['true']", "x, line 2: tags such as tag:yaml.org,2002:python"),
        ("a: 1\n---\nb: 1", "x, line 2: there is a second document"),
        ("a: 1\nb: 2\na: 3", "x, line 3: 'a' is here twice, first in line 1"),
        ("? [a]\n: b", "x, line 1: a key needs to be text"),
        ("a: [1\nb: 2", "x, line 2: "),
        ("[" * 100, "x, line 1: this is nested deeper than 16"),
        ("[" * 100_000, "x, line 1: "),
        ("a: 1\n\tb: 2", "x, line 2: "),
    ],
)
def test_what_is_not_taken_is_named_with_its_line(text: str, message: str) -> None:
    started = time.monotonic()
    with pytest.raises(Invalid) as caught:
        read_file("x", text.encode())
    assert caught.value.message.startswith(message), caught.value.message
    assert time.monotonic() - started < 2


def test_too_long() -> None:
    with pytest.raises(Invalid, match="it needs at most"):
        read_file("x", b"#" * (MAX_BYTES + 1))
    with pytest.raises(Invalid, match="x, line 2: this is not UTF-8"):
        read_file("x", b"a: 1\n\xff")


def test_words_stay_what_they_are_and_know_their_lines() -> None:
    root = read_file("x", b"restart: no\nversion: 1.10\nnothing:\nlist:\n- a: 1\n- b: yes\n").root
    assert written(root) == {"restart": "no", "version": "1.10", "nothing": "", "list": [{"a": "1"}, {"b": "yes"}]}
    assert (find(root, "list.1.b").line, find(root, "list.9").line, find(root, "version").line) == (6, 4, 2)
    assert read_file("x", b"").root == Node(line=1, text="")
