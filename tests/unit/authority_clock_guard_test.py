from __future__ import annotations

import pytest

from caserver.authority.clock_guard import ClockGuard
from caserver.errors import Unavailable
from caserver.requests import Caller, ReadAt, ReadIndex
from tests.testkit.fakes import FakeLog, ManualClock
from tests.testkit.nodes import build_node, leading_node, operator_root, running


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
