from __future__ import annotations

import asyncio
import gc
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from caserver.acl import SERVICE_WRITE
from caserver.environment import within
from caserver.errors import InvalidRequest, NotInitialized, PermissionDenied, RateLimited, Unavailable
from caserver.fields import Secret
from caserver.requests import Answer, Caller, Failure, ReadAt, Request
from caserver.state.model import CAState, Index
from tests.testkit.fakes import ManualClock, settle
from tests.testkit.leaf_rig import CALLER, CLUSTER, LIFE, Rig, running


async def test_a_first_read_makes_a_key_and_has_its_csr_signed() -> None:
    rig = Rig()
    cached = await rig.get("a b")

    assert (cached.hit, cached.age, cached.leaf.service) == (False, 0.0, "a b")
    assert cached.leaf.service_uri == f"spiffe://{CLUSTER}.consul/ns/default/dc/dc1/svc/a%20b"
    assert cached.key_pem.startswith("-----BEGIN EC PRIVATE KEY-----\n")
    assert load_pem_private_key(cached.key_pem.encode(), None).key_size == 256  # type: ignore[union-attr]
    assert rig.signer.callers == [CALLER]


async def test_the_key_shows_in_no_repr() -> None:
    cached = await Rig().get()

    assert "PRIVATE" not in repr(cached)


async def test_a_second_read_is_served_from_memory_with_its_age() -> None:
    rig = Rig()
    first = await rig.get()
    await rig.clock.advance(13.5)
    second = await rig.get()

    assert (second.hit, second.age, second.leaf, second.key_pem) == (True, 13.5, first.leaf, first.key_pem)
    assert rig.signer.count == 1


async def test_reads_of_one_service_share_one_request() -> None:
    rig = Rig()
    rig.signer.gate.clear()
    tasks = [rig.start() for _ in range(20)]
    await settle()
    rig.signer.gate.set()
    leaves = await asyncio.gather(*tasks)

    assert rig.signer.count == 1
    assert len({each.key_pem for each in leaves}) == 1


async def test_the_request_goes_on_when_who_began_it_leaves() -> None:
    rig = Rig()
    rig.signer.gate.clear()
    first, second = rig.start(), rig.start()
    await settle()
    first.cancel()
    await settle()
    rig.signer.gate.set()

    assert (await second).leaf.service == "web"


async def test_a_failure_reaches_everybody_who_waits_and_is_not_kept() -> None:
    rig = Rig()
    rig.signer.failure = RateLimited("Rate limit reached, try again later")
    outcomes = await asyncio.gather(rig.start(), rig.start(), return_exceptions=True)
    rig.signer.failure = None

    assert [type(each) for each in outcomes] == [RateLimited, RateLimited]
    assert (await rig.get()).hit is False


async def test_a_refused_csr_is_raised_as_its_error() -> None:
    rig = Rig()
    rig.signer.as_failure = Failure("InvalidCSR", "no")

    with pytest.raises(InvalidRequest, match=r"^no$"):
        await rig.get()


async def test_an_answer_to_another_question_is_a_bug() -> None:
    rig = Rig()

    async def odd(caller: Caller, request: Request) -> Answer:
        return ReadAt(1)

    rig.signer.execute = odd  # type: ignore[method-assign]
    with pytest.raises(TypeError):
        await rig.get()


@pytest.mark.parametrize("service", ["", "a/b", "a\0b", "x" * 2000])
async def test_a_name_that_cannot_be_signed_is_refused_before_anything_is_made(service: str) -> None:
    rig = Rig()

    with pytest.raises(InvalidRequest):
        await rig.get(service)
    assert rig.signer.count == 0


async def test_a_name_with_a_slash_is_refused_in_consuls_words() -> None:
    expected = f"SPIFFE ID is not in the expected format: spiffe://{CLUSTER}.consul/ns/default/dc/dc1/svc/a/b"

    with pytest.raises(InvalidRequest) as caught:
        await Rig().get("a/b")
    assert caught.value.detail == expected


async def test_a_first_leaf_waits_for_the_bootstrap() -> None:
    rig = Rig()
    bootstrapped = rig.log.state
    rig.log.set(CAState())
    task = rig.start()
    await rig.clock.advance(2.0)
    rig.log.set(bootstrapped)

    assert (await task).leaf.service == "web"


async def test_a_cluster_that_is_not_bootstrapped_in_time_says_so() -> None:
    rig = Rig()
    rig.log.set(CAState())
    task = rig.start()
    await rig.clock.advance(7.5)

    assert isinstance(task.exception(), NotInitialized)


