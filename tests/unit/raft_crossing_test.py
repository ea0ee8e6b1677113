"""Calls between two loops share wake-ups and lose none; deadlines share a timer and each is kept."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from functools import partial

import pytest

from caserver.raft.crossing import Answers, Deadlines, Mailbox

GENEROUS = 30.0


async def test_what_other_threads_put_runs_on_the_loop_in_their_order() -> None:
    seen: list[int] = []
    done = asyncio.Event()
    mailbox = Mailbox(asyncio.get_running_loop())

    def put_many() -> None:
        for number in range(5000):
            mailbox.put(seen.append, number)
        mailbox.put(done.set)

    threading.Thread(target=put_many).start()
    await asyncio.wait_for(done.wait(), GENEROUS)
    assert seen == list(range(5000))


async def test_calls_put_together_share_one_wake_up(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    wake_ups: list[object] = []
    original = loop.call_soon_threadsafe

    def counted(call: Callable[..., None]) -> asyncio.Handle:
        wake_ups.append(call)
        return original(call)

    monkeypatch.setattr(loop, "call_soon_threadsafe", counted)
    done = asyncio.Event()
    mailbox = Mailbox(loop)
    for _ in range(10):
        mailbox.put(lambda: None)
    mailbox.put(done.set)
    await done.wait()
    assert len(wake_ups) == 1


async def test_a_call_that_puts_another_is_not_the_last_one() -> None:
    done = asyncio.Event()
    mailbox = Mailbox(asyncio.get_running_loop())
    mailbox.put(mailbox.put, done.set)
    await asyncio.wait_for(done.wait(), GENEROUS)


async def test_a_call_that_raises_holds_up_nobody() -> None:
    loop = asyncio.get_running_loop()
    reported: list[object] = []
    loop.set_exception_handler(lambda _, context: reported.append(context.get("exception")))
    done = asyncio.Event()
    mailbox = Mailbox(loop)
    fault = ValueError("a defect")
    mailbox.put(partial(_raise, fault))
    mailbox.put(done.set)
    await asyncio.wait_for(done.wait(), GENEROUS)
    assert reported == [fault]


def _raise(fault: Exception) -> None:
    raise fault


def test_putting_into_a_closed_loop_is_harmless() -> None:
    loop = asyncio.new_event_loop()
    mailbox = Mailbox(loop)
    loop.close()
    mailbox.put(print)


async def test_each_deadline_is_told_once_and_those_dropped_never() -> None:
    told: list[tuple[str, str | None]] = []
    over = asyncio.Event()
    deadlines = Deadlines(asyncio.get_running_loop())

    def give_up(name: str, reason: str | None) -> None:
        told.append((name, reason))
        if name == "last":
            over.set()

    for name, seconds in (("later", 600.0), ("last", 0.02), ("dropped", 0.01), ("first", 0.0)):
        deadlines.add(name, seconds, partial(give_up, name))
    assert deadlines.drop("dropped")
    await asyncio.wait_for(over.wait(), GENEROUS)
    assert told == [("first", None), ("last", None)]
    assert not deadlines.drop("first")
    deadlines.give_up_all("stopped")
    assert told[2:] == [("later", "stopped")]
    assert len(deadlines) == 0


async def test_a_deadline_before_the_next_one_is_kept() -> None:
    deadlines = Deadlines(asyncio.get_running_loop())
    near, following = asyncio.Event(), asyncio.Event()
    deadlines.add("far", 600.0, lambda _: None)
    deadlines.add("near", 0.0, lambda _: near.set())
    await asyncio.wait_for(near.wait(), GENEROUS)
    deadlines.add("following", 0.0, lambda _: following.set())
    await asyncio.wait_for(following.wait(), GENEROUS)
    assert len(deadlines) == 1


async def test_an_answer_comes_from_another_thread_or_not_at_all() -> None:
    answers = Answers(asyncio.get_running_loop())
    answered = answers.expect(GENEROUS, lambda _: "nothing")
    late = answers.expect(0.0, lambda reason: reason or "no answer in time")
    stopped = answers.expect(GENEROUS, lambda reason: reason or "no answer in time")
    threading.Thread(target=answers.put, args=(answered, "here")).start()
    assert await answered == "here"
    assert await late == "no answer in time"
    answers.put(late, "too late")
    answers.forget(answered)
    answers.give_up_all("the other side has ended")
    assert await stopped == "the other side has ended"
    assert late.result() == "no answer in time"
