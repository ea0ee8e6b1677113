import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from caserver.errors import (
    CaserverError,
    CommitFailed,
    CommitUnknown,
    Conflict,
    NoLeader,
    NotInitialized,
    NotLeader,
    RateLimited,
    Unavailable,
)
from caserver.fields import Secret
from caserver.forwarding.leader import Leader, Patience
from caserver.requests import (
    Answer,
    Caller,
    ChangeConfiguration,
    ConfigurationChanged,
    Failure,
    LeavesSigned,
    ReadAt,
    ReadIndex,
    Request,
    SignLeaves,
    decode_request,
    encode_answer,
)
from tests.testkit.fakes import FakeLog, ManualClock, SeededEntropy, settle

SIGN = SignLeaves(csrs=("pem",))
CHANGE = ChangeConfiguration(body="{}")
CALLER = Caller(token=Secret("t"), source="n1 10.0.0.1:5")
SIGNED = LeavesSigned(())
CHANGED = ConfigurationChanged(index=9, rotated=False)

Step = Answer | CaserverError | Callable[[], Awaitable[Answer]]


class Script:
    """Answers one call after the other, the last one for ever; keeps who asked for what."""

    def __init__(self, *steps: Step) -> None:
        self._steps = list(steps)
        self.seen: list[tuple[Caller, Request]] = []

    async def __call__(self, caller: Caller, request: Request) -> Answer:
        self.seen.append((caller, request))
        step = self._steps.pop(0) if len(self._steps) > 1 else self._steps[0]
        if isinstance(step, CaserverError):
            raise step
        return await step() if callable(step) else step


class ScriptedHop:
    """The other end of the hop follows a script; errors of the hop itself are ``broken``."""

    def __init__(self, script: Script, broken: list[CaserverError] | None = None) -> None:
        self._script = script
        self._broken = broken or []
        self.nodes: list[str] = []

    async def send(self, node: str, frame: bytes, deadline: float) -> bytes:
        self.nodes.append(node)
        if self._broken:
            raise self._broken.pop(0)
        try:
            return encode_answer(await self._script(*decode_request(frame)))
        except CaserverError as exc:
            return encode_answer(exc)


class Node:
    """A Leader with everything around it scripted."""

    def __init__(
        self,
        *,
        local: Script | None = None,
        remote: Script | None = None,
        broken: list[CaserverError] | None = None,
        patience: Patience | None = None,
    ) -> None:
        self.clock = ManualClock()
        self.other = FakeLog("n2", leader=remote is not None)
        self.log = self.other.elsewhere("n1")
        if remote is None:
            self.log.become_leader()
        self.local = local or Script(SIGNED)
        self.hop = ScriptedHop(remote or Script(SIGNED), broken)
        self.leader = Leader(
            self.log, execute=self.local, hop=self.hop, clock=self.clock, entropy=SeededEntropy(), patience=patience
        )


async def outcome(node: Node, request: Request, *, seconds: float = 8.0) -> Answer | CaserverError:
    task = asyncio.ensure_future(node.leader.execute(CALLER, request))
    passed = 0.0
    while not task.done() and passed < seconds:
        await node.clock.advance(0.25)
        passed += 0.25
    assert task.done(), "the call is still held"
    error = task.exception()
    assert error is None or isinstance(error, CaserverError)
    return error or task.result()


@pytest.mark.parametrize("here", [True, False])
async def test_leaves_that_took_longer_than_a_signature_may_are_dropped(here: bool) -> None:
    late = LeavesSigned((Failure(kind="Unavailable", detail="late"),))

    async def paused() -> Answer:
        node.clock.jump(5.1)  # the process that signed stood still between the signature and the answer
        return late

    script = Script(paused, SIGNED)
    node = Node(local=script) if here else Node(remote=script)

    assert await outcome(node, SIGN) == SIGNED
    assert len(script.seen) == 2


async def test_a_change_may_take_longer_than_a_signature() -> None:
    async def slow() -> Answer:
        node.clock.jump(30.0)
        return CHANGED

    node = Node(local=Script(slow))

    assert await outcome(node, CHANGE) == CHANGED


async def test_the_leader_does_it_itself() -> None:
    node = Node(local=Script(SIGNED))

    assert await node.leader.execute(CALLER, SIGN) == SIGNED
    assert node.hop.nodes == []


async def test_a_follower_sends_it_one_hop_with_token_and_request_id() -> None:
    remote = Script(SIGNED)
    node = Node(remote=remote)

    assert await node.leader.execute(CALLER, SIGN) == SIGNED
    caller, request = remote.seen[0]
    assert (node.hop.nodes, request, caller.token, caller.source) == (["n2"], SIGN, CALLER.token, CALLER.source)
    assert len(caller.request_id) == 32


async def test_a_given_request_id_is_kept() -> None:
    remote = Script(CHANGED)
    node = Node(remote=remote)
    await node.leader.execute(Caller(request_id="abc"), CHANGE)

    assert remote.seen[0][0].request_id == "abc"


@pytest.mark.parametrize(
    "error", [Conflict("x"), RateLimited("Rate limit reached, try again later"), CaserverError("internal error")]
)
async def test_a_refusal_reaches_the_caller_at_once(error: CaserverError) -> None:
    node = Node(remote=Script(error))

    assert type(await outcome(node, SIGN, seconds=0.25)) is type(error)


async def test_without_a_leader_a_call_waits_for_the_next_one() -> None:
    node = Node(local=Script(SIGNED))
    node.log.step_down()
    task = asyncio.ensure_future(node.leader.execute(CALLER, SIGN))
    await node.clock.advance(3.0)

    assert not task.done()
    node.log.become_leader()
    await settle()
    assert task.result() == SIGNED