async def test_a_blocking_read_waits_for_the_renewal() -> None:
    async with running() as rig:
        first = await rig.get()
        task = rig.start(after=first.leaf.index, wait=2.0 * LIFE)
        await rig.clock.advance(0.5 * LIFE)

        assert not task.done()
        await rig.clock.advance(0.5 * LIFE)
        renewed = await task
        age = renewed.leaf.not_before - first.leaf.not_before
        assert (renewed.hit, renewed.leaf.index > first.leaf.index) == (False, True)
        assert 0.6 * LIFE <= age <= 0.9 * LIFE + 30


async def test_a_blocking_read_returns_what_is_held_when_its_time_is_over() -> None:
    rig = Rig()
    first = await rig.get()
    task = rig.start(after=first.leaf.index + 1000, wait=2.0)
    await rig.clock.advance(1.9)

    assert not task.done()
    await rig.clock.advance(0.2)
    assert ((await task).leaf, (await task).hit) == (first.leaf, False)


async def test_a_blocking_read_of_an_older_index_returns_at_once() -> None:
    rig = Rig()
    first = await rig.get()
    second = await rig.get(after=first.leaf.index - 1)

    assert (second.hit, second.leaf) == (True, first.leaf)


async def test_renewals_carry_the_token_of_the_last_reader() -> None:
    async with running() as rig:
        await rig.get()
        other = Caller(token=Secret("another"), source="n1 127.0.0.1:10")
        await rig.cache.leaf(other, "web")
        await rig.clock.advance(0.95 * LIFE)

        assert rig.signer.callers == [CALLER, other]


async def test_after_a_rotation_leaves_move_within_the_window_and_not_all_at_once() -> None:
    async with running() as rig:
        for number in range(20):
            await rig.get(f"s{number}")
        rig.log.rotate("r2")
        moved = []
        for _ in range(6):
            await rig.clock.advance(5.0)
            moved.append(rig.signer.count - 20)

        assert moved[-1] == 20
        assert 0 < moved[0] < 20
        assert (await rig.get("s0")).leaf.root_id == "r2"


async def test_until_then_a_plain_read_gets_the_old_leaf_and_a_fresh_one_the_new() -> None:
    rig = Rig()
    old = await rig.get()
    rig.log.rotate("r2")
    held = await rig.get()
    fresh = await rig.get(fresh=True)

    assert (held.hit, held.leaf) == (True, old.leaf)
    assert (fresh.hit, fresh.leaf.root_id) == (False, "r2")
    assert (await rig.get(fresh=True)).hit


async def test_a_fresh_read_does_not_take_the_answer_to_a_request_begun_before_the_rotation() -> None:
    rig = Rig()
    rig.signer.gate.clear()
    rig.signer.root_id = "r1"
    early = rig.start()
    await settle()
    rig.log.rotate("r2")
    late = rig.start(fresh=True)
    await settle()
    rig.signer.gate.set()
    await early
    rig.signer.root_id = None

    assert (await late).leaf.root_id == "r2"


async def test_a_leaf_that_was_dropped_leaves_no_key_in_memory() -> None:
    rig = Rig(max_entries=5)
    for number in range(500):
        await rig.get(f"s{number}")
    gc.collect()
    kept = [each for each in gc.get_objects() if type(each).__name__ == "_Held" and each.leaf.service.startswith("s")]

    assert len(kept) == 5
    assert len(rig.cache._due) < 200


async def test_a_new_signing_certificate_moves_leaves_too() -> None:
    async with running() as rig:
        await rig.get()
        state = rig.log.state
        changed = replace(state.roots[0], signing_key_id="another")
        rig.log.set(replace(state, index=Index(state.index + 1), ca_epoch=2, roots=(changed,)))
        await rig.clock.advance(31.0)

        assert rig.signer.count == 2


async def test_a_node_that_lags_behind_the_leader_does_not_take_a_new_leaf_for_an_old_one() -> None:
    async with running() as rig:
        rig.signer.root_id, rig.signer.ahead = "r2", 5
        await rig.get()
        await rig.clock.advance(60.0)

        assert rig.signer.count == 1


async def test_a_leaf_signed_just_before_a_rotation_moves_too() -> None:
    async with running() as rig:
        rig.signer.gate.clear()
        rig.signer.root_id = "r1"
        task = rig.start()
        await settle()
        rig.log.rotate("r2")
        await settle()
        rig.signer.gate.set()
        await task
        rig.signer.root_id = None
        await rig.clock.advance(31.0)

        assert (task.result().leaf.root_id, (await rig.get()).leaf.root_id) == ("r1", "r2")


async def test_a_leaf_that_never_matches_the_state_is_not_renewed_over_and_over() -> None:
    async with running() as rig:
        rig.signer.root_id = "odd"
        await rig.get()
        await rig.clock.advance(300.0)

        assert rig.signer.count == 1


