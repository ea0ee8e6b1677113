from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from structlog.testing import capture_logs

from caserver.authority.clock_guard import LOOK_EVERY, ClockGuard
from caserver.errors import CommitUnknown, Unavailable
from caserver.requests import Caller, ReadAt, ReadIndex
from caserver.state.commands import ActivateRoot, ExpireLeaves, ProviderRetired, PruneRoots
from tests.testkit.fakes import FakeLog, ManualClock, settle
from tests.testkit.nodes import DAY, build_node, leading_node, operator_root, running


async def test_time_that_passes_is_no_reason_for_doubt() -> None:
    clock = ManualClock()
    guard = ClockGuard(FakeLog(), clock)
    for seconds in (0, 1, 59, 3600, 86400):
        clock.jump(seconds)
        assert guard.fault() is None


@pytest.mark.parametrize("seconds", [31, -31, 86400])
async def test_a_jump_of_the_wall_clock_is_doubted_for_a_steady_minute(seconds: float) -> None:
    clock = ManualClock()
    guard = ClockGuard(FakeLog(), clock)
    assert guard.fault() is None
    clock.jump(10)
    clock.set_wall(seconds)
    assert f"{seconds:+.0f} s" in (guard.fault() or "")
    clock.jump(59)
    assert guard.fault() is not None
    clock.jump(1)
    assert guard.fault() is None


async def test_small_steps_that_add_up_within_a_minute_are_seen() -> None:
    clock = ManualClock()
    guard = ClockGuard(FakeLog(), clock)
    faults = []
    for _ in range(4):
        faults.append(guard.fault())
        clock.jump(10)
        clock.set_wall(11)
    assert faults[:3] == [None, None, None]
    assert faults[3] is not None


async def test_a_slow_correction_is_no_reason_for_doubt() -> None:
    clock = ManualClock()
    guard = ClockGuard(FakeLog(), clock)
    for _ in range(100):
        clock.jump(30)
        clock.set_wall(1)
        assert guard.fault() is None


async def test_a_clock_off_the_majoritys_is_doubted_until_it_agreed_for_a_minute() -> None:
    clock, log = ManualClock(), FakeLog()
    guard = ClockGuard(log, clock)
    log.clock_offset = -45.0
    assert "-45 s" in (guard.fault() or "")
    clock.jump(100)
    assert guard.fault() is not None
    log.clock_offset = 2.0
    assert guard.fault() is not None
    clock.jump(60)
    assert guard.fault() is None


async def test_a_doubtful_clock_stops_signing_and_changing_but_no_reading() -> None:
    async with leading_node() as node:
        await node.sign("web")
        node.clock.set_wall(3600)
        for attempt in (node.sign("web"), node.configure(operator_root("ec-256"))):
            with pytest.raises(Unavailable, match="jumped"):
                await attempt
        assert ("ClockSkew" in dict(node.authority.degraded)) is True
        assert await node.authority.execute(Caller(), ReadIndex()) == ReadAt(node.state.index)
        await node.clock.advance(61)
        assert node.authority.degraded == ()
        assert await node.sign("web")


async def test_a_doubtful_clock_neither_prunes_nor_expires() -> None:
    async with leading_node() as node:
        await node.sign("web")
        await node.configure({**operator_root("ec-256"), "CSRMaxPerSecond": 0})
        await node.clock.advance(30)
        node.clock.set_wall(365 * 24 * 3600)
        await node.clock.advance(55)
        assert len(node.state.roots) == 2
        assert node.state.ledger.row_count == 1


async def test_no_root_is_made_by_a_doubtful_clock() -> None:
    log = FakeLog()
    log.clock_offset = 500.0
    async with running(build_node(log)) as node:
        await node.clock.advance(30)
        assert node.state.roots == ()
        log.clock_offset = 0.0
        await node.clock.advance(300)
        assert len(node.state.roots) == 1


@asynccontextmanager
async def watched(log: FakeLog, clock: ManualClock) -> AsyncIterator[tuple[ClockGuard, list[str]]]:
    """A guard that looks by itself, and the hand-overs that it asked for."""
    guard, asked = ClockGuard(log, clock), list[str]()

    async def hand_over() -> bool:
        asked.append("handed over")
        log.step_down()
        return True

    task = asyncio.get_running_loop().create_task(guard.watch(hand_over))
    await settle()
    try:
        yield guard, asked
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.mark.parametrize("seconds", [3600.0, -3600.0])
async def test_a_jump_of_long_ago_is_no_reason_for_doubt_when_somebody_comes_to_ask(seconds: float) -> None:
    clock = ManualClock()
    async with watched(FakeLog(), clock) as (guard, asked):
        await clock.advance(100)
        clock.set_wall(seconds)
        await clock.advance(600)
        assert guard.fault() is None
        assert not asked


