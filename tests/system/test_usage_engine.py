"""Accounts in a whole engine: across restarts of the daemon, ends of runs and deletes of machines."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from engine_rig import Engineer, engineer_at, new_engine

from triarch.drivers.fake.driver import FakeDriver
from triarch.errors import Invalid, NotFound
from triarch.model.driver import MachineSpec, Usage
from triarch.model.machine import SetMachine
from triarch.model.usage import UsageRow

# What each machine has used in its present run: the hand of the test.
USED: dict[str, Usage] = {}


@pytest.fixture(autouse=True)
def _metered(monkeypatch: pytest.MonkeyPatch) -> None:
    async def usage(self: FakeDriver, spec: MachineSpec) -> Usage:
        return USED.get(spec.machine.name, Usage(cpu_seconds=0.0, memory_bytes=1000))

    USED.clear()
    monkeypatch.setattr(FakeDriver, "usage", usage)


async def account(engineer: Engineer, by: str = "machine", **asked: str) -> dict[str, UsageRow]:
    rows = await engineer.engine.usages.account(by=by, **asked)  # type: ignore[arg-type]
    return {row.group: row for row in rows}


async def test_counters_are_charged_once_across_daemons_and_runs(tmp_path: Path) -> None:
    async with engineer_at(tmp_path) as engineer:
        await engineer.launch("web")
        USED["web"] = Usage(cpu_seconds=5.0, memory_bytes=1000, network_sent_bytes=700)
        await engineer.engine.usages.look()
        for _ in range(3):
            await engineer.engine.close()
            engineer.engine = await new_engine(engineer.engine.instance)
        assert (await account(engineer))["web"].cpu_seconds == 5.0
        USED["web"] = Usage(cpu_seconds=8.0, memory_bytes=1000, network_sent_bytes=900)
        await engineer.engine.usages.look()
        await engineer.done(await engineer.engine.kill("web"))
        USED["web"] = Usage(cpu_seconds=2.0, memory_bytes=1000, network_sent_bytes=10)
        await engineer.done(await engineer.engine.start("web"))
        await engineer.engine.usages.look()
        row = (await account(engineer))["web"]
        assert row.cpu_seconds == 10.0
        assert row.network_sent_bytes == 910
        assert row.running_hours > 0
        assert row.disk_byte_hours > 0


async def test_a_daemon_that_dies_charges_nothing_twice_and_loses_nothing(tmp_path: Path) -> None:
    """The old one is not closed: what it had not written, the next one finds in the counters."""
    async with engineer_at(tmp_path) as engineer:
        await engineer.launch("web")
        USED["web"] = Usage(cpu_seconds=5.0, memory_bytes=1000)
        await engineer.engine.usages.look()
        await account(engineer)  # writes
        USED["web"] = Usage(cpu_seconds=6.0, memory_bytes=1000)
        await engineer.engine.usages.look()  # does not
        for task in engineer.engine.usages._tasks:
            task.cancel()
        engineer.engine.usages._tasks = []
        await engineer.engine.close()
        engineer.engine = await new_engine(engineer.engine.instance)
        assert (await account(engineer))["web"].cpu_seconds == 6.0


async def test_machines_that_are_gone_stay_in_the_accounts(tmp_path: Path) -> None:
    async with engineer_at(tmp_path) as engineer:
        for name, team in (("web", "a"), ("db", "a"), ("mail", "b")):
            await engineer.launch(name)
            await engineer.done(await engineer.engine.set(name, SetMachine(values={"label.team": team})))
            USED[name] = Usage(cpu_seconds=4.0, memory_bytes=1000)
        await engineer.engine.usages.look()
        await engineer.done(await engineer.engine.delete("web", force=True))
        await engineer.engine.usages.look()
        assert set(await account(engineer)) == {"db", "mail", "web"}
        by_team = await account(engineer, "label:team")
        assert {team: row.cpu_seconds for team, row in by_team.items()} == {"a": 8.0, "b": 4.0}
        assert set(await account(engineer, label="team=b")) == {"mail"}
        assert set(await account(engineer, machine="web")) == {"web"}


async def test_time_spans_are_whole_hours_and_illegal_ones_are_refused(tmp_path: Path) -> None:
    async with engineer_at(tmp_path) as engineer:
        await engineer.launch("web")
        usages, now = engineer.engine.usages, datetime.now(UTC)
        row = (await usages.account(now - timedelta(hours=2), now))[0]
        assert row.begin.minute == row.end.minute == 0
        assert row.end - row.begin >= timedelta(hours=3)
        assert await usages.account(now - timedelta(days=9), now - timedelta(days=8)) == ()
        with pytest.raises(Invalid, match="is after"):
            await usages.account(now, now - timedelta(days=1))
        for by in ("label", "label:", "label:Ä", "moon", "label:a\nb"):
            with pytest.raises(Invalid, match="illegal grouping"):
                await usages.account(by=by)


async def test_the_live_table_has_all_machines_and_the_history_those_that_run(tmp_path: Path) -> None:
    async with engineer_at(tmp_path) as engineer:
        await engineer.launch("web")
        await engineer.launch("idle", start=False)
        rows = await engineer.engine.usages.all()
        assert [(row.name, row.usage is not None) for row in rows] == [("idle", False), ("web", True)]
        assert engineer.engine.usages.history("web").name == "web"
        with pytest.raises(NotFound):
            engineer.engine.usages.history("nobody")
        page = await engineer.engine.usages.metrics()
        assert 'triarch_machine_memory_bytes{machine="web",architecture="fake"} 1000' in page
        assert 'triarch_operation_duration_seconds_count{verb="launch",outcome="succeeded"} 1' in page