async def test_a_worn_leaf_is_renewed_while_its_reader_waits() -> None:
    rig = Rig()
    old = await rig.get()
    await rig.clock.advance(0.91 * LIFE)
    new = await rig.get()

    assert (new.hit, new.leaf.index > old.leaf.index) == (False, True)


async def test_a_worn_leaf_is_served_while_it_is_valid_and_none_can_be_had() -> None:
    rig = Rig()
    old = await rig.get()
    await rig.clock.advance(0.91 * LIFE)
    rig.signer.failure = Unavailable("down")
    first = await rig.get()
    second = await rig.get()

    assert (first.leaf, second.leaf) == (old.leaf, old.leaf)
    assert rig.signer.count == 2, "a reader does not wait again right after a failure"


async def test_an_expired_leaf_is_never_served() -> None:
    rig = Rig()
    await rig.get()
    rig.signer.failure = Unavailable("down")
    await rig.clock.advance(LIFE)

    with pytest.raises(Unavailable, match="down"):
        await rig.get()


async def test_a_blocking_read_does_not_return_a_leaf_that_expired_meanwhile() -> None:
    rig = Rig()
    old = await rig.get()
    await rig.clock.advance(0.5 * LIFE)
    task = rig.start(after=old.leaf.index, wait=0.6 * LIFE)
    await rig.clock.advance(0.7 * LIFE)

    assert (await task).leaf.index > old.leaf.index


async def test_nothing_is_renewed_by_a_clock_that_is_not_trusted() -> None:
    async with running() as rig:
        held = await rig.get()
        rig.clock_fault = "it jumped"
        rig.clock.set_wall(held.leaf.not_after - held.leaf.not_before - 120)
        await rig.clock.advance(300)
        assert rig.signer.count == 1
        rig.clock.set_wall(-(held.leaf.not_after - held.leaf.not_before - 120))
        rig.clock_fault = None
        await rig.clock.advance(300)
        assert rig.signer.count == 1
        await rig.clock.advance(held.leaf.not_after - held.leaf.not_before)
        assert rig.signer.count == 2


async def test_a_failed_renewal_is_tried_again() -> None:
    async with running() as rig:
        old = await rig.get()
        rig.signer.failure = Unavailable("down")
        await rig.clock.advance(0.905 * LIFE)
        tried = rig.signer.count
        rig.signer.failure = None
        await rig.clock.advance(20.0)

        assert tried > 1
        assert (await rig.get()).leaf.index > old.leaf.index


async def test_a_renewal_that_breaks_does_not_end_the_others() -> None:
    async with running() as rig:
        await rig.get("web")
        await rig.get("db")
        execute = rig.signer.execute
        broken = 1

        async def once_broken(caller: Caller, request: Request) -> Answer:
            nonlocal broken
            if broken:
                broken -= 1
                raise ZeroDivisionError
            return await execute(caller, request)

        rig.signer.execute = once_broken  # type: ignore[method-assign]
        await rig.clock.advance(0.91 * LIFE)

        assert rig.signer.count == 4


async def test_a_leaf_that_nobody_reads_for_its_life_is_dropped() -> None:
    async with running() as rig:
        await rig.get("idle")
        await rig.clock.advance(3 * LIFE)
        count = rig.signer.count
        await rig.clock.advance(3 * LIFE)

        assert rig.signer.count == count
        assert (await rig.get("idle")).hit is False


async def test_a_leaf_with_a_waiting_reader_is_not_dropped() -> None:
    async with running() as rig:
        first = await rig.get()
        task = rig.start(after=first.leaf.index + 3, wait=30 * LIFE)
        await rig.clock.advance(4 * LIFE)

        assert task.done()


async def test_the_least_recently_read_makes_room() -> None:
    rig = Rig(max_entries=2)
    await rig.get("a")
    await rig.get("b")
    await rig.get("a")
    await rig.get("c")

    assert [(await rig.get(name)).hit for name in ("a", "c")] == [True, True]
    assert (await rig.get("b")).hit is False


async def test_a_cache_full_of_waiting_readers_takes_no_more() -> None:
    rig = Rig(max_entries=1)
    rig.signer.gate.clear()
    task = rig.start("a")
    await settle()

    with pytest.raises(Unavailable, match="leaf_cache_max"):
        await rig.get("b")
    rig.signer.gate.set()
    await task


async def test_services_that_never_got_a_leaf_take_no_room() -> None:
    rig = Rig(max_entries=1)
    rig.signer.failure = Unavailable("down")
    for name in ("a", "b", "c"):
        with pytest.raises(Unavailable, match="down"):
            await rig.get(name)
    rig.signer.failure = None

    assert (await rig.get("d")).hit is False


