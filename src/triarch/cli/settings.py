"""Settings of machines on the command line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import click
import msgspec

from triarch.cli.arguments import Number, SizeType, apply_all
from triarch.errors import Invalid
from triarch.model.network import IPV4_PATTERN, Forward
from triarch.model.resources import MIN_DISK_BYTES, MIN_MEMORY_BYTES
from triarch.model.settings import Settings


def setting_options(command: Any) -> Any:
    """The options of a machine that is to be made; `settings_of` reads them."""
    return apply_all(
        command,
        click.option(
            "--cpus", type=Number(0, 4096, min_open=True), metavar="N", help="Processors, also a fraction: 0.5."
        ),
        click.option("--memory", type=SizeType(MIN_MEMORY_BYTES), metavar="SIZE", help="Memory, such as 512M."),
        click.option("--disk", type=SizeType(MIN_DISK_BYTES), metavar="SIZE", help="Room for what it writes (10G)."),
        click.option("--pids", type=click.IntRange(16, 1 << 22), metavar="N", help="The most processes and threads."),
        click.option("--io-weight", type=click.IntRange(10, 1000), metavar="N", help="Share of the disk (100)."),
        click.option("-e", "--env", "environment", metavar="K=V", multiple=True, help="Environment variable."),
        click.option("--network", metavar="NETWORK", help="A network's name, 'user' or 'none'."),
        click.option("-p", "--publish", metavar="HOST:MACHINE", multiple=True, help="Forward a port of the host."),
    )


def settings_of(values: dict[str, Any]) -> Settings:
    """What the options of `setting_options` say. Raises `Invalid`."""
    given = {
        "cpus": values["cpus"],
        "memory_bytes": values["memory"],
        "disk_bytes": values["disk"],
        "pids": values["pids"],
        "io_weight": values["io_weight"],
        "environment": parse_environment(values["environment"]) or None,
        "network": values["network"],
        "forwards": tuple(parse_forward(text) for text in values["publish"]) or None,
    }
    return Settings(**{key: value for key, value in given.items() if value is not None})


def parse_forward(text: str) -> Forward:
    """`[ADDRESS:]HOST:MACHINE`. Raises `Invalid` that shows the form."""
    *address, host, machine = text.split(":") if text.count(":") in (1, 2) else ("", "")
    ports = [int(word) for word in (host, machine) if word.isascii() and word.isdigit()]
    legal = len(ports) == 2 and all(1 <= port <= 65535 for port in ports)
    if not legal or not all(re.search(IPV4_PATTERN, word) for word in address):
        raise Invalid(f"illegal port forward '{text}': it needs [ADDRESS:]HOST:MACHINE, such as 8080:80")
    forward = Forward(host_port=ports[0], machine_port=ports[1])
    return msgspec.structs.replace(forward, host_address=address[0]) if address else forward


def parse_environment(items: Sequence[str]) -> dict[str, str]:
    """`K=V` words; a bare `K` takes the caller's value. Raises `Invalid`."""
    import os

    environment = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not name or (not equals and name not in os.environ):
            raise Invalid(f"illegal environment variable '{item}': it needs NAME=VALUE")
        environment[name] = value if equals else os.environ[name]
    return environment
