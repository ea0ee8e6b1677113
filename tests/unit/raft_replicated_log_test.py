"""One node's log on a real loop; peers, where there are any, are silent or a table of engines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import structlog.testing

from caserver.environment import InlineWorkers
from caserver.errors import Corrupt, NotLeader
from caserver.raft.ports import Committed, Leadership, Message, NotCommitted, OutcomeUnknown
from caserver.raft.replicated_log import ReplicatedLog
from tests.testkit.raftlab import Lab, Register, corrupting

Log = ReplicatedLog[str, tuple[str, ...], int]
State = tuple[str, ...]


class _Silence:
    def __init__(self) -> None:
        self.closed = False

    def send(self, peer: str, message: Message) -> bool:
        return True

    def connected(self, peer: str) -> bool:
        return True

    def close(self) -> None:
        self.closed = True


class _LoopClock:
    """The lab's clock, with sleeping that yields."""

    def __init__(self, lab: Lab) -> None:
        self.now, self.monotonic = lab.clock.now, lab.clock.monotonic
        self.slept = 0

    async def sleep(self, seconds: float) -> None:
        self.slept += 1
        await asyncio.sleep(0)


def _length(state: State, _: Leadership) -> int:
    return len(state)


def _term(_: State, leadership: Leadership) -> int:
    return leadership.term


def _links(_: State, leadership: Leadership) -> tuple[tuple[str, bool], ...]:
    return tuple(sorted(leadership.peers.items()))


def _started(
    lab: Lab, name: str = "A", *, before_change: Callable[[], None] = lambda: None, clock: _LoopClock | None = None
) -> tuple[Log, _Silence]:
    node, network = lab[name], _Silence()
    log: Log = ReplicatedLog(node.machine, clock=clock or _LoopClock(lab), workers=InlineWorkers())
    log.start(node.engine, network, before_change=before_change)
    return log, network


def _leader_of_three(machine: Callable[[], Register] = Register) -> Lab:
    lab = Lab("ABC", machine=machine)
    lab.elect("A")
    lab.run(0.1)
    return lab


async def test_a_committed_command_returns_what_apply_returned():
    log, _ = _started(Lab("A"))
    assert [await log.propose("x"), await log.propose("y")] == [Committed(1), Committed(2)]
    assert log.state == ("x", "y")
    log.stop()


async def test_commands_of_one_turn_are_committed_in_the_order_of_their_calls():
    log, _ = _started(Lab("A"))
    outcomes = await asyncio.gather(*(log.propose(f"{number}") for number in range(20)))
    assert outcomes == [Committed(number + 1) for number in range(20)]
    log.stop()


async def test_a_command_that_no_majority_confirms_in_time_is_unknown():
    log, _ = _started(_leader_of_three())
    outcome = await log.propose("x", deadline=0.05)
    assert isinstance(outcome, OutcomeUnknown)
    assert "0.05 s" in outcome.reason
    log.stop()


async def test_a_barrier_that_no_majority_confirms_in_time_is_not_proven():
    log, _ = _started(_leader_of_three())
    with pytest.raises(NotLeader, match="no majority"):
        await log.barrier(deadline=0.05)
    log.stop()


async def test_a_leader_says_that_it_is_sure_of_nothing_before_another_one_is_told_to_lead():
    lab = _leader_of_three()
    lab["A"].engine.barrier(lambda _: None)
    lab.run(0.01)
    log, _ = _started(lab)
    assert log.leadership.fresh_until > lab.clock.elapsed
    lab.wire.clear()
    moving = asyncio.ensure_future(log.transfer_leadership("B"))
    while not moving.done() and log.leadership.fresh_until > lab.clock.elapsed:
        assert "timeout_now" not in {each["type"] for each in lab.wire.queues[("A", "B")]}
        await asyncio.sleep(0)
    assert "timeout_now" not in {each["type"] for each in lab.wire.queues[("A", "B")]}
    moving.cancel()
    log.stop()


async def test_a_link_that_breaks_wakes_who_watches_the_links():
    log, _ = _started(_leader_of_three())
    told: list[Leadership] = []
    seen = _links(log.state, log.leadership)
    waiting = asyncio.ensure_future(log.changed(_links, seen))
    await asyncio.sleep(0)
    told.append(log.leadership)
    log.link("B", False)
    now = await asyncio.wait_for(waiting, 10)
    told.append(log.leadership)
    log.stop()

    assert (dict(seen)["B"], dict(now)["B"]) == (True, False)
    assert told[0] == told[1]  # who leads is the same


async def test_what_waits_when_the_log_stops_is_told():
    log, network = _started(_leader_of_three())
    proposal, barrier = asyncio.ensure_future(log.propose("x")), asyncio.ensure_future(log.barrier())
    await asyncio.sleep(0.01)
    log.stop()
    assert isinstance(await proposal, OutcomeUnknown)
    with pytest.raises(NotLeader):
        await barrier
    assert network.closed
    assert isinstance(await log.propose("y"), NotCommitted)
    with pytest.raises(NotLeader):
        await log.barrier()
    assert log.leadership.leader is None


async def test_a_caller_who_gives_up_harms_nobody_else():
    lab = Lab("A")
    log, _ = _started(lab)
    given_up, kept = asyncio.ensure_future(log.propose("x")), asyncio.ensure_future(log.propose("y"))
    await asyncio.sleep(0)
    given_up.cancel()
    with pytest.raises(asyncio.CancelledError):
        await given_up
    assert isinstance(await kept, Committed)
    assert not log._pending
    log.stop()


