from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest
from cryptography import x509

from caserver.authority.issuance import BATCH_MAX, DROP_AFTER, CSRLimiter
from caserver.errors import CommitFailed, NotInitialized, NotLeader, ProviderUnavailable, RateLimited, Unavailable
from caserver.requests import Caller, Failure, IssuedLeaf, LeavesSigned, SignLeaves
from caserver.state.commands import IssueLeaves
from caserver.state.model import Effective
from tests.testkit.fakes import FakeLog, ManualClock, settle
from tests.testkit.nodes import (
    DATACENTER,
    TRUST_DOMAIN,
    Node,
    bootstrap_configuration,
    build_node,
    csr_for,
    leading_node,
    operator_root,
    running,
    split_chain,
    why_not,
)


async def results_of(node: Node, *csrs: str) -> tuple[IssuedLeaf | Failure, ...]:
    answer = await node.authority.execute(Caller(), SignLeaves(csrs))
    assert isinstance(answer, LeavesSigned)
    return answer.results


def batches(node: Node) -> list[int]:
    return [len(command.orders) for command in node.log.applied(IssueLeaves) if isinstance(command, IssueLeaves)]


async def test_a_leaf_is_booked_signed_and_verifies_under_the_root() -> None:
    async with leading_node() as node:
        (leaf,) = await node.sign("web")
        root = node.state.active_root
        assert root is not None
        assert why_not(leaf, root.pem, node.clock.now()) is None
        assert leaf.service == "web"
        assert leaf.service_uri == f"spiffe://{TRUST_DOMAIN}/ns/default/dc/{DATACENTER}/svc/web"
        assert (leaf.root_id, leaf.signing_key_id) == (root.id, root.signing_key_id)
        assert leaf.index == node.state.index
        (row,) = [row for hour in node.state.ledger.hours.values() for row in hour.rows.values()]
        assert (row.service, row.serial, row.not_after) == ("web", leaf.serial, leaf.not_after)


async def test_a_leaf_is_backdated_a_minute_and_lives_for_the_configured_time() -> None:
    async with leading_node(bootstrap_configuration(leaf_cert_ttl="24h")) as node:
        (leaf,) = await node.sign("web")
        now = int(node.clock.now().timestamp())
        assert (leaf.not_before, leaf.not_after) == (now - 60, now - 60 + 24 * 3600)
        certificate = x509.load_pem_x509_certificate(split_chain(leaf.chain_pem)[0].encode())
        assert int(certificate.not_valid_after_utc.timestamp()) == leaf.not_after


async def test_a_leaf_never_outlives_its_root() -> None:
    short = operator_root("ec-256", days=32)
    async with leading_node(bootstrap_configuration(**short)) as node:
        await node.clock.advance(3 * 24 * 3600)
        (leaf,) = await node.sign("web")
        root = node.state.active_root
        assert root is not None
        assert leaf.not_after == root.not_after


async def test_requests_of_one_turn_share_a_proposal_and_later_ones_collect_behind_a_few() -> None:
    async with leading_node() as node:
        node.log.hold()
        calls = [asyncio.ensure_future(node.sign("first", "second"))]
        await settle()
        calls += [asyncio.ensure_future(node.sign("third"))]
        await settle()
        calls += [asyncio.ensure_future(node.sign("fourth"))]
        await settle()
        calls += [asyncio.ensure_future(node.sign(f"late-{number}")) for number in range(20)]
        await settle()
        node.log.release()
        await asyncio.gather(*calls)
        assert batches(node) == [2, 1, 1, 20]


async def test_a_batch_has_a_largest_size() -> None:
    async with leading_node() as node:
        csr = csr_for("web")
        answers = await asyncio.gather(*(results_of(node, csr) for _ in range(BATCH_MAX + 5)))
        assert all(isinstance(results[0], IssuedLeaf) for results in answers)
        assert max(batches(node)) == BATCH_MAX
        assert len({results[0].serial for results in answers if isinstance(results[0], IssuedLeaf)}) == BATCH_MAX + 5


async def test_a_bad_csr_does_not_spoil_the_others_of_its_request() -> None:
    async with leading_node() as node:
        good, foreign = csr_for("web"), csr_for("web", trust_domain="11111111-2222-4333-8444-555555555555.consul")
        first, second, third = await results_of(node, foreign, good, "no PEM at all")
        assert isinstance(first, Failure)
        assert isinstance(second, IssuedLeaf)
        assert isinstance(third, Failure)
        assert {first.kind, third.kind} == {"InvalidCSR"}
        assert batches(node) == [1]


async def test_the_limiter_refuses_at_once_and_counts_each_csr() -> None:
    async with leading_node(bootstrap_configuration(csr_max_per_second=2)) as node:
        csr = csr_for("web")
        results = await results_of(node, *[csr] * 5)
        assert [isinstance(result, IssuedLeaf) for result in results] == [True, True, False, False, False]
        refused = results[4]
        assert refused == Failure(kind="RateLimited", detail="Rate limit reached, try again later")
        await node.clock.advance(0.5)
        assert [isinstance(result, IssuedLeaf) for result in await results_of(node, csr, csr)] == [True, False]


