"""The verbs of a machine as procedures: which steps, in which order, and from where on there is no way back."""

from __future__ import annotations

import msgspec

from triarch.drivers.base import Attachable, Pausable, Stdio
from triarch.engine.machine_actions import MachineActions
from triarch.engine.on_machine import OnMachine
from triarch.engine.procedure import Step
from triarch.engine.services import Services
from triarch.errors import TimedOut, Unsupported
from triarch.model.driver import Observation, Resize
from triarch.model.machine import Exit, Machine
from triarch.model.state import State, Status


class MachineArguments(msgspec.Struct, frozen=True, kw_only=True):
    """`machine` is the record as it was when the operation began; the rest is used by the verbs that need it."""

    machine: Machine
    start: bool = False
    force: bool = False
    timeout_seconds: float = 60.0
    architecture: str = ""
    name: str = ""
    restarts: int = 0
    keep_desired: bool = False


class MachineProcedure(OnMachine[MachineArguments]):
    """A verb of a machine itself."""

    arguments_type = MachineArguments


def start_steps(machine: MachineActions, restarts: int = 0) -> tuple[Step, ...]:
    async def back_to_stopped() -> None:
        await machine.update(state=State.STOPPED)

    async def running() -> None:
        await machine.record_running(restarts)

    return (
        *((Step("dependencies", machine.need_dependencies),) if machine.machine.depends_on else ()),
        Step("prepare", machine.prepare),
        Step("network", machine.plug, machine.unplug),
        *((Step("seed", machine.first_boot.seed),) if machine.boots_first else ()),
        Step("boot", machine.boot, machine.end_run),
        *((Step("first-boot", machine.first_boot.run),) if machine.boots_first else ()),
        Step("running", running, back_to_stopped, commits=True),
    )


class Create(MachineProcedure):
    """Record and delta; with `start` (that is `launch`) the start's steps too. Interrupted, it leaves no machine."""

    verb = "create"

    def steps(self) -> tuple[Step, ...]:
        start = self.arguments.start
        return (
            Step("record", self._record, self.machine.remove_record),
            Step("delta", self.machine.create_delta, self.machine.remove_delta, commits=not start),
            *(start_steps(self.machine) if start else ()),
        )

    async def _record(self) -> None:
        await self.machine.add_record()
        self.machine.publish("created")


class Launch(Create):
    verb = "launch"


class Start(MachineProcedure):
    verb = "start"

    def steps(self) -> tuple[Step, ...]:
        return start_steps(self.machine, self.arguments.restarts)


class Stop(MachineProcedure):
    """Asks the guest; with `force` it is killed when it does not end in time. Once asked, a crash finishes it.

    Of a machine that waits for its next start only the wish to run is taken. With `keep_desired` that wish stays.
    """

    verb = "stop"

    def __init__(self, services: Services, arguments: MachineArguments) -> None:
        super().__init__(services, arguments)
        self._observation: Observation | None = None

    def steps(self) -> tuple[Step, ...]:
        ask = Step("ask", self._ask, self._still_wanted, commits=True)
        if self.arguments.machine.state in (State.STOPPED, State.FAILED):
            return (ask,)
        return (ask, Step("end", self._end), Step("stopped", self._stopped))

    async def _ask(self) -> None:
        await self.machine.update(desired=self._desired)

    @property
    def _desired(self) -> State:
        return self.machine.current.desired if self.arguments.keep_desired else State.STOPPED

    async def _still_wanted(self) -> None:
        if self.machine.current.state is State.RUNNING:
            await self.machine.update(desired=State.RUNNING)

    async def _end(self) -> None:
        spec = self.machine.spec
        try:
            await self.machine.driver.stop(spec, self.arguments.timeout_seconds)
        except TimedOut:
            if not self.arguments.force:
                raise
            await self.machine.driver.kill(spec)
        self._observation = await self.machine.driver.observe(spec)
        if self._observation.status is Status.ABSENT:
            self._observation = None
        await self.machine.forget_run()
        await self.machine.unplug()

    async def _stopped(self) -> None:
        observation = self._observation
        if observation is not None:
            # It was asked to end, so however it did is no failure.
            observation = msgspec.structs.replace(observation, failed=False)
        await self.machine.record_ended(observation, desired=self._desired)