async def test_the_log_says_when_doubt_begins_and_when_it_ends() -> None:
    clock = ManualClock()
    with capture_logs() as logs:
        async with watched(FakeLog(), clock):
            clock.set_wall(100)
            await clock.advance(300)

    assert [entry["event"] for entry in logs] == ["the clock is not trusted", "the clock is trusted again"]
    assert "+100 s" in logs[0]["reason"]


async def test_a_leader_that_is_off_the_others_hands_leadership_over() -> None:
    log, clock = FakeLog(), ManualClock()
    async with watched(log, clock) as (guard, asked):
        log.clock_offset = 40.0
        await clock.advance(10 * LOOK_EVERY)
        assert asked == ["handed over"]
        assert guard.fault() is not None


async def test_of_two_leaders_whose_clocks_differ_neither_hands_leadership_to_the_other() -> None:
    log, clock = FakeLog(), ManualClock()
    log.clock_offset, log.outvoted = 40.0, False
    async with watched(log, clock) as (guard, asked):
        await clock.advance(10 * LOOK_EVERY)
        assert not asked
        assert guard.fault() is not None


async def test_a_leader_that_jumped_with_all_others_keeps_leading() -> None:
    log, clock = FakeLog(), ManualClock()
    async with watched(log, clock) as (guard, asked):
        clock.set_wall(500)
        await clock.advance(LOOK_EVERY)
        assert guard.fault() is not None
        await clock.advance(120)
        assert guard.fault() is None
        assert not asked


async def test_a_leader_with_a_doubtful_clock_leaves_the_change_of_a_former_leader_alone() -> None:
    clock = ManualClock()
    former = build_node(FakeLog("a"), clock=clock)
    off = ManualClock()
    off.set_wall(30 * DAY)
    doubtful = build_node(former.log.elsewhere("b"), clock=off, seed=2)
    doubtful.log.clock_offset = 30.0 * DAY
    async with running(former), running(doubtful):
        former.log.hold(ActivateRoot)
        change = asyncio.ensure_future(former.configure({**operator_root("ec-256"), "CSRMaxPerSecond": 0}))
        await settle()
        doubtful.log.become_leader()
        await settle()
        assert former.state.change is not None
        assert len(former.state.roots) == 1
        assert "off those of the other servers" in dict(doubtful.authority.degraded)["CATrouble"]
        former.log.release()
        with pytest.raises(Unavailable):
            await change
        former.log.become_leader()
        await settle()
        assert former.state.change is None
        assert len(former.state.roots) == 2
        assert await former.sign("web")


@pytest.mark.parametrize("jump", [30 * DAY, -30 * DAY])
@pytest.mark.parametrize("step", ["committed BeginChange", "provider prepare", "prepared", "cross-signed"])
async def test_a_clock_that_jumps_while_a_root_is_made_keeps_it_from_being_activated(step: str, jump: float) -> None:
    async with leading_node() as node:
        node.control.tripwire.arm_at(step, lambda: node.clock.set_wall(jump))
        with pytest.raises(CommitUnknown, match="jumped"):
            await node.configure({"PrivateKeyBits": 384, "CSRMaxPerSecond": 0}, request_id="r1")
        assert len(node.state.roots) == 1
        assert node.state.change is not None
        node.clock.set_wall(-jump)
        await node.clock.advance(90)
        root = node.state.active_root
        assert root is not None
        assert root.key_bits == 384
        assert root.not_before <= node.clock.now().timestamp()


async def test_a_node_that_has_just_started_removes_nothing_before_it_watched_its_clock_for_a_minute() -> None:
    former = build_node(FakeLog("a"))
    off = ManualClock()
    off.set_wall(30 * DAY)
    started = build_node(former.log.elsewhere("b"), clock=off, seed=2)
    async with running(former):
        (leaf,) = await former.sign("web")
        await former.configure({**operator_root("ec-256"), "CSRMaxPerSecond": 0})
        async with running(started):
            started.log.become_leader()
            await started.clock.advance(20)
            started.clock.set_wall(-30 * DAY)  # corrected soon after the start, as is usual
            await started.clock.advance(300)
            assert started.state.root(leaf.root_id) is not None
            assert started.state.ledger.row_count == 1
            assert started.log.applied(PruneRoots) == started.log.applied(ExpireLeaves) == []
            assert started.log.applied(ProviderRetired) != []


async def test_a_clock_that_stayed_steady_from_the_start_lets_what_is_due_be_removed() -> None:
    former = build_node(FakeLog("a"))
    later = ManualClock()
    later.set_wall(30 * DAY)
    started = build_node(former.log.elsewhere("b"), clock=later, seed=2)
    async with running(former):
        await former.configure({**operator_root("ec-256"), "CSRMaxPerSecond": 0})
        async with running(started):
            started.log.become_leader()
            await started.clock.advance(59)
            assert len(started.state.roots) == 2
            assert started.log.applied(ProviderRetired) == []
            await started.clock.advance(10)
            assert len(started.state.roots) == 1