async def test_without_a_rate_the_number_under_way_is_capped() -> None:
    async with leading_node(bootstrap_configuration(csr_max_concurrent=2)) as node:
        node.log.hold()
        csr = csr_for("web")
        waiting = asyncio.ensure_future(results_of(node, csr, csr))
        await settle()
        (refused,) = await results_of(node, csr)
        assert isinstance(refused, Failure)
        assert refused.kind == "RateLimited"
        node.log.release()
        await waiting
        assert isinstance((await results_of(node, csr))[0], IssuedLeaf)


def test_the_limiter_says_when_the_next_token_is_free() -> None:
    clock = ManualClock()
    limiter = CSRLimiter(clock)
    effective = Effective(csr_max_per_second=0.5)
    limiter.admit(effective)
    with pytest.raises(RateLimited) as caught:
        limiter.admit(effective)
    assert caught.value.retry_after == pytest.approx(2.0)
    clock.jump(2.0)
    limiter.admit(effective)


async def test_a_batch_decided_on_a_former_epoch_is_proposed_again_unseen() -> None:
    async with leading_node() as node:
        node.log.hold(IssueLeaves)
        waiting = asyncio.ensure_future(node.sign("web"))
        await settle()
        old = node.state.active_root
        await node.configure({**operator_root("ec-384"), "CSRMaxPerSecond": 0})  # overtakes the booking
        node.log.release()
        (leaf,) = await waiting
        new = node.state.active_root
        assert old is not None
        assert new is not None
        assert leaf.root_id == new.id != old.id
        assert why_not(leaf, new.pem, node.clock.now()) is None


async def test_nothing_is_signed_when_the_booking_is_not_committed() -> None:
    async with leading_node() as node:
        node.log.fail_next()
        with pytest.raises(CommitFailed):
            await node.sign("web")
        assert node.control.calls.count("sign_leaves") == 1  # the probe of the first root


async def test_a_booking_in_doubt_is_not_signed_and_may_be_tried_elsewhere() -> None:
    async with leading_node() as node:
        node.log.lose_next_reply()
        signed_before = node.control.calls.count("sign_leaves")
        with pytest.raises(NotLeader):
            await node.sign("web")
        assert node.control.calls.count("sign_leaves") == signed_before


async def test_a_late_signature_is_dropped() -> None:
    async with leading_node() as node:
        node.control.hang = asyncio.Event()
        waiting = asyncio.ensure_future(node.sign("web"))
        await settle()
        node.clock.jump(DROP_AFTER + 0.1)
        node.control.hang.set()
        with pytest.raises(Unavailable, match="dropped"):
            await waiting


async def test_a_failing_provider_is_told_to_the_caller() -> None:
    async with leading_node() as node:
        node.control.failures["sign_leaves"] = ProviderUnavailable("the backend is asleep")
        with pytest.raises(ProviderUnavailable, match="asleep"):
            await node.sign("web")
        node.control.failures.clear()
        assert await node.sign("web")


async def test_no_leaf_before_the_first_root() -> None:
    node = build_node(FakeLog())
    with pytest.raises(NotInitialized):
        await node.sign("web")


async def test_no_leaf_under_an_expired_root() -> None:
    short = operator_root("ec-256", days=32)
    async with leading_node(bootstrap_configuration(**short)) as node:
        node.clock.jump(10 * 24 * 3600)
        with pytest.raises(Unavailable, match="expired"):
            await node.sign("web")


async def test_a_caller_that_goes_away_takes_nothing_with_it() -> None:
    async with leading_node() as node:
        node.log.hold()
        leaving = asyncio.ensure_future(node.sign("gone"))
        staying = asyncio.ensure_future(node.sign("here"))
        await settle()
        leaving.cancel()
        await settle()
        node.log.release()
        (leaf,) = await staying
        assert leaf.service == "here"


async def test_what_waits_is_told_when_the_node_stops() -> None:
    node = build_node(FakeLog())
    async with running(node):
        node.log.hold()
        calls = []
        for number in range(6):
            calls.append(asyncio.ensure_future(node.sign(f"web-{number}")))
            await settle()
    errors = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(error, NotLeader) for error in errors)


@pytest.mark.parametrize("key", ["rsa-2048", "ec-384", "ec-521", "ec-224"])
async def test_every_kind_of_root_signs_leaves(key: str) -> None:
    root = operator_root(key)
    async with leading_node(bootstrap_configuration(**root)) as node:
        (leaf,) = await node.sign("web")
        assert why_not(leaf, str(root["RootCert"]), node.clock.now()) is None


async def test_no_leaf_under_a_root_that_does_not_begin_before_later() -> None:
    start = datetime(2026, 3, 1, 11, 0, 0, tzinfo=UTC)
    async with leading_node(bootstrap_configuration(**operator_root("ec-256", start=start))) as node:
        node.clock.set_wall(-2 * 3600)
        with pytest.raises(Unavailable, match="jumped"):
            await node.sign("web")
        await node.clock.advance(61)
        with pytest.raises(Unavailable, match=r"is not valid before 2026-03-01T11:00:00Z.*clock"):
            await node.sign("web")
        assert node.state.ledger.row_count == 0
        await node.clock.advance(3600)
        assert await node.sign("web")