class Kill(Stop):
    """Ends it without asking, then has the delta's journal replayed, so that it is clean at rest."""

    verb = "kill"

    async def _end(self) -> None:
        await self.machine.driver.kill(self.machine.spec)
        await self.machine.forget_run()
        await self.machine.unplug()
        await self.machine.check_delta()

    async def _stopped(self) -> None:
        await self.machine.update(state=State.STOPPED, desired=State.STOPPED, last_exit=Exit(code=137, reason="killed"))
        self.machine.publish("stopped", exit_code=137)


class Restart(Stop):
    """Stop, then start. From the moment that the guest was asked to stop, a crash finishes both.

    What it depends on is brought up before: a machine that could not start again is not stopped.
    """

    verb = "restart"

    def steps(self) -> tuple[Step, ...]:
        stop = super().steps()
        start = start_steps(self.machine, self.arguments.restarts)
        steps = [step for step in start if step.name == "dependencies"]
        steps += stop
        steps += [Step(step.name, step.do, step.undo) for step in start if step.name != "dependencies"]
        return tuple(steps)


class Settle(MachineProcedure):
    """A machine ended by itself: put away what is left of the run and record how it ended."""

    verb = "settle"

    def __init__(self, services: Services, arguments: MachineArguments, observation: Observation | None = None) -> None:
        super().__init__(services, arguments)
        self._observation = observation

    def steps(self) -> tuple[Step, ...]:
        return (Step("ended", self._record, commits=True), Step("tidy", self._tidy))

    async def _record(self) -> None:
        if self.machine.current.state in (State.RUNNING, State.PAUSED):
            await self.machine.record_ended(self._observation)

    async def _tidy(self) -> None:
        await self.machine.end_run()
        await self.machine.unplug()


class Delete(MachineProcedure):
    """A running one only with `force`. Begun, it is finished."""

    verb = "delete"

    def steps(self) -> tuple[Step, ...]:
        return (
            Step("end", self._end, commits=True),
            Step("snapshots", self.machine.remove_snapshots),
            Step("delta", self.machine.remove_delta),
            Step("forget", self._forget),
        )

    async def _end(self) -> None:
        await self.machine.end_run()
        await self.machine.unplug()

    async def _forget(self) -> None:
        await self.machine.remove_record()
        self.machine.publish("deleted")


class Rename(MachineProcedure):
    """One write in the store, so there is nothing to undo."""

    verb = "rename"

    @property
    def holds(self) -> tuple[str, ...]:
        return (f"machine/{self.arguments.name}",)

    @property
    def result(self) -> str | None:
        return self.arguments.name

    def steps(self) -> tuple[Step, ...]:
        return (Step("rename", self._rename, commits=True),)

    async def _rename(self) -> None:
        await self.machine.update(name=self.arguments.name)
        self.machine.publish("renamed", name=self.arguments.name)


