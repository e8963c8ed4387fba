"""The shell of fake machines: enough of sh to end, wait, say something and pass input on.

A program is a generator of effects and returns its exit code. Who runs it decides what the effects mean: `plan` lets
no time pass and finds out how a run will end, the driver performs them for real.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field

from triarch.model.driver import Resize, Stream
from triarch.model.template import Init


@dataclass(frozen=True, slots=True)
class Sleep:
    seconds: float


@dataclass(frozen=True, slots=True)
class Output:
    stream: Stream
    data: bytes


@dataclass(frozen=True, slots=True)
class Read:
    """Answered with the next piece of input, or None when it has ended."""


@dataclass(frozen=True, slots=True)
class Forever:
    """What follows does not end by itself."""


Effect = Sleep | Output | Read | Forever
Program = Generator[Effect, bytes | None, int]

TERMINATED = 128 + 15
_VARIABLE = re.compile(r"\$(\$|!|[A-Za-z_][A-Za-z0-9_]*)")
_SEPARATORS = frozenset({";", "&", "&&", "||"})
_SHELLS = frozenset({"sh", "bash", "dash", "ash"})


class _Ended(Exception):
    def __init__(self, code: int) -> None:
        self.code = code


@dataclass(slots=True)
class Shell:
    """One process of a fake machine. `on_terminate` is its exit code after SIGTERM, None while it ignores it."""

    environment: Mapping[str, str] = field(default_factory=dict)
    pid: int = 1
    user: int = 0
    group: int = 0
    directory: str = "/"
    terminal: Resize | None = None
    is_alive: Callable[[int], bool] = lambda pid: False
    on_terminate: int | None = TERMINATED

    def run(self, command: tuple[str, ...]) -> Program:
        """The program that `command` is; unknown ones end with 127, and with 2 what this shell does not understand."""
        try:
            return (yield from self._command(list(command)))
        except _Ended as end:
            return end.code
        except ValueError as error:
            yield Output(Stream.STDERR, f"{command[0]}: {error}\n".encode())
            return 2

    def run_login(self) -> Program:
        """A login shell: runs each line of its input, and ends with the last one's code."""
        code = 0
        while (piece := (yield Read())) is not None:
            for line in piece.decode(errors="replace").splitlines():
                code = yield from self.run(("sh", "-c", line))
        return code

    def run_init(self) -> Program:
        """A template's own init: it runs until it is asked to end."""
        self.on_terminate = 0
        yield Forever()
        while True:
            yield Sleep(3600)

    def _command(self, argv: list[str]) -> Program:
        if os.path.basename(argv[0]) in _SHELLS and argv[1:2] == ["-c"]:  # noqa: PTH119
            lexer = shlex.shlex(argv[2], posix=True, punctuation_chars=";&|>")
            lexer.whitespace_split, lexer.commenters = True, ""
            return (yield from self._list(list(lexer)))
        return (yield from self._simple(argv))

    def _list(self, tokens: list[str]) -> Program:
        """Commands between separators; `while :; do … done` repeats."""
        code, operator = 0, ";"
        while tokens:
            if tokens[0] == "while":
                body, tokens = _loop(tokens)
                yield Forever()
                while True:
                    # Output that finds room waits for nothing: others need a turn, to say that nobody reads it.
                    yield Sleep(0.0)
                    yield from self._list(list(body))
            end = next((i for i, token in enumerate(tokens) if token in _SEPARATORS), len(tokens))
            if end and not (operator == "&&" and code) and not (operator == "||" and not code):
                code = yield from self._simple([self._expand(token) for token in tokens[:end]])
            operator = tokens[end] if end < len(tokens) else ";"
            tokens = tokens[end + 1 :]
        return code

    def _expand(self, token: str) -> str:
        known = {**self.environment, "$": str(self.pid), "!": ""}
        return _VARIABLE.sub(lambda match: known.get(match[1], ""), token)

    def _simple(self, argv: list[str]) -> Program:
        stream = Stream.STDOUT
        if argv[-2:] == [">&", "2"]:
            argv, stream = argv[:-2], Stream.STDERR
        match os.path.basename(argv[0]), argv[1:]:  # noqa: PTH119
            case (("true" | ":" | "wait" | "cd" | "sync"), _):
                return 0
            case "false", _:
                return 1
            case "exit", [code]:
                raise _Ended(int(code))
            case "sleep", [seconds]:
                yield Sleep(float(seconds))
                return 0
            case "trap", [action, "TERM"]:
                self.on_terminate = int(action.removeprefix("exit ")) if action else None
                return 0
            case "kill", [signal, pid]:
                return self._kill(int(signal.removeprefix("-")), int(pid))
            case "test", ["-t", _]:
                return 0 if self.terminal else 1
            case "cat", []:
                while (piece := (yield Read())) is not None:
                    yield Output(stream, piece)
                return 0
            case "read", _:
                while (piece := (yield Read())) is not None and b"\n" not in piece:
                    pass
                return 0 if piece else 1
            case _:
                text = self._text(argv)
        if text is None:
            yield Output(Stream.STDERR, f"{argv[0]}: not found\n".encode())
            return 127
        yield Output(stream, text.encode())
        return 0

    def _text(self, argv: list[str]) -> str | None:
        """What commands that only print something print."""
        match os.path.basename(argv[0]), argv[1:]:  # noqa: PTH119
            case "echo", words:
                return " ".join(words) + "\n"
            case "pwd", []:
                return f"{self.directory}\n"
            case "id", ["-u"]:
                return f"{self.user}\n"
            case "id", ["-g"]:
                return f"{self.group}\n"
            case "seq", [first, last]:
                return "".join(f"{number}\n" for number in range(int(first), int(last) + 1))
            case "stty", ["size"] if self.terminal:
                return f"{self.terminal.rows} {self.terminal.columns}\n"
        return None

    def _kill(self, signal: int, pid: int) -> int:
        if pid == self.pid and signal:
            raise _Ended(128 + signal)
        return 0 if self.is_alive(pid) else 1


def _loop(tokens: list[str]) -> tuple[list[str], list[str]]:
    begin, end = tokens.index("do"), len(tokens) - 1 - tokens[::-1].index("done")
    return tokens[begin + 1 : end], tokens[end + 1 :]


@dataclass(frozen=True, slots=True)
class Plan:
    """How a run without input will go: it ends after `seconds` (None: never by itself) with `code`."""

    seconds: float | None
    code: int
    output: bytes
    on_terminate: int | None


def plan(command: tuple[str, ...], init: Init, environment: Mapping[str, str]) -> Plan:
    """Run to the end, or to where it goes on forever, in no time."""
    shell = Shell(environment=environment)
    program = shell.run_init() if init is Init.SYSTEM else shell.run(command)
    seconds, output = 0.0, bytearray()
    try:
        effect = next(program)
        while True:
            match effect:
                case Forever():
                    return Plan(None, 0, bytes(output), shell.on_terminate)
                case Sleep():
                    seconds += effect.seconds
                case Output():
                    output += effect.data
                case Read():
                    pass
            effect = program.send(None)
    except StopIteration as end:
        return Plan(seconds, end.value, bytes(output), shell.on_terminate)