async def test_a_failing_engine_stops_the_log_and_tells_why():
    log, network = _started(Lab("A", machine=lambda: Register(fail=corrupting)))
    outcome = await log.propose("poison")
    assert isinstance(outcome, OutcomeUnknown)
    assert network.closed
    with pytest.raises(Corrupt, match="cannot read this"):
        await log.failed


async def test_a_failing_disk_stops_the_log_before_anything_is_acknowledged():
    lab = Lab("A")
    log, _ = _started(lab)

    def full(operation: str, name: str) -> None:
        raise OSError(28, "No space left on device")

    lab["A"].disk._before_change = full
    assert isinstance(await log.propose("x"), OutcomeUnknown)
    assert log.failed.done()
    assert "No space left" in str(log.failed.exception())


async def test_a_refusal_before_a_change_is_shown_stops_the_log_and_shows_nothing():
    def refuse() -> None:
        raise Corrupt("another cluster's state")

    log, _ = _started(Lab("A"), before_change=refuse)
    await log.propose("x")
    with pytest.raises(Corrupt, match="another cluster"):
        await log.failed


async def test_a_defect_in_a_message_handler_never_reaches_the_network():
    log, _ = _started(_leader_of_three())
    log.receive("B", {"type": "next_node_idx"})  # the schema would not let this through
    assert isinstance(log.failed.exception(), KeyError)


async def test_waiters_wake_when_their_selection_differs_and_only_then():
    log, _ = _started(Lab("A"))
    length = asyncio.ensure_future(log.changed(_length, 0))
    term = asyncio.ensure_future(log.changed(_term, log.leadership.term))
    await asyncio.sleep(0)
    await log.propose("x")
    assert await length == 1
    assert not term.done()
    term.cancel()
    log.stop()


async def test_a_selection_that_differs_already_returns_at_once():
    log, _ = _started(Lab("A"))
    assert await log.changed(_length, 7) == 0
    log.stop()


async def test_a_selector_runs_once_per_batch_however_many_wait_on_it():
    log, _ = _started(Lab("A"))
    calls: list[int] = []

    def counting(state: State, _: Leadership) -> int:
        calls.append(len(state))
        return len(state)

    waiters = [asyncio.ensure_future(log.changed(counting, 0)) for _ in range(100)]
    await asyncio.sleep(0)
    calls.clear()
    await asyncio.gather(log.propose("x"), log.propose("y"))
    assert await asyncio.gather(*waiters) == [2] * 100
    assert calls == [2]
    log.stop()


async def test_a_failing_selector_fails_its_own_waiters_only():
    log, _ = _started(Lab("A"))

    def failing(state: State, _: Leadership) -> int:
        return 0 if not state else 1 // 0

    bad, good = asyncio.ensure_future(log.changed(failing, 0)), asyncio.ensure_future(log.changed(_length, 0))
    await asyncio.sleep(0)
    await log.propose("x")
    assert await good == 1
    with pytest.raises(ZeroDivisionError):
        await bad
    log.stop()


async def test_an_operator_is_told_whom_a_new_cluster_waits_for():
    lab = Lab("ABC", founded=False)
    lab.link("A", "B")
    lab.settle()
    log, _ = _started(lab)
    lab.clock.elapsed += 6
    with structlog.testing.capture_logs() as lines:
        log.link("C", up=False)
        await asyncio.sleep(0.01)
    (told,) = [each["reason"] for each in lines if each["event"] == "not_founded"]
    assert told.endswith("not yet: C (not heard from since this node started)")
    assert told == log.leadership.obstacle
    log.stop()


async def test_a_snapshot_is_written_in_slices_between_other_work():
    lab = Lab("A", snapshot_every=100)
    clock = _LoopClock(lab)
    log, _ = _started(lab, clock=clock)
    for number in range(120):
        await log.propose(f"{number}")
    await log.wait_compacted()
    assert lab["A"].log()[0][0] == 99
    assert clock.slept >= 9  # ten entries to a slice
    disk = lab.crash("A")
    log.stop()
    lab.start("A", disk).engine.tick()
    assert lab["A"].machine.state == log.state


async def test_a_snapshot_that_cannot_be_written_stops_the_log():
    lab = Lab("A", snapshot_every=20)
    log, _ = _started(lab)

    def full(operation: str, name: str) -> None:
        if name == "snapshot":
            raise OSError(28, "No space left on device")

    lab["A"].disk._before_change = full
    for number in range(30):
        await log.propose(f"{number}")
    await log.wait_compacted()
    assert "No space left" in str(log.failed.exception())


async def test_a_snapshot_for_which_there_is_no_descriptor_is_written_later():
    lab = Lab("A", snapshot_every=20)
    log, _ = _started(lab)
    refusals = iter([24, 23, 24])  # EMFILE, ENFILE

    def exhausted(operation: str, name: str) -> None:
        if name == "snapshot" and (number := next(refusals, None)) is not None:
            raise OSError(number, "Too many open files")

    lab["A"].disk._before_change = exhausted
    with structlog.testing.capture_logs() as lines:
        for number in range(30):
            await log.propose(f"{number}")
        await log.wait_compacted()
    assert not log.failed.done()
    assert lab["A"].log()[0][0] > 1
    assert [each["event"] for each in lines].count("snapshot_put_off") == 3
    log.stop()