async def test_after_seven_seconds_without_a_leader_the_call_ends() -> None:
    node = Node()
    node.log.step_down()

    assert isinstance(await outcome(node, SIGN), NoLeader)
    assert node.clock.monotonic() <= 7.5


@pytest.mark.parametrize(
    "first", [NotLeader("moved"), CommitFailed("lost"), NotInitialized("soon"), CommitUnknown("?")]
)
async def test_what_a_fail_over_causes_is_tried_again_with_the_same_id(first: CaserverError) -> None:
    remote = Script(first, first, SIGNED)
    node = Node(remote=remote)

    assert await outcome(node, SIGN) == SIGNED
    assert len({caller.request_id for caller, _ in remote.seen}) == 1


@pytest.mark.parametrize("last", [NotInitialized("no root"), CommitFailed("lost")])
async def test_the_reason_that_stays_is_told(last: CaserverError) -> None:
    node = Node(local=Script(last))

    assert type(await outcome(node, SIGN)) is type(last)


async def test_an_unreachable_leader_is_tried_again() -> None:
    node = Node(remote=Script(SIGNED), broken=[NotLeader("n2 cannot be reached")] * 3)

    assert await outcome(node, SIGN) == SIGNED
    assert node.hop.nodes == ["n2"] * 4


async def test_a_change_whose_reply_was_lost_is_repeated_under_its_id() -> None:
    remote = Script(CHANGED)
    node = Node(remote=remote, broken=[CommitUnknown("n2 did not answer")])

    assert await outcome(node, CHANGE) == CHANGED
    assert len(remote.seen) == 1


async def test_a_change_that_stays_open_ends_as_unknown() -> None:
    node = Node(remote=Script(NotLeader("moved")), broken=[CommitUnknown("n2 did not answer")])

    assert isinstance(await outcome(node, CHANGE), CommitUnknown)


async def test_a_refusal_after_an_open_outcome_does_not_hide_it() -> None:
    node = Node(remote=Script(Conflict("the configuration is at index 9")), broken=[CommitUnknown("n2 did not answer")])

    assert isinstance(await outcome(node, CHANGE), CommitUnknown)


async def test_a_compare_and_set_that_lost_is_told_so_after_an_open_outcome() -> None:
    """The authority looks for the first effect and compares in one state: it is certain that there was and will be none."""
    lost = Conflict("the configuration is at index 9, not 7")
    node = Node(remote=Script(lost), broken=[CommitUnknown("n2 did not answer")])

    answer = await outcome(node, replace(CHANGE, cas=7))

    assert isinstance(answer, Conflict)
    assert answer.detail == lost.detail


async def test_signing_whose_outcome_stays_open_ends_as_no_leader() -> None:
    node = Node(local=Script(CommitUnknown("?")))

    assert isinstance(await outcome(node, SIGN), NoLeader)


async def test_a_silent_leader_is_given_up_when_another_is_elected() -> None:
    silence = asyncio.Event()

    async def never() -> Answer:
        await silence.wait()
        return SIGNED

    node = Node(local=Script(SIGNED), remote=Script(never), patience=Patience(suspicion=0.0))
    task = asyncio.ensure_future(node.leader.execute(CALLER, SIGN))
    await settle()

    assert not task.done()
    node.log.become_leader()
    await node.clock.advance(1.0)
    assert task.result() == SIGNED


async def test_only_so_many_calls_are_held() -> None:
    node = Node(patience=Patience(held_max=2))
    node.log.step_down()
    tasks = [asyncio.ensure_future(node.leader.execute(CALLER, SIGN)) for _ in range(3)]
    await settle()

    assert [task.done() for task in tasks] == [False, False, True]
    assert isinstance(tasks[2].exception(), Unavailable)
    node.log.become_leader()
    assert await asyncio.gather(*tasks[:2]) == [SIGNED, SIGNED]
    assert await node.leader.execute(CALLER, SIGN) == SIGNED


async def test_only_so_many_bytes_are_held() -> None:
    node = Node(patience=Patience(held_bytes_max=5))
    node.log.step_down()

    with pytest.raises(Unavailable, match="too many calls"):
        await node.leader.execute(CALLER, SignLeaves(csrs=("x" * 6,)))


async def test_reads_that_arrive_together_share_a_round() -> None:
    gate = asyncio.Event()

    async def slow() -> Answer:
        await gate.wait()
        return ReadAt(5)

    remote = Script(slow, ReadAt(6))
    node = Node(remote=remote)
    first = [asyncio.ensure_future(node.leader.execute(CALLER, ReadIndex())) for _ in range(5)]
    await settle()
    later = [asyncio.ensure_future(node.leader.execute(CALLER, ReadIndex())) for _ in range(5)]
    await settle()
    gate.set()

    assert await asyncio.gather(*first) == [ReadAt(5)] * 5
    assert await asyncio.gather(*later) == [ReadAt(6)] * 5
    assert len(remote.seen) == 2


async def test_a_consistent_read_does_not_share_with_a_plain_one() -> None:
    remote = Script(ReadAt(5))
    node = Node(remote=remote)
    await asyncio.gather(
        node.leader.execute(CALLER, ReadIndex()), node.leader.execute(CALLER, ReadIndex(consistent=True))
    )

    assert [request for _, request in remote.seen] == [ReadIndex(), ReadIndex(consistent=True)]


async def test_a_read_that_gives_up_does_not_take_the_others_along() -> None:
    gate = asyncio.Event()

    async def slow() -> Answer:
        await gate.wait()
        return ReadAt(5)

    node = Node(remote=Script(slow))
    first, second = (asyncio.ensure_future(node.leader.execute(CALLER, ReadIndex())) for _ in range(2))
    await settle()
    first.cancel()
    await settle()
    gate.set()

    assert await second == ReadAt(5)
