"""Manners of the command line: every command explains itself, shows how it is used, and is used by a test."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from triarch.cli.app import cli
from triarch.cli.arguments import CommandAfterDashes, examples_of

ROOT = Path(__file__).parents[2]
# Functions of the tests that run the command line with the words that they are given.
RUNNERS = {"run", "triarch_argv", "triarch", "cli", "out", "complaint", "interrupted"}
Path_ = tuple[str, ...]


def walk(group: click.Group, path: Path_ = ()) -> Iterator[tuple[Path_, click.Command]]:
    context = click.Context(group, info_name="triarch")
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield (*path, name), command
        if isinstance(command, click.Group):
            yield from walk(command, (*path, name))


COMMANDS = dict(walk(cli))
LEAVES = {path: command for path, command in COMMANDS.items() if not isinstance(command, click.Group)}


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_it_explains_itself(path: Path_) -> None:
    command = COMMANDS[path]
    summary = command.get_short_help_str(limit=200)
    assert summary and summary[0].isupper() and summary.endswith((".", ")")), summary
    assert len(summary) <= 66, f"{summary} is cut short on the help page: it needs a short_help"
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{parameter.opts} has no help"


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_its_examples_can_be_typed(path: Path_) -> None:
    lines = examples_of(COMMANDS[path])
    assert lines, f"triarch {' '.join(path)} --help shows no example"
    named = set()
    for line in lines:
        for words in invocations_in(line):
            named.add(parse(words))
    assert any(found[: len(path)] == path for found in named), f"none of {lines} uses it"


def invocations_in(line: str) -> Iterator[list[str]]:
    """The words after each `triarch` of a line of shell."""
    for part in re.findall(r"\$\((.*?)\)", line) or [line]:
        lexer = shlex.shlex(part, posix=True, punctuation_chars="|&;<>")
        lexer.whitespace_split, lexer.commenters = True, ""
        words = [*lexer]
        if "triarch" in words:
            words = words[words.index("triarch") + 1 :]
            end = next((i for i, word in enumerate(words) if set(word) <= set("|&;<>")), len(words))
            yield words[:end]


def parse(words: list[str]) -> Path_:
    """The command that `words` name; fails where its parser does not know an option."""
    group: click.Command = cli
    path: Path_ = ()
    context = click.Context(cli, info_name="triarch")
    while isinstance(group, click.Group):
        assert words, "it names no command"
        if words[0].startswith("--"):
            return path
        name, command, words = group.resolve_command(context, words)
        assert command is not None and name is not None
        group, path = command, (*path, name)
        context = click.Context(command, info_name=name, parent=context, allow_interspersed_args=True)
        if not words and isinstance(group, click.Group):
            return path
    context.allow_interspersed_args = group.allow_interspersed_args
    if isinstance(group, CommandAfterDashes) and "--" in words:
        words = words[: words.index("--")]
    group.make_parser(context).parse_args(list(words))
    return path


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_names_of_things_are_completed(path: Path_) -> None:
    """A word that names a thing which the daemon knows is completed by the shell."""
    things = {"name", "names", "template", "templates", "architecture", "snapshot", "snapshots", "profile", "network"}
    made_here = {("template", "build"), ("template", "import"), ("run",), ("launch",)} | {
        found for found in LEAVES if found[-1] == "create"
    }
    for parameter in LEAVES[path].params:
        if parameter.name in things and path not in made_here:
            assert parameter._custom_shell_complete is not None, f"{parameter.name} of {' '.join(path)}"


def used_by_tests() -> set[Path_]:
    """Every command that a call of a runner in a test names, or that a script of the tests runs."""
    used: set[Path_] = set()
    for file in sorted([*(ROOT / "tests").rglob("*.py"), *(ROOT / "src/triarch/testing").rglob("*.py")]):
        for node in ast.walk(ast.parse(file.read_text())):
            used.update(path for words in lines_of(node) for path in paths_of(words))
    for file in sorted((ROOT / "tests").rglob("*.sh")):
        script = re.sub(r"^\s*#.*$", "", file.read_text(), flags=re.MULTILINE)
        for line in re.findall(r"\btriarch ([^;|&\n]*)", script):
            used.update(paths_of(line.split()))
    return used


def lines_of(node: ast.AST) -> Iterator[list[str]]:
    """Command lines in a node: the words of a runner's call, the text of a table of cases, a shell script."""
    if isinstance(node, ast.Call):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if called in RUNNERS:
            yield words_of(node.args)
    elif isinstance(node, ast.Tuple | ast.List) and words_of(node.elts)[:1] == ["triarch"]:
        yield words_of(node.elts)[1:]
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        if isinstance(target, ast.Name) and target.id == "CASES" and isinstance(node.value, ast.Dict):
            for value in node.value.values:
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.value.split()
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" in node.value:
        for line in re.findall(r"^\s*(?:\w+=\S+ )*triarch (.*)$", node.value, re.MULTILINE):
            yield line.split()


def words_of(nodes: list[ast.expr]) -> list[str]:
    """Constant words; whatever is only known when it runs is `?`, and a line of text is split."""
    words: list[str] = []
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            words += node.value.split() if " " in node.value and not words else [node.value]
        elif isinstance(node, ast.Starred) and isinstance(node.value, ast.Call):
            inner = node.value.func
            if isinstance(inner, ast.Attribute) and isinstance(inner.value, ast.Constant):
                words += str(inner.value.value).split()
        else:
            words.append("?")
    return words


def paths_of(words: list[str]) -> Iterator[Path_]:
    """The command, if it is one, that the words begin with; options of `triarch` itself may stand before it."""
    while words[:1] and (words[0] == "?" or words[0].startswith("-")):
        words = words[2:] if words[0] == "--root" else words[1:]
    group: click.Command = cli
    path: Path_ = ()
    context = click.Context(cli, info_name="triarch")
    for word in words:
        if not isinstance(group, click.Group):
            break
        command = group.get_command(context, word)
        if command is None:
            break
        group, path = command, (*path, command.name or word)
    if path in LEAVES:
        yield path


USED = used_by_tests()


@pytest.mark.parametrize("path", LEAVES, ids=" ".join)
def test_a_test_uses_it(path: Path_) -> None:
    assert path in USED, f"no test runs 'triarch {' '.join(path)}'"
