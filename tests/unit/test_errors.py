"""The tree of errors is the one that its docstring draws."""

from __future__ import annotations

import re

import pytest

from triarch import errors
from triarch.errors import CommandFailed, Error, MissingProgram

LINE = re.compile(r"^    (?P<indent>(?:[│ ]   )*)(?:[├└]── )?(?P<name>[A-Z]\w+)\s+(?P<status>\d{3})?", re.MULTILINE)


def drawn() -> dict[str, tuple[str, int]]:
    """Name of each class that the docstring draws: its parent's name and its status, the parent's if it shows none."""
    tree: dict[str, tuple[str, int]] = {}
    parents = ["Error"]
    statuses = {"Error": 500}
    for match in LINE.finditer(errors.__doc__ or ""):
        name = match["name"]
        if name == "Error":
            continue
        depth = len(match["indent"]) // 4 + 1
        parent = parents[depth - 1]
        statuses[name] = int(match["status"] or statuses[parent])
        tree[name] = (parent, statuses[name])
        parents[depth:] = [name]
    return tree


CLASSES = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, Error) and value is not Error
}


def test_all_are_drawn_and_nothing_else() -> None:
    assert set(drawn()) == set(CLASSES)
    assert len(CLASSES) > 20


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_drawn_as_it_is(name: str) -> None:
    parent, status = drawn()[name]
    assert CLASSES[name].__bases__ == (getattr(errors, parent),)
    assert CLASSES[name].status == status


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_the_code_is_the_name(name: str) -> None:
    assert CLASSES[name].code == re.sub(r"(?<=[a-z])(?=[A-Z])", "-", name).lower()
    assert (CLASSES[name].__doc__ or "").strip()


def test_fields_and_hint() -> None:
    error = errors.NotFound("there is no machine 'web'", hint="triarch list", machine="web", tries=3)
    assert str(error) == error.message == "there is no machine 'web'"
    assert error.hint == "triarch list"
    assert error.fields == {"machine": "web", "tries": 3}


@pytest.mark.parametrize(
    ("returncode", "stderr", "message"),
    [
        (2, "", "tar failed (exit code 2)"),
        (2, "warning\n  it broke \n\n", "tar failed (exit code 2): it broke"),
        (-9, "", "tar failed (signal 9)"),
    ],
)
def test_a_failed_command_says_what_it_said_last(returncode: int, stderr: str, message: str) -> None:
    error = CommandFailed(["tar", "-x"], returncode, stderr)
    assert error.message == message
    assert error.argv == ("tar", "-x")


def test_a_missing_program_says_how_to_get_it() -> None:
    error = MissingProgram("dnsmasq", "dnsmasq-base")
    assert error.hint == "apt-get install dnsmasq-base"
    assert error.retryable
