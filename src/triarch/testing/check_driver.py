"""The contract of `drivers/base.py` as tests. Subclass `CheckDriver` and supply a harness:

    class TestContainerDriver(CheckDriver):
        @pytest.fixture(scope="class")
        @classmethod
        def harness(cls, tmp_path_factory): return ContainerHarness(tmp_path_factory.mktemp("container"))

A capability that the driver lacks, or a driver that cannot run on this host, is a skip that shows its reason.
Tests share one event loop, one rig and one idle machine, because a machine may take seconds to boot.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest

from triarch.drivers.base import Driver, Exec, capabilities_of
from triarch.errors import Busy, MachineFailed, TimedOut, WrongState
from triarch.model.driver import Data, ExecRequest, LayerFile, Resize
from triarch.model.state import Status
from triarch.testing.driver.files import CheckFiles
from triarch.testing.driver.fixtures import DriverFixtures, request
from triarch.testing.driver.terminal import CheckConsole, CheckSessions, CheckSlowFarEnds
from triarch.testing.driver_rig import IDLE, STUBBORN, TICKING, DriverRig, FarEnd, shell

KILLED = 128 + 9


class CheckIdentity(DriverFixtures):
    async def test_probe_tells_version_and_capabilities(self, rig: DriverRig) -> None:
        info = await rig.driver.probe()
        assert (info.name, info.kind) == (rig.driver.name, rig.driver.kind)
        assert info.version
        assert set(info.capabilities) == set(capabilities_of(rig.driver))

    async def test_validate_accepts_what_runs(self, rig: DriverRig) -> None:
        rig.driver.validate((await rig.idle()).machine)


class CheckLifecycle(DriverFixtures):
    async def test_an_unknown_machine_is_absent(self, rig: DriverRig) -> None:
        spec = rig.remember(await rig.harness.app_machine(IDLE, {}))
        assert await rig.status(spec) is Status.ABSENT

    async def test_create_is_idempotent_and_starts_nothing(self, rig: DriverRig) -> None:
        spec = await rig.machine(IDLE)
        await rig.driver.create(spec)
        assert await rig.status(spec) in (Status.ABSENT, Status.STOPPED)

    async def test_start_then_running(self, rig: DriverRig) -> None:
        spec = await rig.started(IDLE)
        observation = await rig.driver.observe(spec)
        assert observation.uuid == spec.uuid
        assert observation.status is Status.RUNNING
        assert observation.exit is None and not observation.failed

    async def test_start_of_a_running_machine_is_success(self, rig: DriverRig) -> None:
        spec = await rig.ready()
        before = await rig.driver.observe(spec)
        await rig.driver.start(spec)
        assert await rig.driver.observe(spec) == before

    async def test_create_leaves_a_running_machine_alone(self, rig: DriverRig) -> None:
        spec = await rig.ready()
        before = await rig.driver.observe(spec)
        await rig.driver.create(spec)
        assert await rig.driver.observe(spec) == before

    async def test_two_machines_at_once(self, rig: DriverRig) -> None:
        first, second = await rig.machine(IDLE), await rig.machine(IDLE)
        await asyncio.gather(rig.driver.start(first), rig.driver.start(second))
        one, two = await rig.driver.observe(first), await rig.driver.observe(second)
        assert one.status is two.status is Status.RUNNING
        assert one.pid is None or one.pid != two.pid
        await rig.driver.kill(first)
        assert await rig.status(second) is Status.RUNNING

    async def test_a_system_machine_boots_and_stops(self, rig: DriverRig) -> None:
        spec = await rig.harness.system_machine()
        if spec is None:
            pytest.skip("the harness has no template with an init of its own")
        rig.remember(spec)
        await rig.driver.create(spec)
        await rig.driver.start(spec)
        if isinstance(rig.driver, Exec):
            # Whoever asks an init to stop before it listens is not heard: exec works once it is up.
            async with asyncio.timeout(rig.seconds(60)):
                assert (await rig.driver.exec(spec, request("exit 3"), FarEnd())).code == 3
        await rig.driver.stop(spec, rig.seconds(60))
        assert await rig.status(spec) is Status.STOPPED


class CheckEnds(DriverFixtures):
    """Every way in which a run ends, and what is said of it."""

    @pytest.mark.parametrize("code", [0, 42])
    async def test_the_command_ends(self, rig: DriverRig, code: int) -> None:
        spec = await rig.started(shell(f"echo hello; exit {code}"))
        observation = await rig.until(spec, Status.STOPPED)
        assert observation.exit is not None and observation.exit.code == code
        assert not observation.failed
        await rig.until_logged(spec, "hello")

    async def test_the_environment_reaches_the_command(self, rig: DriverRig) -> None:
        spec = await rig.machine(shell('echo "it is $GREETING"; exit 0'), {"GREETING": "guten Tag; 'x'"})
        await rig.driver.start(spec)
        await rig.until_logged(spec, "it is guten Tag; 'x'")

    async def test_stop_asks_the_guest(self, rig: DriverRig) -> None:
        spec = await rig.ready()
        await rig.driver.stop(spec, rig.seconds(20))
        observation = await rig.driver.observe(spec)
        assert observation.status is Status.STOPPED
        assert observation.exit is not None and observation.exit.code == 7

    async def test_stop_never_escalates(self, rig: DriverRig) -> None:
        spec = await rig.ready(STUBBORN)
        with pytest.raises(TimedOut):
            await rig.driver.stop(spec, rig.seconds(0.5))
        assert await rig.status(spec) is Status.RUNNING

    async def test_stop_of_a_stopped_machine_is_success(self, rig: DriverRig) -> None:
        spec = await rig.machine(IDLE)
        await rig.driver.stop(spec, rig.seconds(1))
        await rig.driver.start(spec)
        await rig.driver.kill(spec)
        await rig.driver.stop(spec, rig.seconds(1))

    async def test_kill_does_not_ask(self, rig: DriverRig) -> None:
        spec = await rig.ready(STUBBORN)
        await rig.driver.kill(spec)
        observation = await rig.driver.observe(spec)
        assert observation.status is Status.STOPPED
        assert observation.exit is not None and observation.exit.code == KILLED

    async def test_kill_of_a_stopped_machine_is_success(self, rig: DriverRig) -> None:
        spec = await rig.machine(IDLE)
        await rig.driver.kill(spec)
        await rig.driver.start(spec)
        await rig.driver.kill(spec)
        await rig.driver.kill(spec)

    async def test_kill_keeps_the_exit_of_a_run_that_had_ended(self, rig: DriverRig) -> None:
        spec = await rig.started(shell("exit 42"))
        assert (await rig.exit_of(spec)).code == 42
        await rig.driver.kill(spec)
        assert (await rig.exit_of(spec)).code == 42

    async def test_delete_forgets(self, rig: DriverRig) -> None:
        spec = await rig.ready()
        await rig.driver.kill(spec)
        await rig.driver.delete(spec)
        assert await rig.status(spec) is Status.ABSENT
        run_dir = Path(spec.run_dir)
        assert not run_dir.exists() or not list(run_dir.iterdir())
        assert Path(spec.delta_path).exists(), "delete must keep the disk"
        await rig.driver.delete(spec)

    async def test_a_machine_starts_again(self, rig: DriverRig) -> None:
        spec = await rig.started(shell("exit 42"))
        assert (await rig.exit_of(spec)).code == 42
        again = msgspec.structs.replace(spec, machine=msgspec.structs.replace(spec.machine, command=IDLE))
        await rig.driver.start(again)
        observation = await rig.driver.observe(again)
        assert (observation.status, observation.exit) == (Status.RUNNING, None)

    async def test_a_deleted_machine_starts_again(self, rig: DriverRig) -> None:
        spec = await rig.ready()
        await rig.driver.kill(spec)
        await rig.driver.delete(spec)
        Path(spec.run_dir).mkdir(mode=0o700, exist_ok=True)
        await rig.driver.create(spec)
        await rig.driver.start(spec)
        assert await rig.status(spec) is Status.RUNNING

    async def test_what_was_written_stays(self, rig: DriverRig) -> None:
        if not rig.harness.real:
            pytest.skip("these machines have no files")
        spec = await rig.started(shell("test -e /kept && exit 5; echo kept > /kept; exit 4"))
        assert (await rig.exit_of(spec)).code == 4
        await rig.driver.start(spec)
        assert (await rig.exit_of(spec)).code == 5


class CheckFailures(DriverFixtures):
    """Starts that fail leave nothing, and one delta is never used twice."""

    async def test_a_missing_layer(self, rig: DriverRig) -> None:
        spec = await rig.machine(IDLE)
        missing = LayerFile(digest="f" * 64, path=f"{spec.state_dir}/no-such-layer.erofs", size_bytes=2 << 20)
        with pytest.raises(MachineFailed):
            await rig.driver.start(msgspec.structs.replace(spec, layers=(missing,)))
        assert await rig.status(spec) in (Status.ABSENT, Status.STOPPED)
        # The delta is free again.
        await rig.driver.start(spec)
        assert await rig.status(spec) is Status.RUNNING

    async def test_a_missing_command(self, rig: DriverRig) -> None:
        """Refused at the start where the host looks, else the guest ends with 127 as a shell would."""
        spec = await rig.machine(("/no/such/program",))
        try:
            await rig.driver.start(spec)
        except MachineFailed:
            assert await rig.status(spec) in (Status.ABSENT, Status.STOPPED)
        else:
            assert (await rig.exit_of(spec)).code == 127

    async def test_one_delta_one_machine(self, rig: DriverRig) -> None:
        first, second = await rig.ready(), await rig.machine(IDLE)
        second = rig.remember(msgspec.structs.replace(second, delta_path=first.delta_path))
        with pytest.raises(Busy):
            await rig.driver.start(second)
        assert await rig.status(second) in (Status.ABSENT, Status.STOPPED)
        assert await rig.status(first) is Status.RUNNING
        await rig.driver.kill(first)
        await rig.driver.start(second)
        assert await rig.status(second) is Status.RUNNING

    @pytest.mark.parametrize("delay_seconds", [0.0, 0.002, 0.01, 0.05])
    async def test_a_cancelled_start_is_undone(self, rig: DriverRig, delay_seconds: float) -> None:
        spec = await rig.machine(IDLE)
        task = asyncio.create_task(rig.driver.start(spec))
        await asyncio.sleep(delay_seconds)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        await rig.driver.kill(spec)
        await rig.driver.delete(spec)
        assert await rig.status(spec) is Status.ABSENT
        Path(spec.run_dir).mkdir(mode=0o700, exist_ok=True)
        await rig.driver.create(spec)
        await rig.driver.start(spec)
        assert await rig.status(spec) is Status.RUNNING


class CheckAdoption(DriverFixtures):
    """The daemon comes and goes; machines stay."""

    async def test_machines_survive_close(self, rig: DriverRig) -> None:
        spec = await rig.ready()
        before = await rig.driver.observe(spec)
        await rig.restart()
        assert await rig.driver.observe(spec) == before
        await rig.driver.stop(spec, rig.seconds(20))
        assert (await rig.exit_of(spec)).code == 7

    async def test_machines_survive_the_death_of_the_daemon(self, rig: DriverRig) -> None:
        spec = await rig.ready()
        before = await rig.driver.observe(spec)
        await rig.die()
        assert await rig.driver.observe(spec) == before
        async with rig.watching() as watcher:
            await watcher.until(spec, Status.RUNNING, rig.seconds(10))
        await rig.driver.stop(spec, rig.seconds(20))
        assert (await rig.exit_of(spec)).code == 7

    async def test_events_report_what_ended_while_nobody_looked(self, rig: DriverRig) -> None:
        spec = await rig.ready(shell("echo ready; sleep 1; exit 42"))
        await rig.die()
        await asyncio.sleep(1.2)
        await rig.until(spec, Status.STOPPED)
        async with rig.watching() as watcher:
            seen = await watcher.until(spec, Status.STOPPED, rig.seconds(10))
        assert seen.exit is not None and seen.exit.code == 42

    async def test_events_first_tell_what_runs(self, rig: DriverRig) -> None:
        first, second = await rig.ready(), await rig.ready()
        async with rig.watching() as watcher:
            await watcher.until(first, Status.RUNNING, rig.seconds(10))
            await watcher.until(second, Status.RUNNING, rig.seconds(10))

    @pytest.mark.parametrize("script", ["exit 42", "sleep 1; exit 42"])
    async def test_an_end_is_reported_once(self, rig: DriverRig, script: str) -> None:
        other = await rig.idle()
        async with rig.watching() as watcher:
            await watcher.until(other, Status.RUNNING, rig.seconds(10))
            spec = await rig.started(shell(script))
            seen = await watcher.until(spec, Status.STOPPED, rig.seconds(20))
            assert seen.exit is not None and seen.exit.code == 42
            await asyncio.sleep(0.5)
            assert len(watcher.of(spec, Status.STOPPED)) == 1

    async def test_an_end_of_an_adopted_machine_is_reported(self, rig: DriverRig) -> None:
        spec = await rig.ready(shell("echo ready; sleep 2; exit 42"))
        await rig.die()
        async with rig.watching() as watcher:
            seen = await watcher.until(spec, Status.STOPPED, rig.seconds(20))
        assert seen.exit is not None and seen.exit.code == 42

    async def test_events_can_be_consumed_again(self, rig: DriverRig) -> None:
        spec = await rig.idle()
        for _ in range(2):
            async with rig.watching() as watcher:
                await watcher.until(spec, Status.RUNNING, rig.seconds(10))

    async def test_observe_asks_the_host(self, rig: DriverRig) -> None:
        spec = await rig.ready()
        other: Driver = rig.harness.make_driver()
        try:
            assert (await other.observe(spec)).status is Status.RUNNING
            await other.kill(spec)
            assert await rig.status(spec) is Status.STOPPED
        finally:
            await other.close()


class CheckExec(DriverFixtures):
    @pytest.mark.parametrize("code", [0, 1, 42, 255])
    async def test_exit_codes(self, rig: DriverRig, code: int) -> None:
        done, _ = await rig.exec(request(f"exit {code}"))
        assert done.code == code

    async def test_a_signal_is_128_and_its_number(self, rig: DriverRig) -> None:
        done, _ = await rig.exec(request("kill -9 $$"))
        assert done.code == KILLED

    async def test_no_such_command_is_127(self, rig: DriverRig) -> None:
        done, _ = await rig.exec(ExecRequest(command=("/no/such/program",)))
        assert done.code == 127

    async def test_output_and_errors_are_apart(self, rig: DriverRig) -> None:
        done, far_end = await rig.exec(request("echo out; echo err >&2; exit 3"))
        assert (done.code, far_end.stdout, far_end.stderr) == (3, b"out\n", b"err\n")

    async def test_a_mebibyte_goes_in_and_comes_out_whole(self, rig: DriverRig) -> None:
        data = os.urandom(1 << 20)
        pieces = [Data(data[start : start + 50_000]) for start in range(0, len(data), 50_000)]
        done, far_end = await rig.exec(request("cat"), FarEnd(*pieces))
        assert done.code == 0
        assert far_end.stdout == data

    async def test_big_output_is_whole(self, rig: DriverRig) -> None:
        done, far_end = await rig.exec(request("seq 1 160000; exit 9"))
        assert done.code == 9
        assert far_end.stdout == b"".join(b"%d\n" % number for number in range(1, 160_001))

    async def test_output_without_a_newline(self, rig: DriverRig) -> None:
        _, far_end = await rig.exec(request("cat"), FarEnd(Data(b"\x00\xff no newline")))
        assert far_end.stdout == b"\x00\xff no newline"

    async def test_user_directory_and_environment(self, rig: DriverRig) -> None:
        wanted = ExecRequest(
            command=shell('id -u; id -g; pwd; echo "$WORD"'),
            user="33:34",
            directory="/tmp",
            environment={"WORD": "a b;'\"$x"},
        )
        done, far_end = await rig.exec(wanted)
        assert done.code == 0, far_end.stderr
        assert far_end.stdout.decode().splitlines() == ["33", "34", "/tmp", "a b;'\"$x"]

    async def test_many_at_once(self, rig: DriverRig) -> None:
        await rig.idle()
        ends = await asyncio.gather(*(rig.exec(request(f"echo {code}; exit {code}")) for code in range(1, 7)))
        assert [(done.code, far_end.stdout) for done, far_end in ends] == [(n, b"%d\n" % n) for n in range(1, 7)]

    async def test_a_far_end_that_goes_away_ends_the_command(self, rig: DriverRig) -> None:
        driver, spec, far_end = rig.can_exec, await rig.idle(), FarEnd(open_ended=True)
        running = request("echo pid $$; while :; do sleep 0.2; echo x; done")
        task = asyncio.create_task(driver.exec(spec, running, far_end))
        await far_end.until(b"x\n", rig.seconds(20))
        far_end.gone = True
        async with asyncio.timeout(rig.seconds(20)):
            with suppress(ConnectionError):
                await task
        await self._assert_gone(rig, far_end)

    async def test_a_cancelled_exec_ends_the_command(self, rig: DriverRig) -> None:
        driver, spec, far_end = rig.can_exec, await rig.idle(), FarEnd(open_ended=True)
        running = request("echo pid $$; while :; do sleep 0.2; echo x; done")
        task = asyncio.create_task(driver.exec(spec, running, far_end))
        await far_end.until(b"x\n", rig.seconds(20))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await self._assert_gone(rig, far_end)

    async def _assert_gone(self, rig: DriverRig, far_end: FarEnd) -> None:
        pid = far_end.stdout.split()[1].decode()
        for _ in range(100):
            done, _ = await rig.exec(request(f"kill -0 {pid}"))
            if done.code:
                return
            await asyncio.sleep(rig.seconds(0.1))
        raise AssertionError(f"process {pid} outlived the far end of its exec")

    async def test_exec_ends_with_its_machine(self, rig: DriverRig) -> None:
        driver, spec, far_end = rig.can_exec, await rig.ready(), FarEnd(open_ended=True)
        task = asyncio.create_task(driver.exec(spec, request("echo begun; sleep 1000"), far_end))
        await far_end.until(b"begun", rig.seconds(20))
        await rig.driver.kill(spec)
        async with asyncio.timeout(rig.seconds(20)):
            with suppress(MachineFailed, WrongState):
                assert (await task).code != 0

    async def test_exec_needs_a_running_machine(self, rig: DriverRig) -> None:
        driver, spec = rig.can_exec, await rig.machine(IDLE)
        with pytest.raises((WrongState, MachineFailed)):
            await driver.exec(spec, request("exit 0"), FarEnd())

    async def test_exec_in_an_adopted_machine(self, rig: DriverRig) -> None:
        await rig.idle()
        await rig.die()
        done, far_end = await rig.exec(request("echo here; exit 4"))
        assert (done.code, far_end.stdout) == (4, b"here\n")


class CheckTerminal(DriverFixtures):
    async def test_a_terminal_has_a_size(self, rig: DriverRig) -> None:
        wanted = msgspec.structs.replace(
            request("test -t 0 && test -t 1 && test -t 2 && stty size", terminal=True), columns=132, rows=43
        )
        done, far_end = await rig.exec(wanted, FarEnd(open_ended=True))
        assert done.code == 0, far_end.stdout
        assert far_end.stdout.split() == [b"43", b"132"]

    async def test_without_a_terminal_there_is_none(self, rig: DriverRig) -> None:
        done, _ = await rig.exec(request("test -t 0 || test -t 1 || test -t 2"))
        assert done.code == 1

    async def test_a_terminal_is_one_stream(self, rig: DriverRig) -> None:
        _, far_end = await rig.exec(request("echo out; echo err >&2", terminal=True), FarEnd(open_ended=True))
        assert far_end.stdout.split() == [b"out", b"err"]
        assert far_end.stderr == b""

    async def test_a_terminal_is_resized(self, rig: DriverRig) -> None:
        far_end = FarEnd(open_ended=True)
        task = asyncio.create_task(rig.exec(request("echo go; read line; stty size", terminal=True), far_end))
        await far_end.until(b"go", rig.seconds(20))
        far_end.feed(Resize(100, 40), Data(b"\n"))
        done, _ = await task
        assert done.code == 0
        assert far_end.stdout.split()[-2:] == [b"40", b"100"]


class CheckStreams(DriverFixtures):
    """Machines whose command has the caller's input and output."""

    async def test_attached_streams_and_code(self, rig: DriverRig) -> None:
        driver, spec = rig.can_attach, await rig.machine(shell("cat; echo err >&2; exit 3"))
        far_end = FarEnd(Data(b"one\n"), Data(b"two"))
        async with asyncio.timeout(rig.seconds(30)):
            done = await driver.start_attached(spec, far_end, None)
        assert (done.code, far_end.stdout, far_end.stderr) == (3, b"one\ntwo", b"err\n")
        assert await rig.status(spec) in (Status.STOPPED, Status.ABSENT)

    async def test_attached_input_ends(self, rig: DriverRig) -> None:
        driver, spec = rig.can_attach, await rig.machine(shell("cat"))
        async with asyncio.timeout(rig.seconds(30)):
            assert (await driver.start_attached(spec, FarEnd(), None)).code == 0

    async def test_attached_big_output_is_whole(self, rig: DriverRig) -> None:
        driver, spec, far_end = rig.can_attach, await rig.machine(shell("seq 1 160000")), FarEnd()
        async with asyncio.timeout(rig.seconds(60)):
            assert (await driver.start_attached(spec, far_end, None)).code == 0
        assert far_end.stdout == b"".join(b"%d\n" % number for number in range(1, 160_001))

    async def test_attached_terminal(self, rig: DriverRig) -> None:
        driver, spec = rig.can_attach, await rig.machine(shell("test -t 0 && test -t 1 && stty size"))
        far_end = FarEnd(open_ended=True)
        async with asyncio.timeout(rig.seconds(30)):
            done = await driver.start_attached(spec, far_end, Resize(100, 40))
        assert done.code == 0, far_end.stdout
        assert far_end.stdout.split()[-2:] == [b"40", b"100"]

    async def test_attached_is_killed(self, rig: DriverRig) -> None:
        driver, spec, far_end = rig.can_attach, await rig.machine(TICKING), FarEnd(open_ended=True)
        task = asyncio.create_task(driver.start_attached(spec, far_end, None))
        await far_end.until(b"tick", rig.seconds(20))
        assert await rig.status(spec) is Status.RUNNING
        await rig.driver.kill(spec)
        async with asyncio.timeout(rig.seconds(20)):
            assert (await task).code == KILLED

    async def test_an_attached_command_that_is_not_there(self, rig: DriverRig) -> None:
        driver, spec = rig.can_attach, await rig.machine(("no-such-command",))
        async with asyncio.timeout(rig.seconds(30)):
            done = await driver.start_attached(spec, FarEnd(), None)
        assert done.code == 127
        assert await rig.status(spec) in (Status.STOPPED, Status.ABSENT)

    async def test_an_attached_start_that_fails(self, rig: DriverRig) -> None:
        driver, spec = rig.can_attach, await rig.machine(IDLE)
        missing = LayerFile(digest="f" * 64, path=f"{spec.state_dir}/no-such-layer.erofs", size_bytes=2 << 20)
        with pytest.raises(MachineFailed):
            async with asyncio.timeout(rig.seconds(30)):
                await driver.start_attached(msgspec.structs.replace(spec, layers=(missing,)), FarEnd(), None)
        assert await rig.status(spec) in (Status.ABSENT, Status.STOPPED)


