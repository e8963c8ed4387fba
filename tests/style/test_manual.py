"""The manual is made from the program, so it is what the program does."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from triarch.cli import exit_codes, manual
from triarch.drivers.capabilities import table

DOCS = Path(__file__).parents[2] / "docs"


def test_the_command_reference_is_current() -> None:
    made = manual.markdown()
    assert (DOCS / "CLI.md").read_text() == made, "python -m triarch.cli.manual --markdown > docs/CLI.md"


def test_the_table_of_capabilities_is_current() -> None:
    assert (DOCS / "CAPABILITIES.md").read_text() == table(), (
        "python -m triarch.drivers.capabilities > docs/CAPABILITIES.md"
    )


def test_exit_codes_are_documented_and_stable() -> None:
    """Scripts count on these: a number that changes its meaning is a broken promise."""
    codes = {name: value for name, value in vars(exit_codes).items() if name.isupper() and isinstance(value, int)}
    assert codes == {
        "OK": 0,
        "ERROR": 1,
        "USAGE": 2,
        "NOT_FOUND": 3,
        "CONFLICT": 4,
        "DENIED": 5,
        "CANNOT": 6,
        "UNAVAILABLE": 7,
        "TIMED_OUT": 124,
        "OWN_FAILURE": 125,
        "INTERRUPTED": 130,
        "BROKEN_PIPE": 141,
    }
    assert set(exit_codes.MEANINGS) == set(codes.values())


def test_man_pages_are_sound(tmp_path: Path) -> None:
    if shutil.which("groff") is None:
        pytest.skip("needs groff, which reads man pages")
    count = manual.write_man_pages(tmp_path)
    pages = sorted(tmp_path.glob("*.1"))
    assert len(pages) == count >= 30 and (tmp_path / "triarch-template-build.1").exists()
    done = subprocess.run(
        ["groff", "-man", "-Tutf8", "-Kutf8", "-ww", *map(str, pages)], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert "triarch launch bookworm web" in done.stdout
