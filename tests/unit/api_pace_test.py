from __future__ import annotations

import asyncio

from caserver.api.pace import BURST, Pace
from tests.testkit.fakes import ManualClock, settle


def begun(pace: Pace, order: list[str], *addresses: str) -> list[asyncio.Task[None]]:
    async def ask(address: str) -> None:
        await pace.turn(address)
        order.append(address)

    return [asyncio.ensure_future(ask(address)) for address in addresses]


async def test_a_few_at_once_wait_for_nothing() -> None:
    pace, order = Pace(ManualClock(), rate=10.0), list[str]()
    await asyncio.gather(*begun(pace, order, *["a"] * BURST))

    assert order == ["a"] * BURST
    assert pace.waiting == 0


async def test_beyond_that_they_begin_at_the_rate_and_each_address_in_turn() -> None:
    clock, order = ManualClock(), list[str]()
    pace = Pace(clock, rate=10.0)
    tasks = begun(pace, order, *["a"] * (BURST + 5), "b", "b", "c")
    await settle()
    assert order == ["a"] * BURST
    assert pace.waiting == 8

    await clock.advance(0.45)
    assert order[BURST:] == ["a", "b", "c", "a"]
    await clock.advance(0.45)
    await asyncio.gather(*tasks)

    assert order[BURST:] == ["a", "b", "c", "a", "b", "a", "a", "a"]
    assert pace.waiting == 0


async def test_who_goes_away_takes_nobodys_turn() -> None:
    clock, order = ManualClock(), list[str]()
    pace = Pace(clock, rate=10.0)
    await asyncio.gather(*begun(pace, order, *["a"] * BURST))
    first, second = begun(pace, order, "gone", "b")
    await settle()
    first.cancel()
    await clock.advance(0.15)
    await second

    assert order[BURST:] == ["b"]
    assert pace.waiting == 0


async def test_after_a_pause_a_few_may_begin_at_once_again_and_no_more() -> None:
    clock, order = ManualClock(), list[str]()
    pace = Pace(clock, rate=10.0)
    await asyncio.gather(*begun(pace, order, *["a"] * BURST))
    await clock.advance(3600.0)
    tasks = begun(pace, order, *["a"] * (BURST + 1))
    await settle()

    assert len(order) == 2 * BURST
    pace.close()
    assert [task.cancelled() for task in (await asyncio.wait(tasks))[0]].count(True) == 1


async def test_no_rate_is_no_limit() -> None:
    pace, order = Pace(ManualClock(), rate=0.0), list[str]()
    await asyncio.gather(*begun(pace, order, *["a"] * 500))

    assert len(order) == 500


async def test_a_changed_rate_counts_from_then_on() -> None:
    clock, order = ManualClock(), list[str]()
    pace = Pace(clock, rate=0.001)
    tasks = begun(pace, order, *["a"] * (BURST + 3))
    await settle()
    pace.renew(0.0)
    await asyncio.gather(*begun(pace, order, "b"))
    assert order[-1] == "b"
    await clock.advance(1000.0)
    await asyncio.gather(*tasks)
