"""What a node answers itself: from its own copy, which catches up before anybody is refused."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest

from caserver.acl import OPERATOR_READ
from caserver.errors import NoLeader, PermissionDenied
from caserver.fields import Secret
from caserver.node_gate import CATCH_UP, NodeGate
from caserver.requests import Caller, ReadAt, ReadIndex
from caserver.state.acl import Token
from caserver.state.commands import Bootstrap
from tests.testkit.fakes import FakeLog, ManualClock, settle
from tests.testkit.states import CLUSTER_ID, HMAC_KEY, NOW, stored

CALLER = Caller(token=Secret("t"), source="n2 x")


class Knows:
    """Refuses until this node's state has moved."""

    def __init__(self, log: FakeLog) -> None:
        self._log = log

    def refusal(self, caller: Caller, permission: object) -> PermissionDenied | None:
        return None if permission is None or self._log.state.index else PermissionDenied("ACL not found")

    def accessor(self, caller: Caller) -> str:
        return "a1"

    def token(self, caller: Caller) -> Token | None:
        return None


class Asked:
    """The leader, asked for its index."""

    def __init__(self, answer: ReadAt | Exception) -> None:
        self.answer = answer
        self.requests: list[object] = []
        self.hang = False

    async def execute(self, caller: Caller, request: object) -> ReadAt:
        self.requests.append(request)
        if self.hang:
            await asyncio.Event().wait()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class Rig:
    def __init__(self, *, answer: ReadAt | Exception = ReadAt(1), down_deny: bool = False) -> None:  # noqa: B008
        self.leading, self.clock = FakeLog("n1"), ManualClock()
        self.log = self.leading.elsewhere("n2")
        self.asked = Asked(answer)
        self.gate = NodeGate(
            cast("Any", Knows(self.log)), self.log, cast("Any", self.asked), clock=self.clock, down_deny=down_deny
        )

    def start(self, caller: Caller = CALLER) -> asyncio.Task[None]:
        return asyncio.ensure_future(self.gate.require(caller, OPERATOR_READ, operation="GET /x"))

    def catch_up(self) -> None:
        self.leading.commit(Bootstrap(NOW, CLUSTER_ID, stored(), HMAC_KEY))


async def test_a_token_that_this_node_does_not_know_yet_is_not_refused_before_it_has_caught_up() -> None:
    rig = Rig()
    waiting = rig.start()
    await settle()
    assert not waiting.done()

    rig.catch_up()
    await waiting
    assert rig.asked.requests == [ReadIndex()]


@pytest.mark.parametrize("answer", [ReadAt(0), NoLeader()])
async def test_what_is_refused_by_a_fresh_copy_is_refused(answer: ReadAt | Exception) -> None:
    with pytest.raises(PermissionDenied):
        await Rig(answer=answer).start()


async def test_a_leader_that_does_not_answer_holds_a_refusal_up_for_a_moment_only() -> None:
    rig = Rig()
    rig.asked.hang = True
    waiting = rig.start()
    await settle()
    assert not waiting.done()

    await rig.clock.advance(CATCH_UP)
    with pytest.raises(PermissionDenied):
        await waiting


async def test_who_shows_no_token_asks_nothing_of_the_leader() -> None:
    rig = Rig()

    with pytest.raises(PermissionDenied):
        await rig.start(Caller())
    assert rig.asked.requests == []


async def test_the_leader_knows_without_asking() -> None:
    rig = Rig()
    rig.log.become_leader()

    with pytest.raises(PermissionDenied):
        await rig.start()
    assert rig.asked.requests == []


async def test_without_a_leader_the_copy_decides_unless_it_is_told_to_refuse() -> None:
    trusting, careful = Rig(), Rig(down_deny=True)
    for rig in (trusting, careful):
        rig.catch_up()
        await rig.start()
        rig.log.step_down()

    await trusting.start()
    with pytest.raises(PermissionDenied):
        await careful.start()
    await careful.gate.require(CALLER, None, operation="GET /open")
