"""What each architecture can do, as a page: `python -m triarch.drivers.capabilities > docs/CAPABILITIES.md`.

The table is made from the drivers themselves, by the same test that decides whether the engine refuses a verb.
"""

from __future__ import annotations

import inspect
import sys

from triarch.drivers import DRIVERS, HIDDEN, driver_factory
from triarch.drivers.base import CAPABILITIES, capabilities_of
from triarch.model.instance import default_instance


def table() -> str:
    """Capability × architecture, in Markdown."""
    names = [name for name in DRIVERS if name not in HIDDEN]
    having = {name: capabilities_of(driver_factory(name)(default_instance())) for name in names}
    rows = [
        "# What each architecture can do",
        "",
        "Made by `python -m triarch.drivers.capabilities` from the drivers; do not edit it.",
        "Where an architecture lacks something, the refusal names those that have it. Whether an architecture can be",
        "had on a host is found by trying: `triarch architecture list`.",
        "",
        f"| capability | what it is | {' | '.join(names)} |",
        f"|---|---|{'---|' * len(names)}",
    ]
    for capability, protocol in CAPABILITIES.items():
        what = (inspect.getdoc(protocol) or "").partition("\n")[0]
        marks = " | ".join("yes" if capability in having[name] else "–" for name in names)
        rows.append(f"| `{capability}` | {what} | {marks} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.stdout.write(table())
