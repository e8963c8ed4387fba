"""Forms of settings: how a value is read from what people write, and how it is written so that it reads the same.

Readers return plain values (what JSON has) and raise `ValueError` for what is no such value, or `Invalid` where there
is more to say; limits are those of the fields.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Callable
from enum import StrEnum
from typing import Any, TypeAlias

import msgspec

from triarch.errors import Invalid
from triarch.model.nearest import did_you_mean, nearest
from triarch.model.network import IPV4_PATTERN, Forward, Protocol
from triarch.model.policy import FirstBoot, FirstFile, FirstUser
from triarch.model.resources import parse_size

# Text, or a tree of it where it comes from a file.
Written: TypeAlias = "str | list[Written] | dict[str, Written]"

_SIZES = (("T", 1 << 40), ("G", 1 << 30), ("M", 1 << 20), ("K", 1 << 10))
# As `repr` writes a float.
_NUMBER = r"\d{1,17}(?:\.\d{1,17})?(?:e-?\d{1,3})?"
_TIME = re.compile(rf"({_NUMBER})(ms|s|m|h|d)?\Z", re.ASCII)
_SECONDS = {"ms": 0.001, "": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}
_TRUE = frozenset({"true", "yes", "on", "1"})
_FALSE = frozenset({"false", "no", "off", "0"})


class Form(msgspec.Struct, frozen=True):
    """`needs` completes "it needs …"."""

    read: Callable[[Written], Any]
    write: Callable[[Any], Written]
    needs: str


def _text(value: Written) -> str:
    if not isinstance(value, str):
        raise ValueError("not one value")
    return value


def _size(value: Written) -> int:
    text = _text(value)
    try:
        return parse_size(text)
    except Invalid as error:
        raise ValueError(text) from error


def write_size(size_bytes: int) -> str:
    """The exact size in the largest unit that divides it: `1536M`."""
    for unit, factor in _SIZES:
        if size_bytes and size_bytes % factor == 0:
            return f"{size_bytes // factor}{unit}"
    return str(size_bytes)


def _rate(value: Written) -> int:
    return _size(re.sub(r"(?i)(?<=[a-z\d])(/s|ps)\Z", "", _text(value)))


def read_time(value: Written) -> float:
    """Seconds of `30s`, `1.5m`, `2h`, `7d`, `500ms`, or a bare number of seconds."""
    match = _TIME.match(_text(value))
    if match is None:
        raise ValueError(value)
    seconds = float(match[1]) * _SECONDS[match[2] or ""]
    if not math.isfinite(seconds):
        raise ValueError(value)
    return seconds


def write_time(seconds: float) -> str:
    """The exact time in the largest unit that divides it: `90s`, `2h`."""
    if seconds == int(seconds):
        for unit in ("d", "h", "m"):
            if seconds and seconds % _SECONDS[unit] == 0:
                return f"{int(seconds // _SECONDS[unit])}{unit}"
        return f"{int(seconds)}s"
    return f"{seconds!r}s"


def _whole_time(value: Written) -> int:
    seconds = read_time(value)
    if seconds != int(seconds):
        raise ValueError(value)
    return int(seconds)


def _cpus(value: Written) -> float:
    text = _text(value)
    if not re.match(rf"{_NUMBER}\Z", text, re.ASCII):
        raise ValueError(text)
    return float(text)


def _write_number(number: float) -> str:
    return str(int(number)) if number == int(number) else repr(number)


def _integer(value: Written) -> int:
    text = _text(value)
    if not re.match(r"\d{1,18}\Z", text, re.ASCII):
        raise ValueError(text)
    return int(text)


def with_truths(tree: Any, keys: frozenset[str]) -> Any:
    """`tree` with `yes` and `no` below the keys that hold truth values as `true` and `false`."""
    if isinstance(tree, list):
        return [with_truths(inner, keys) for inner in tree]
    if not isinstance(tree, dict):
        return tree
    return {
        key: str(inner.lower() in _TRUE).lower()
        if key in keys and isinstance(inner, str) and inner.lower() in _TRUE | _FALSE
        else with_truths(inner, keys)
        for key, inner in tree.items()
    }


def _boolean(value: Written) -> bool:
    text = _text(value).lower()
    if text not in _TRUE | _FALSE:
        raise ValueError(text)
    return text in _TRUE


def _words(value: Written) -> list[str]:
    """`a,b`, or a list of text."""
    if isinstance(value, str):
        return [word.strip() for word in value.split(",") if word.strip()]
    if isinstance(value, dict):
        raise ValueError("not a list")
    return [_text(word) for word in value]


def choice(kind: type[StrEnum]) -> Form:
    """One of the values of an enumeration."""
    known = [member.value for member in kind]

    def read(value: Written) -> str:
        if _text(value) not in known:
            raise ValueError(value)
        return _text(value)

    return Form(read, str, " or ".join((", ".join(known[:-1]), known[-1])))


# -- ports

LOOPBACK = Forward(host_port=1, machine_port=1).host_address


def parse_forward(text: str) -> Forward:
    """`[ADDRESS:]HOST:MACHINE[/udp]`. Raises `Invalid` that shows the form."""
    ports, _, protocol = text.partition("/")
    *address, host, machine = ports.split(":") if ports.count(":") in (1, 2) else ("", "")
    numbers = [int(word) for word in (host, machine) if re.match(r"\d{1,5}\Z", word, re.ASCII)]
    legal = len(numbers) == 2 and all(1 <= number <= 65535 for number in numbers)
    known = protocol in (Protocol.TCP.value, Protocol.UDP.value) or "/" not in text
    if not legal or not known or not all(re.search(IPV4_PATTERN, word) for word in address):
        raise Invalid(f"illegal port forward '{text[:80]}': it needs [ADDRESS:]HOST:MACHINE[/udp], such as 8080:80")
    forward = Forward(host_port=numbers[0], machine_port=numbers[1], protocol=Protocol(protocol or "tcp"))
    return msgspec.structs.replace(forward, host_address=address[0]) if address else forward


def write_forward(forward: Forward) -> str:
    """As `parse_forward` reads it."""
    address = "" if forward.host_address == LOOPBACK else f"{forward.host_address}:"
    protocol = "" if forward.protocol is Protocol.TCP else f"/{forward.protocol.value}"
    return f"{address}{forward.host_port}:{forward.machine_port}{protocol}"


def _ports(value: Written) -> Any:
    return msgspec.to_builtins([parse_forward(word) for word in _words(value)])


def _write_ports(forwards: list[Any]) -> Written:
    return [write_forward(forward) for forward in msgspec.convert(forwards, list[Forward])]


# -- health checks


def _command(value: Written) -> dict[str, Any]:
    words = shlex.split(value) if isinstance(value, str) else _words(value)
    if not words:
        raise ValueError("no command")
    return {"probe": "command", "command": words, "port": None, "path": "/"}


def _write_command(health: dict[str, Any]) -> Written:
    return shlex.join(health.get("command", ()))


def _port(text: str) -> int:
    if not re.match(r"\d{1,5}\Z", text, re.ASCII) or not 1 <= int(text) <= 65535:
        raise ValueError(text)
    return int(text)


def _tcp(value: Written) -> dict[str, Any]:
    return {"probe": "tcp", "port": _port(_text(value)), "command": [], "path": "/"}


def _http(value: Written) -> dict[str, Any]:
    port, slash, path = _text(value).partition("/")
    return {"probe": "http", "port": _port(port), "path": f"/{path}" if slash else "/", "command": []}


def _write_http(health: dict[str, Any]) -> Written:
    path = health.get("path", "/")
    return f"{health['port']}{'' if path == '/' else path}"


# -- devices

_DEVICE_FIELDS = {
    "kind": "kind",
    "path": "path",
    "source": "source",
    "network": "network",
    "address": "address",
    "address6": "address6",
    "id": "id",
    "size": "size_bytes",
    "read-only": "read_only",
    "receive": "receive_bytes_per_second",
    "send": "send_bytes_per_second",
}
_DEVICE_KEYS = {field: key for key, field in _DEVICE_FIELDS.items()}


def _device(value: Written) -> dict[str, Any]:
    """`volume,path=/data,size=10G`, or the same as a mapping with `kind`."""
    if isinstance(value, str):
        kind, *words = value.split(",")
        value = {"kind": kind}
        for word in words:
            key, equals, text = word.partition("=")
            value[key] = text if equals else "true"
    if not isinstance(value, dict):
        raise ValueError("not a device")
    return {_device_field(key): _device_value(key, inner) for key, inner in value.items()}


def _device_field(key: str) -> str:
    if key not in _DEVICE_FIELDS:
        raise Invalid(f"a device has no '{key[:80]}', it has {', '.join(_DEVICE_FIELDS)}", path=key)
    return _DEVICE_FIELDS[key]


def _device_value(key: str, value: Written) -> str | int | bool:
    if key in ("size", "receive", "send"):
        return _size(value)
    return _boolean(value) if key == "read-only" else _text(value)


def _write_device(device: dict[str, Any]) -> Written:
    return {
        _DEVICE_KEYS[field]: write_size(value) if field.endswith(("_bytes", "_second")) else _write_scalar(value)
        for field, value in device.items()
        if value is not None and value is not False
    }


def _write_scalar(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# -- the first boot


_SUDO = frozenset({"sudo"})


def _first_boot(value: Written) -> Any:
    """A mapping as in a file: `ssh-keys`, `packages`, `users`, `files`, `commands`, `user-data`."""
    if not isinstance(value, dict):
        raise Invalid("it needs a mapping of users, ssh-keys, packages, files, commands or user-data, from a file")
    tree = _fields(value, FirstBoot, "")
    tree["users"] = [_fields(user, FirstUser, f"users.{n}") for n, user in _items(tree, "users")]
    tree["files"] = [_fields(file, FirstFile, f"files.{n}") for n, file in _items(tree, "files")]
    # One text is a line of shell, as everywhere.
    lines = [["sh", "-c", command] if isinstance(command, str) else command for _, command in _items(tree, "commands")]
    tree["commands"] = lines
    try:
        return msgspec.to_builtins(msgspec.convert(with_truths(tree, _SUDO), FirstBoot, strict=False))
    except msgspec.ValidationError as error:
        reason, _, where = str(error).partition(" - at `$.")
        path = re.sub(r"\[(\d+)\]", r".\1", where.rstrip("`")).replace("_", "-")
        raise Invalid(f"{path or 'value'}: {reason[:1].lower()}{reason[1:]}", path=path) from error


def _items(tree: dict[str, Any], key: str) -> list[tuple[int, Written]]:
    items = tree.get(key, [])
    if not isinstance(items, list):
        raise Invalid(f"{key}: it needs a list", path=key)
    return list(enumerate(items))


def _fields(value: Written, kind: type[msgspec.Struct], path: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise Invalid(f"{path}: it needs a mapping", path=path)
    known = {field.replace("_", "-"): field for field in kind.__struct_fields__}
    for key in value:
        if key not in known:
            meant = did_you_mean(nearest(key, known, 0.5)) or f", it has {', '.join(known)}"
            where = f"{path}.{key}" if path else key
            raise Invalid(f"there is no '{where[:80]}'{meant}", path=where)
    return {known[key]: inner for key, inner in value.items()}


def _write_first_boot(value: Any) -> Written:
    tree = _write_struct(value, FirstBoot)
    if value.get("users"):
        tree["users"] = [_write_struct(user, FirstUser) for user in value["users"]]
    if value.get("files"):
        tree["files"] = [_write_struct(file, FirstFile) for file in value["files"]]
    if value.get("commands"):
        tree["commands"] = [
            command[2] if len(command) == 3 and list(command[:2]) == ["sh", "-c"] else list(command)
            for command in value["commands"]
        ]
    return tree


def _write_struct(value: dict[str, Any], kind: type[msgspec.Struct]) -> dict[str, Written]:
    """The fields that are not what they are by themselves."""
    defaults = {field.name: field.default for field in msgspec.structs.fields(kind)}
    return {
        field.replace("_", "-"): list(inner) if isinstance(inner, list | tuple) else _write_scalar(inner)
        for field, inner in value.items()
        if inner not in ([], defaults[field])
    }


def _list(words: list[str]) -> Written:
    return list(words)


def _tcp_text(health: dict[str, Any]) -> Written:
    return str(health["port"])


TEXT = Form(_text, str, "text")
SIZE = Form(_size, write_size, "a size such as 512M")
RATE = Form(_rate, write_size, "bytes a second from 1K to 1T, such as 10M")
TIME = Form(read_time, write_time, "a time such as 30s, 5m, 1h or 1d")
WHOLE_TIME = Form(_whole_time, write_time, "a time of at least 1m, such as 1h or 7d")
CPUS = Form(_cpus, _write_number, "a number of processors")
INTEGER = Form(_integer, str, "a whole number")
BOOLEAN = Form(_boolean, _write_scalar, "true or false")
NAMES = Form(_words, _list, "names separated by commas")
PORTS = Form(_ports, _write_ports, "[ADDRESS:]HOST:MACHINE[/udp], such as 8080:80")
COMMAND = Form(_command, _write_command, "a command line")
TCP = Form(_tcp, _tcp_text, "a port from 1 to 65535")
HTTP = Form(_http, _write_http, "PORT/PATH, such as 80/ready")
DEVICE = Form(_device, _write_device, "KIND,KEY=VALUE,…, such as volume,path=/data,size=10G")
FIRST_BOOT = Form(_first_boot, _write_first_boot, "a mapping, from a file")
