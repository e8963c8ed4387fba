"""The imports of DESIGN section 3: one way only, and siblings never import each other."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "triarch"

# A room may import the rooms of every row below its own, and itself.
ROWS: list[set[str]] = [
    {"cli", "web", "testing"},
    {"client"},
    {"daemon"},
    {"engine"},
    {"drivers", "storage", "network", "templates", "store"},
    {"guest"},
    {"host"},
    {"model"},
    {"errors"},
]
EXTRA_BANS = {
    "cli": {"daemon", "engine", "drivers", "storage", "network", "templates", "store", "guest", "host"},
    "web": {"daemon", "engine", "drivers", "storage", "network", "templates", "store", "guest", "host"},
    "client": {"daemon", "engine", "drivers", "storage", "network", "templates", "store", "guest", "host"},
}


def room_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def row_of(room: str) -> int:
    return next(i for i, row in enumerate(ROWS) if room in row)


def imported_rooms(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{a.name}" if node.module == "triarch" else node.module or "" for a in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("triarch.")}
    return found - {"__version__"}


FILES = sorted(p for p in SOURCE.rglob("*.py") if room_of(p) not in ("__init__", "__main__"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_one_way(path: Path) -> None:
    room = room_of(path)
    for other in imported_rooms(path) - {room}:
        assert row_of(other) > row_of(room), f"{room} must not import {other}"
        assert other not in EXTRA_BANS.get(room, set()), f"{room} must not import {other}"