async def test_ending_the_cache_ends_requests_under_way() -> None:
    async with running() as rig:
        rig.signer.gate.clear()
        task = rig.start()
        await settle()
    outcome = await asyncio.gather(within(ManualClock(), 1, task), return_exceptions=True)

    assert isinstance(outcome[0], asyncio.CancelledError)


def ending(rig: Rig, seconds: float) -> None:
    """Let the active root end so many seconds from now; leaves are backdated a minute, as in life."""
    rig.signer.backdated = 60
    state = rig.log.state
    end = int(rig.clock.now().timestamp() + seconds)
    rig.log.set(replace(state, roots=(replace(state.roots[0], not_after=end),)))


@pytest.mark.parametrize("left", [2, 5, 20, 40, 600])
async def test_a_leaf_that_ends_with_its_root_is_not_renewed_before(left: int) -> None:
    async with running() as rig:
        ending(rig, left)
        await rig.get()
        await rig.clock.advance(0.0)
        for _ in range(10):
            await rig.clock.advance((left - 1.5) / 10)
            assert (await rig.get()).hit

        assert rig.signer.count == 1


async def test_a_leaf_that_ends_with_its_root_moves_to_the_next_root() -> None:
    async with running() as rig:
        ending(rig, 600)
        await rig.get()
        await rig.clock.advance(300)
        rig.log.rotate("r2")
        await rig.clock.advance(31)

        assert (await rig.get()).leaf.root_id == "r2"
        assert rig.signer.count == 2


async def test_a_leaf_that_is_old_when_it_comes_is_not_renewed_over_and_over() -> None:
    async with running() as rig:
        rig.signer.backdated = 30 * LIFE
        await rig.get()
        await rig.clock.advance(4.0)
        assert rig.signer.count == 1
        await rig.clock.advance(60.0)
        assert rig.signer.count < 15


async def test_every_read_is_asked_about_cached_or_not() -> None:
    rig = Rig()
    await rig.get()
    rig.gate.refused = {"stranger"}

    with pytest.raises(PermissionDenied):
        await rig.cache.leaf(Caller(token=Secret("stranger")), "web")

    assert {permission for _, permission in rig.gate.asked} == {SERVICE_WRITE.of("web")}
    assert (await rig.get()).hit


async def test_who_is_refused_is_not_the_one_on_whose_behalf_a_leaf_is_renewed() -> None:
    async with running() as rig:
        await rig.get()
        rig.gate.refused = {"stranger"}
        with pytest.raises(PermissionDenied):
            await rig.cache.leaf(Caller(token=Secret("stranger")), "web")
        await rig.clock.advance(0.95 * LIFE)

        assert rig.signer.count == 2
        assert rig.signer.callers == [CALLER, CALLER]


async def test_a_token_that_is_taken_away_while_its_reader_waits_gets_no_leaf() -> None:
    rig = Rig()
    first = await rig.get()
    waiting = asyncio.ensure_future(
        rig.cache.leaf(Caller(token=Secret("gone")), "web", after=first.leaf.index, wait=30.0)
    )
    await settle()
    rig.gate.refused = {"gone"}
    await rig.clock.advance(30.0)

    with pytest.raises(PermissionDenied):
        await waiting


async def test_a_reader_is_not_denied_because_another_one_was() -> None:
    rig = Rig()
    rig.signer.gate.clear()
    denied = asyncio.ensure_future(rig.cache.leaf(Caller(token=Secret("gone")), "web"))
    await settle()
    joined = asyncio.ensure_future(rig.cache.leaf(Caller(token=Secret("good")), "web"))
    await settle()
    rig.signer.failure = PermissionDenied("ACL not found")
    rig.signer.denies = "gone"
    rig.signer.gate.set()

    with pytest.raises(PermissionDenied):
        await denied
    assert (await joined).leaf.service == "web"
    assert [caller.token for caller in rig.signer.callers] == [Secret("gone"), Secret("good")]


async def test_a_reader_whom_the_leader_denies_is_not_served_what_is_held() -> None:
    """This node's copy may lag behind: the leader knows that the token was taken away."""
    rig = Rig()
    await rig.get()
    rig.signer.failure, rig.signer.denies = PermissionDenied("ACL not found"), "gone"
    rig.log.rotate("R2")

    with pytest.raises(PermissionDenied):
        await rig.cache.leaf(Caller(token=Secret("gone")), "web", fresh=True)
    assert (await rig.get()).hit
    await rig.clock.advance(0.95 * LIFE)
    with pytest.raises(PermissionDenied):
        await rig.cache.leaf(Caller(token=Secret("gone")), "web")
