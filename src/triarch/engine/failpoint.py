"""Deaths on demand: the crash walk kills the daemon after every journalled step.

`TRIARCH_FAILPOINT=VERB:STEP:before|after` makes this process SIGKILL itself when that point is reached. Without the
variable the cost is one comparison.
"""

from __future__ import annotations

import os
import signal

_POINT = os.environ.get("TRIARCH_FAILPOINT")


def failpoint(verb: str, step: str, when: str) -> None:
    """Die here, as from `kill -9`, if this is the chosen point."""
    if _POINT is not None and f"{verb}:{step}:{when}" == _POINT:
        os.kill(os.getpid(), signal.SIGKILL)