class CheckPauseAndUsage(DriverFixtures):
    async def test_pause_and_resume(self, rig: DriverRig) -> None:
        driver, spec = rig.can_pause, await rig.ready(TICKING)
        await driver.pause(spec)
        assert await rig.status(spec) is Status.PAUSED
        if rig.harness.real:
            await asyncio.sleep(rig.seconds(0.5))
            frozen = rig.log(spec)
            await asyncio.sleep(rig.seconds(1))
            assert rig.log(spec) == frozen, "a paused machine went on"
        await driver.resume(spec)
        assert await rig.status(spec) is Status.RUNNING
        await rig.driver.stop(spec, rig.seconds(20))
        assert (await rig.exit_of(spec)).code == 7

    async def test_a_paused_machine_is_adopted_and_killed(self, rig: DriverRig) -> None:
        driver, spec = rig.can_pause, await rig.ready()
        await driver.pause(spec)
        await rig.die()
        assert await rig.status(spec) is Status.PAUSED
        await rig.driver.kill(spec)
        assert await rig.status(spec) is Status.STOPPED

    async def test_pause_needs_a_running_machine(self, rig: DriverRig) -> None:
        driver, spec = rig.can_pause, await rig.machine(IDLE)
        with pytest.raises((WrongState, MachineFailed)):
            await driver.pause(spec)

    async def test_usage_is_plausible(self, rig: DriverRig) -> None:
        driver, spec = rig.can_meter, await rig.ready()
        usage = await driver.usage(spec)
        assert 0 <= usage.cpu_seconds < rig.seconds(60) * (os.cpu_count() or 1)
        assert 0 < usage.memory_bytes < os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        assert usage.processes is None or 1 <= usage.processes < 100

    async def test_usage_needs_a_running_machine(self, rig: DriverRig) -> None:
        driver, spec = rig.can_meter, await rig.machine(IDLE)
        with pytest.raises((WrongState, MachineFailed)):
            await driver.usage(spec)


class CheckDriver(
    CheckFiles,
    CheckPauseAndUsage,
    CheckStreams,
    CheckSlowFarEnds,
    CheckConsole,
    CheckSessions,
    CheckTerminal,
    CheckExec,
    CheckAdoption,
    CheckFailures,
    CheckEnds,
    CheckLifecycle,
    CheckIdentity,
):
    """The whole suite. pytest runs the tests of the last base first."""
