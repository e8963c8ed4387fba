"""Who a command runs as, and for how long; login shells; typing on the console."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

import msgspec
import pytest

from triarch.drivers.base import Exec
from triarch.errors import Error
from triarch.model.driver import TIMED_OUT_CODE, Data, ExecRequest, MachineSpec, Stream
from triarch.model.state import Status
from triarch.testing.driver.fixtures import DriverFixtures, request
from triarch.testing.driver_rig import IDLE, DriverRig, FarEnd, shell

# The fake has this user from the beginning.
_ADD_BOB = (
    "grep -q ^bob: /etc/passwd || {"
    " echo bob:x:1000:1000::/home/bob:/bin/sh >> /etc/passwd; echo bob:x:1000: >> /etc/group;"
    " echo games:x:60:root,bob >> /etc/group; mkdir -p /home/bob; }"
)

FLOODING = shell("while :; do seq 1 10000; done")


class CheckSessions(DriverFixtures):
    async def test_a_user_by_name(self, rig: DriverRig) -> None:
        await self._add_bob(rig)
        wanted = request("id -u; id -g; echo $HOME $USER $LOGNAME $SHELL")
        done, far_end = await rig.exec(msgspec.structs.replace(wanted, user="bob"))
        assert done.code == 0, far_end.stderr
        assert far_end.stdout.decode().split() == ["1000", "1000", "/home/bob", "bob", "bob", "/bin/sh"]

    async def test_groups_are_the_machines_own(self, rig: DriverRig) -> None:
        if not rig.harness.real:
            pytest.skip("these machines have no files")
        await self._add_bob(rig)
        for user, groups in (("bob", {"1000", "60"}), ("1000", {"1000", "60"}), ("bob:games", {"60"}), ("7:8", {"8"})):
            done, far_end = await rig.exec(msgspec.structs.replace(request("id -G"), user=user))
            assert done.code == 0, far_end.stderr
            assert set(far_end.stdout.decode().split()) == groups, user

    @pytest.mark.parametrize("user", ["nobody-of-this-name", "0:nothing-of-this-name"])
    async def test_an_unknown_user_is_126(self, rig: DriverRig, user: str) -> None:
        done, far_end = await rig.exec(msgspec.structs.replace(request("echo here"), user=user))
        assert (done.code, far_end.stdout) == (126, b"")
        assert b"of-this-name" in far_end.stderr

    async def test_a_login_shell_is_at_home(self, rig: DriverRig) -> None:
        await self._add_bob(rig)
        far_end = FarEnd(Data(b"echo I am $0\npwd\nexit 3\n"))
        done, far_end = await rig.exec(ExecRequest(login=True, user="bob"), far_end)
        assert done.code == 3, far_end.stderr
        assert b"/home/bob" in far_end.stdout, far_end.stdout
        if rig.harness.real:
            assert b"I am -sh" in far_end.stdout

    async def test_a_shell_that_is_not_there_is_replaced(self, rig: DriverRig) -> None:
        if not rig.harness.real:
            pytest.skip("these machines have no files")
        line = "lost:x:1001:1001::/no/such/home:/no/such/shell"
        await rig.exec(request(f"grep -q ^lost: /etc/passwd || echo {line} >> /etc/passwd"))
        done, far_end = await rig.exec(ExecRequest(login=True, user="lost"), FarEnd(Data(b"pwd; id -u; exit 4\n")))
        assert (done.code, far_end.stdout.split()) == (4, [b"/", b"1001"])

    async def test_a_command_that_takes_too_long_ends_with_124(self, rig: DriverRig) -> None:
        began = time.monotonic()
        wanted = msgspec.structs.replace(request("echo begun; sleep 1000"), timeout_seconds=rig.seconds(1))
        done, far_end = await rig.exec(wanted)
        assert (done.code, far_end.stdout) == (TIMED_OUT_CODE, b"begun\n"), (done, far_end.stderr)
        assert "timed out" in done.reason
        assert time.monotonic() - began < rig.seconds(20)

    async def test_a_command_in_time_keeps_its_code(self, rig: DriverRig) -> None:
        done, _ = await rig.exec(msgspec.structs.replace(request("exit 5"), timeout_seconds=1000.0))
        assert done.code == 5

    async def test_what_ignores_the_end_of_its_time_is_killed_with_its_session(self, rig: DriverRig) -> None:
        if not rig.harness.real:
            pytest.skip("these machines have no processes")
        script = "trap '' TERM; sleep 999 & echo $! $$; while :; do sleep 1; done"
        wanted = msgspec.structs.replace(request(script), timeout_seconds=rig.seconds(1))
        done, far_end = await rig.exec(wanted)
        assert done.code == TIMED_OUT_CODE
        for pid in far_end.stdout.decode().split():
            gone, _ = await rig.exec(request(f"test -e /proc/{pid} && ! grep -q '^State:.Z' /proc/{pid}/status"))
            assert gone.code != 0, f"process {pid} outlived its time"

    async def test_a_silent_command_ends_with_its_far_end(self, rig: DriverRig) -> None:
        """It does not find out by writing."""
        if not rig.harness.real:
            pytest.skip("these machines have no processes")
        far_end = FarEnd(open_ended=True)
        task = asyncio.create_task(rig.can_exec.exec(await rig.idle(), request("echo $$; sleep 999"), far_end))
        await far_end.until(b"\n", rig.seconds(20))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        for _ in range(50):
            done, _ = await rig.exec(request(f"kill -0 {far_end.stdout.decode().strip()}"))
            if done.code:
                return
            await asyncio.sleep(0.1)
        raise AssertionError("the command outlived its far end")

    @pytest.mark.parametrize(
        "harm",
        [
            "rm /etc/passwd; mkfifo /etc/passwd",
            "rm /etc/passwd; ln -s /proc/1/environ /etc/passwd",
            "rm /etc/passwd; ln -s ../../../../../../etc/passwd /etc/passwd",
            "rm /etc/passwd; ln -s /dev/zero /etc/passwd",
            "rm /etc/passwd; mkdir /etc/passwd",
            "yes root:x:0:0:::: | head -c 4000000 > /etc/passwd",
            "printf 'root:x:0:0::/x:%s\\n' /bin/true/../../../../bin/false > /etc/passwd",
        ],
    )
    async def test_a_hostile_passwd_harms_nobody(self, rig: DriverRig, harm: str) -> None:
        if not rig.harness.real:
            pytest.skip("these machines have no files")
        driver, spec = rig.can_exec, await self._own(rig)
        async with asyncio.timeout(rig.seconds(30)):
            assert (await driver.exec(spec, request(harm), FarEnd())).code == 0
            assert (await driver.exec(spec, request("exit 3"), FarEnd())).code == 3
            done = await driver.exec(spec, msgspec.structs.replace(request("exit 3"), user="bob"), FarEnd())
            assert done.code == 126
            assert (await driver.exec(spec, request("exit 3"), FarEnd())).code == 3

    async def _own(self, rig: DriverRig) -> MachineSpec:
        return await rig.ready(IDLE)

    async def _add_bob(self, rig: DriverRig) -> None:
        if rig.harness.real:
            done, far_end = await rig.exec(request(_ADD_BOB))
            assert done.code == 0, far_end.stderr


class CheckConsole(DriverFixtures):
    """A terminal echoes what is typed, and the log has that; whoever types gets nothing from the driver."""

    async def test_any_number_type(self, rig: DriverRig) -> None:
        spec = await self._system(rig)
        driver, ends = rig.can_console, [FarEnd(open_ended=True), FarEnd(open_ended=True)]
        tasks = [asyncio.create_task(driver.console(spec, end)) for end in ends]
        try:
            for number in range(2):
                for who, end in enumerate(ends):
                    end.feed(Data(b"echo typed-%d-%d\n" % (who, number)))
                    await rig.until_logged(spec, f"typed-{who}-{number}")
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        assert [end.stdout for end in ends] == [b"", b""]
        assert await rig.status(spec) is Status.RUNNING

    async def test_one_who_leaves_ends_nothing_for_the_others(self, rig: DriverRig) -> None:
        spec = await self._system(rig)
        driver, stays = rig.can_console, FarEnd(open_ended=True)
        task = asyncio.create_task(driver.console(spec, stays))
        stays.feed(Data(b"echo stays-first\n"))
        await rig.until_logged(spec, "stays-first")
        leaving = driver.console(spec, FarEnd(Data(b"echo leaves\n")))
        async with asyncio.timeout(rig.seconds(20)):
            await leaving
        stays.feed(Data(b"echo stays-second\n"))
        await rig.until_logged(spec, "stays-second")
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def test_the_machine_may_end(self, rig: DriverRig) -> None:
        spec = await self._system(rig)
        end = FarEnd(open_ended=True)
        task = asyncio.create_task(rig.can_console.console(spec, end))
        end.feed(Data(b"echo before\n"))
        await rig.until_logged(spec, "before")
        await rig.driver.kill(spec)
        end.feed(Data(b"echo after\n"), Data(b"more\n"))
        await asyncio.sleep(0.2)
        task.cancel()
        with suppress(asyncio.CancelledError, Error):
            await task
        assert await rig.status(spec) is Status.STOPPED

    async def _system(self, rig: DriverRig) -> MachineSpec:
        spec = await rig.harness.system_machine()
        if spec is None:
            pytest.skip("the harness has no template with an init of its own")
        rig.remember(spec)
        await rig.driver.create(spec)
        await rig.driver.start(spec)
        if isinstance(rig.driver, Exec):
            async with asyncio.timeout(rig.seconds(60)):
                assert (await rig.driver.exec(spec, request("exit 3"), FarEnd())).code == 3
        return spec


class CheckSlowFarEnds(DriverFixtures):
    """A far end that does not read holds up nothing but its own command."""

    async def test_a_machine_is_killed_whose_output_nobody_takes(self, rig: DriverRig) -> None:
        if not rig.harness.real:
            pytest.skip("these machines talk as fast as one listens")
        driver, spec, far_end = rig.can_attach, await rig.machine(FLOODING), StuckEnd()
        task = asyncio.create_task(driver.start_attached(spec, far_end, None))
        async with asyncio.timeout(rig.seconds(30)):
            await far_end.stuck.wait()
        await asyncio.sleep(0.5)
        async with asyncio.timeout(rig.seconds(20)):
            await rig.driver.kill(spec)
        assert await rig.status(spec) in (Status.STOPPED, Status.ABSENT)
        far_end.go_on.set()
        async with asyncio.timeout(rig.seconds(20)):
            assert (await task).code == 128 + 9

    async def test_a_command_whose_output_nobody_takes_is_in_nobodys_way(self, rig: DriverRig) -> None:
        far_end = StuckEnd()
        task = asyncio.create_task(rig.can_exec.exec(await rig.idle(), ExecRequest(command=FLOODING), far_end))
        async with asyncio.timeout(rig.seconds(30)):
            await far_end.stuck.wait()
            for code in (3, 4):
                done, _ = await rig.exec(request(f"exit {code}"))
                assert done.code == code
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class StuckEnd(FarEnd):
    """Takes nothing from the first piece on, until it may go on."""

    def __init__(self) -> None:
        super().__init__(open_ended=True)
        self.stuck = asyncio.Event()
        self.go_on = asyncio.Event()

    async def write(self, stream: Stream, data: bytes) -> None:
        self.stuck.set()
        await self.go_on.wait()
