"""The page for Prometheus: its grammar holds whatever machines are called."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from triarch.engine.metrics import OperationCounts, PoolFigures, escape, exposition
from triarch.model.driver import Usage
from triarch.model.operation import Operation, OperationStatus
from triarch.model.state import State
from triarch.model.usage import MachineUsage

LABEL = r'[a-zA-Z_]\w*="(?:[^"\\\n]|\\["\\n])*"'
SAMPLE = re.compile(rf"([a-zA-Z_:][\w:]*)(\{{{LABEL}(?:,{LABEL})*\}})? (-?[0-9.e+-]+|\+Inf|NaN)\Z")
HEAD = re.compile(r"# (HELP|TYPE) ([a-zA-Z_:][\w:]*) (.+)\Z")


def machine(name: str, **usage: int) -> MachineUsage:
    used = Usage(cpu_seconds=1.5, memory_bytes=1 << 20, **usage)
    return MachineUsage(name=name, uuid="u", state=State.RUNNING, architecture="container", usage=used)


def check(page: str) -> dict[str, str]:
    """Every line follows the grammar, every sample its family; the samples by name and labels."""
    family, seen, samples = "", set(), {}
    assert page.endswith("\n")
    for line in page[:-1].split("\n"):
        if head := HEAD.match(line):
            if head[1] == "HELP":
                assert head[2] not in seen, f"{head[2]} is there twice"
                family = head[2]
                seen.add(family)
            assert head[2] == family
            continue
        found = SAMPLE.match(line)
        assert found, line
        assert found[1].startswith(family)
        key = found[1] + (found[2] or "")
        assert key not in samples, f"{key} is there twice"
        samples[key] = found[3]
    return samples


@given(st.text())
def test_no_label_breaks_the_page(text: str) -> None:
    pools = (PoolFigures(name=text, free_bytes=1, used_bytes=2),)
    samples = check(exposition([machine(text)], OperationCounts(), pools, 0))
    assert samples[f'triarch_pool_free_bytes{{pool="{escape(text)}"}}'] == "1"


def test_what_is_not_counted_is_not_there() -> None:
    page = exposition([machine("web", network_sent_bytes=7), machine("db")], OperationCounts(), (), 3)
    samples = check(page)
    assert samples['triarch_machine_network_sent_bytes_total{machine="web",architecture="container"}'] == "7"
    assert not any("network_sent" in key and "db" in key for key in samples)
    assert samples["triarch_operations_running"] == "3"
    assert samples['triarch_machines{state="running"}'] == "2"
    assert float(samples["triarch_host_memory_bytes"]) > 0


def test_operations_are_counted_by_verb_and_outcome_with_their_durations() -> None:
    counts, begun = OperationCounts(), datetime(2026, 1, 1, tzinfo=UTC)
    good, bad = OperationStatus.SUCCEEDED, OperationStatus.FAILED
    for seconds, status in ((0.2, good), (20, good), (1, bad)):
        ended = begun + timedelta(seconds=seconds)
        counts.add(Operation(id="x", verb="start", target="machine/a", created_at=begun, ended_at=ended, status=status))
    samples = check(exposition([], counts, (), 0))
    name = "triarch_operation_duration_seconds"
    assert samples[f'{name}_count{{verb="start",outcome="succeeded"}}'] == "2"
    assert float(samples[f'{name}_sum{{verb="start",outcome="succeeded"}}']) == 20.2
    assert samples[f'{name}_bucket{{verb="start",outcome="succeeded",le="0.25"}}'] == "1"
    assert samples[f'{name}_bucket{{verb="start",outcome="succeeded",le="+Inf"}}'] == "2"
    assert samples[f'{name}_count{{verb="start",outcome="failed"}}'] == "1"