class Switch(MachineProcedure):
    """Run the same two files under another architecture; if that does not start, go back to where it was."""

    verb = "switch"

    def steps(self) -> tuple[Step, ...]:
        old = self.arguments.machine
        if old.state is not State.RUNNING:
            return (
                Step("check", self.machine.check_delta),
                Step("architecture", self._take_new, self._take_old, commits=True),
            )
        return (
            Step("prepare", self._prepare_new),
            Step("stop", self._stop_old, self._start_old),
            Step("check", self.machine.check_delta),
            Step("architecture", self._take_new, self._take_old),
            Step("boot", self.machine.boot, self.machine.end_run),
            Step("running", self._running, commits=True),
        )

    async def _prepare_new(self) -> None:
        """While the machine still runs: whatever the new architecture has to build or verify."""
        new = msgspec.structs.replace(self.arguments.machine, architecture=self.arguments.architecture)
        if self.services.driver(new).needs_guest_pack:
            await self.machine.need_guest_pack()
        await self.machine.verify_layers()

    async def _stop_old(self) -> None:
        await self.machine.driver.stop(self.machine.spec, self.arguments.timeout_seconds)
        await self.machine.forget_run()

    async def _start_old(self) -> None:
        """After a refusal to stop it still runs, and `start` of a running machine is success."""
        await self.machine.boot()
        await self.machine.update(state=State.RUNNING)

    async def _take_new(self) -> None:
        await self.machine.update(architecture=self.arguments.architecture)

    async def _take_old(self) -> None:
        await self.machine.update(architecture=self.arguments.machine.architecture)

    async def _running(self) -> None:
        await self.machine.record_running()
        self.machine.publish("switched", architecture=self.arguments.architecture)


class Pause(MachineProcedure):
    verb = "pause"

    def steps(self) -> tuple[Step, ...]:
        return (Step("pause", self._pause, self._resume), Step("paused", self._paused, commits=True))

    @property
    def _pausable(self) -> Pausable:
        driver = self.machine.driver
        if not isinstance(driver, Pausable):
            raise Unsupported(f"architecture '{driver.name}' cannot pause machines")
        return driver

    async def _pause(self) -> None:
        await self._pausable.pause(self.machine.spec)

    async def _resume(self) -> None:
        await self._pausable.resume(self.machine.spec)

    async def _paused(self) -> None:
        await self.machine.update(state=State.PAUSED)
        self.machine.publish("paused")


class Resume(Pause):
    verb = "resume"

    def steps(self) -> tuple[Step, ...]:
        return (Step("resume", self._resume, self._pause), Step("resumed", self._resumed, commits=True))

    async def _resumed(self) -> None:
        await self.machine.update(state=State.RUNNING)
        self.machine.publish("resumed")


class Run(MachineProcedure):
    """A throw-away machine whose command has the caller's input and output; whatever happens, it is removed."""

    verb = "run"

    def __init__(
        self,
        services: Services,
        arguments: MachineArguments,
        stdio: Stdio | None = None,
        terminal: Resize | None = None,
    ) -> None:
        super().__init__(services, arguments)
        self._stdio = stdio
        self._terminal = terminal
        self.exit: Exit | None = None

    def steps(self) -> tuple[Step, ...]:
        return (
            Step("record", self.machine.add_record, self.machine.remove_record),
            Step("delta", self.machine.create_delta, self.machine.remove_delta),
            Step("prepare", self.machine.prepare),
            Step("network", self.machine.plug, self.machine.unplug),
            Step("attach", self._attach, self.machine.end_run),
            Step("remove", self._remove, commits=True),
        )

    async def _attach(self) -> None:
        driver = self.machine.driver
        if not isinstance(driver, Attachable) or self._stdio is None:
            raise Unsupported(f"architecture '{driver.name}' cannot connect a command's input and output")
        await self.machine.make_run_dir()
        await driver.create(self.machine.spec)
        await self.machine.update(state=State.RUNNING, desired=State.RUNNING)
        self.exit = await driver.start_attached(self.machine.spec, self._stdio, self._terminal)

    async def _remove(self) -> None:
        await self.machine.end_run()
        await self.machine.unplug()
        await self.machine.remove_delta()
        await self.machine.remove_record()


MACHINE_PROCEDURES: tuple[type[MachineProcedure], ...] = (
    Create,
    Launch,
    Start,
    Stop,
    Kill,
    Restart,
    Settle,
    Delete,
    Rename,
    Switch,
    Pause,
    Resume,
    Run,
)
