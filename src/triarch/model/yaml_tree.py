"""YAML as a tree of text that knows its lines: what people's files are read into.

Scalars stay the text that they are, so that `restart: no` is a word and `1.10` keeps its nought. Nothing of YAML that
makes much of little or names code is taken: no anchors, aliases, tags or second documents, and no deep nesting.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import msgspec

from triarch.errors import Invalid
from triarch.model.setting_forms import Written

if TYPE_CHECKING:
    import yaml

MAX_BYTES = 4 << 20
MAX_DEPTH = 16


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """Exactly one of `text`, `items` and `fields` is not None. `line`, from 1, is that of its key where it has one."""

    line: int
    text: str | None = None
    items: tuple[Node, ...] | None = None
    fields: dict[str, Node] | None = None

    @property
    def is_empty(self) -> bool:
        return self.text == ""


class File(msgspec.Struct, frozen=True):
    """A file that was read: its name for messages, and what it holds."""

    name: str
    root: Node

    def at(self, node: Node) -> str:
        """`site.yaml, line 7`."""
        return f"{self.name}, line {node.line}"


def read_file(name: str, data: bytes) -> File:
    """Raises `Invalid` that names the line."""
    if len(data) > MAX_BYTES:
        raise Invalid(f"{name} is too long: it needs at most {MAX_BYTES} bytes")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise Invalid(f"{name}, line {line}: this is not UTF-8") from error
    import yaml

    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return File(name, _Reader(name, iter(yaml.parse(text, Loader=loader))).document())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise Invalid(f"{name}{where}: {error.problem or error.context}") from error
    except yaml.YAMLError as error:
        reason = str(error).splitlines()[0]
        raise Invalid(f"{name}: {reason}") from error


class _Reader:
    """Events in, nodes out."""

    def __init__(self, name: str, events: Iterator[yaml.Event]) -> None:
        # Slow to load, and most commands read no file.
        import yaml

        self._name = name
        self._events: Iterator[Any] = events
        self._yaml = yaml

    def _fail(self, event: Any, reason: str) -> Invalid:
        return Invalid(f"{self._name}, line {event.start_mark.line + 1}: {reason}")

    def document(self) -> Node:
        """The one document; an empty stream is an empty text."""
        yaml = self._yaml
        root: Node | None = None
        for event in self._events:
            if isinstance(event, yaml.DocumentStartEvent):
                if root is not None:
                    raise self._fail(event, "there is a second document; it needs one")
                root = self._node(next(self._events), 0, None)
        return root or Node(line=1, text="")

    def _node(self, event: Any, depth: int, key_line: int | None) -> Node:
        yaml = self._yaml
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise self._fail(event, "anchors and aliases are not taken; write it out")
        # The tag `!` alone is that of a quoted text.
        if event.tag not in (None, "!"):
            raise self._fail(event, f"tags such as {event.tag[:40]} are not taken")
        if depth > MAX_DEPTH:
            raise self._fail(event, f"this is nested deeper than {MAX_DEPTH}")
        line = key_line or event.start_mark.line + 1
        if isinstance(event, yaml.ScalarEvent):
            return Node(line=line, text=event.value)
        if isinstance(event, yaml.SequenceStartEvent):
            items = []
            while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
                items.append(self._node(event, depth + 1, None))
            return Node(line=line, items=tuple(items))
        return Node(line=line, fields=self._fields(depth))

    def _fields(self, depth: int) -> dict[str, Node]:
        yaml = self._yaml
        fields: dict[str, Node] = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            key = self._node(event, depth + 1, None)
            if key.text is None or key.text == "":
                raise self._fail(event, "a key needs to be text")
            if key.text in fields:
                raise self._fail(event, f"'{key.text[:80]}' is here twice, first in line {fields[key.text].line}")
            fields[key.text] = self._node(next(self._events), depth + 1, key.line)
        return fields


def written(node: Node) -> Written:
    """The node as a tree of text."""
    if node.items is not None:
        return [written(item) for item in node.items]
    if node.fields is not None:
        return {key: written(inner) for key, inner in node.fields.items()}
    return node.text or ""


def find(node: Node, path: str) -> Node:
    """The node at `users.0.name`, or the last on the way to it."""
    for word in path.split("."):
        inner = None
        if node.fields is not None:
            inner = node.fields.get(word)
        elif node.items is not None and word.isascii() and word.isdigit() and int(word) < len(node.items):
            inner = node.items[int(word)]
        if inner is None:
            break
        node = inner
    return node


def write_yaml(tree: Written) -> str:
    """As a person would write it: keys in their order, plain words where they are read back as they are."""
    import yaml

    class Dumper(yaml.SafeDumper):
        """Numbers and truth values in text stay plain: readers of these files take all as text."""

        def ignore_aliases(self, data: object) -> bool:
            return True

    def represent(dumper: Any, text: str) -> Any:
        tag = dumper.resolve(yaml.ScalarNode, text, (True, False))
        if text in ("true", "false"):
            return dumper.represent_scalar(tag, text)
        # Quoted in any other way, a line separator is read as a space.
        style = "|" if "\n" in text and _is_block(text) else None if text.isprintable() else '"'
        if tag in _PLAIN_TAGS and style is None:
            return dumper.represent_scalar(tag, text)
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)

    Dumper.add_representer(str, represent)
    return str(
        yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True, default_flow_style=False, width=1000)
    )


# `no` and `null` are words that people misread; they are quoted.
_PLAIN_TAGS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


def _is_block(text: str) -> bool:
    """Whether a literal block shows it as it is."""
    return all(line == line.rstrip() and line.isprintable() for line in text.split("\n")) and not text[0].isspace()
