"""Long sequences of any commands: the machine stays whole, deterministic and readable by every node."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from caserver.state.codec import decode_command
from caserver.state.commands import ActivateRoot, Applied, BeginChange, Command, PruneRoots, Refused
from caserver.state.lifecycle import kept_until, may_prune
from caserver.state.machine import CAStateMachine
from caserver.state.model import CAState
from tests.testkit import states
from tests.testkit.states import (
    DAY,
    NOW,
    ROOT_IDS,
    check_invariants,
    initialized,
    new_root,
    stored,
)

STEPS = settings(max_examples=30, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck))


class Machines(RuleBasedStateMachine):
    """One machine lives on, its twin is dumped and loaded again and again; both see the same commands."""

    @initialize(ready=st.booleans(), max_rows=st.sampled_from([3, 100_000]))
    def start(self, ready: bool, max_rows: int) -> None:
        state = initialized(max_rows=max_rows) if ready else CAState()
        self.machine = CAStateMachine(state)
        self.twin = CAStateMachine(state)

    @rule(command=states.commands)
    def anything(self, command: Command) -> None:
        self._apply(command)

    @rule(data=st.data())
    def something_fitting(self, data: st.DataObject) -> None:
        self._apply(data.draw(states.fitting(self.machine.state)))

    @rule(root_id=st.sampled_from(ROOT_IDS), at=st.integers(NOW, NOW + DAY), owed=st.booleans())
    def rotate(self, root_id: str, at: int, owed: bool) -> None:
        state = self.machine.state
        if state.configuration is None or state.change is not None:
            return
        name = f"rotation at {state.index}"
        wanted = stored(secret=root_id.encode())
        self._apply(BeginChange(name, at, state.configuration.modify_index, state.ca_epoch, wanted))
        self._apply(ActivateRoot(name, at, state.ca_epoch, new_root(root_id), at + 10 if owed else None))
        assert self.machine.state.roots_index == self.machine.state.index

    @rule(days=st.integers(0, 20))
    def prune(self, days: int) -> None:
        state, at = self.machine.state, NOW + days * DAY
        due = tuple(root.id for root in state.roots if may_prune(root, at))
        self._apply(PruneRoots(at, state.ca_epoch, due or tuple(root.id for root in state.roots)))
        assert bool(due) == (self.machine.state is not state) or state.change is not None

    @rule()
    def restart_twin(self) -> None:
        slices = self.twin.dump()
        self.twin = CAStateMachine()
        self.twin.load(b"".join(slices))

    @invariant()
    def twins_agree(self) -> None:
        assert self.machine.state == self.twin.state
        assert b"".join(self.machine.dump()) == b"".join(self.twin.dump())

    @invariant()
    def state_is_whole(self) -> None:
        check_invariants(self.machine.state)

    def _apply(self, command: Command) -> None:
        before = self.machine.state
        data = self.machine.encode(command)
        assert decode_command(data) == command
        result = self.machine.apply(data)
        assert self.twin.apply(data) == result
        self._check_step(command, before, self.machine.state, result)

    def _check_step(self, command: Command, before: CAState, after: CAState, result: object) -> None:
        if isinstance(result, Refused):
            assert after is before
            return
        assert result == Applied(after.index, result.rows if isinstance(result, Applied) else ())
        assert after.index == before.index + 1
        assert after.ca_epoch >= before.ca_epoch
        assert after.roots_index in (before.roots_index, after.index)
        if not before.roots:
            return
        gone = {root.id for root in before.roots} - {root.id for root in after.roots}
        assert not gone or (isinstance(command, PruneRoots) and gone == set(command.root_ids))
        for root in before.roots:
            last = kept_until(root)
            assert root.id not in gone or (last is not None and isinstance(command, PruneRoots) and command.at > last)


Machines.TestCase.settings = STEPS
TestMachines = Machines.TestCase
