"""Documents that must agree with one another and with the tree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def code_blocks(text: str) -> list[str]:
    """Fenced blocks without the comments, which are translated."""
    blocks = re.findall(r"^```[a-z]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return ["\n".join(re.sub(r"\s*#.*$", "", line) for line in block.splitlines()) for block in blocks]


def test_both_readmes_have_the_same_commands() -> None:
    english, chinese = (code_blocks((ROOT / name).read_text()) for name in ("README.md", "README.zh.md"))
    assert english == chinese
    assert len(english) >= 5


@pytest.mark.parametrize(
    "name", ["README.md", "README.zh.md", "ARCHITECTURE.md", "SPECIFICATION.md", "CONTRIBUTING.md"]
)
def test_links_lead_to_files(name: str) -> None:
    text = (ROOT / name).read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), f"{name} links to {target}, which is not there"


def test_every_promise_names_tests_that_exist_or_is_pending() -> None:
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (ROOT / "SPECIFICATION.md").read_text().splitlines()
        if re.match(r"\| \d+\.\d+ \|", line)
    ]
    assert rows
    for number, promise, held_by in rows:
        assert promise, number
        tests = re.findall(r"`(tests/[^`]+)`", held_by)
        assert tests or held_by.startswith("pending"), f"promise {number} names no test and is not pending"
        for test in tests:
            path, _, function = test.partition("::")
            assert (ROOT / path).exists(), f"promise {number}: {path} is not there"
            if function:
                pattern = rf"def {re.escape(function.rpartition('::')[2])}\b"
                assert re.search(pattern, (ROOT / path).read_text()), f"promise {number}: {test} is not there"
