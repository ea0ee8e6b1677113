from __future__ import annotations

import asyncio
import json

import pytest
from structlog.testing import capture_logs

from caserver.authority.plan import CROSS_SIGNED_MIN
from caserver.errors import (
    CaserverError,
    CommitFailed,
    CommitUnknown,
    Conflict,
    InvalidConfig,
    ProviderRefused,
    ProviderUnavailable,
)
from caserver.internode.keyring import Sealed
from caserver.pki.certificates import describe
from caserver.requests import IssuedLeaf
from caserver.state.commands import AbortChange, ActivateRoot, BeginChange, Reseal, SetConfiguration
from caserver.state.model import CARoot
from tests.testkit.fakes import FakeLog, settle
from tests.testkit.keys import key_pem
from tests.testkit.nodes import (
    DAY,
    Node,
    bootstrap_configuration,
    build_node,
    leading_node,
    operator_root,
    running,
    split_chain,
    why_not,
)

UNLIMITED = {"CSRMaxPerSecond": 0}


def active(node: Node) -> CARoot:
    root = node.state.active_root
    assert root is not None
    return root


def assert_one_active(node: Node) -> None:
    assert [root.active for root in node.state.roots].count(True) == 1


def accepted_by(leaf: IssuedLeaf, node: Node) -> dict[str, str | None]:
    return {root.id: why_not(leaf, root.pem, node.clock.now()) for root in node.state.roots}


async def test_a_rotation_to_an_operators_root_is_seamless_in_both_directions() -> None:
    async with leading_node() as node:
        old = active(node)
        (before,) = await node.sign("web")
        with capture_logs() as logs:
            changed = await node.configure({**operator_root("rsa-2048"), **UNLIMITED})
        new = active(node)
        (after,) = await node.sign("web")

        assert changed.rotated
        assert changed.index == node.state.roots_index
        assert [root.id for root in node.state.roots] == sorted([old.id, new.id])
        assert (new.key_type, new.key_bits, new.name) == ("rsa", 2048, "Consul CA Root Cert")
        assert len(new.intermediates) == 1
        assert len(split_chain(after.chain_pem)) == 2
        assert accepted_by(after, node) == {old.id: None, new.id: None}
        assert why_not(before, old.pem, node.clock.now()) is None
        rotated_out = node.state.root(old.id)
        assert rotated_out is not None
        assert rotated_out.rotated_out_at == int(node.clock.now().timestamp())
        assert 'CA rotated to new root under provider "consul"' in [entry["event"] for entry in logs]


async def test_no_secret_is_logged_during_a_rotation() -> None:
    async with leading_node() as node:
        with capture_logs() as logs:
            await node.configure(operator_root("ec-384"))
            with pytest.raises(InvalidConfig):
                await node.configure({**operator_root("ec-256"), "PrivateKey": key_pem("ec-256-b")})
        for name in ("ec-384", "ec-256-b"):
            assert key_pem(name).splitlines()[1] not in repr(logs)


async def test_the_cross_signed_certificate_lives_two_generations_of_leaves() -> None:
    async with leading_node() as node:
        now = int(node.clock.now().timestamp())
        await node.configure({**operator_root("ec-256"), "LeafCertTTL": "24h"})
        assert describe(active(node).intermediates[0]).not_after == now + CROSS_SIGNED_MIN
        await node.configure({**operator_root("ec-384"), "LeafCertTTL": "240h"})
        assert describe(active(node).intermediates[0]).not_after == now + 2 * 240 * 3600


async def test_the_cross_signed_certificate_never_outlives_the_old_root() -> None:
    short = operator_root("ec-256", days=32)
    async with leading_node(bootstrap_configuration(**short)) as node:
        old = active(node)
        await node.configure(operator_root("ec-384"))
        assert describe(active(node).intermediates[0]).not_after == old.not_after


@pytest.mark.parametrize(
    "config",
    [
        {"LeafCertTTL": "72h0m0s", "CSRMaxPerSecond": 0, "ClusterID": "2a3b4c5d-1111-4222-8333-444455556666"},
        {"leaf_cert_ttl": 72 * 3600 * 10**9, "CSRMaxPerSecond": 0.0},
    ],
)
async def test_an_equal_configuration_has_no_effect(config: dict[str, object]) -> None:
    async with leading_node() as node:
        index = node.state.index
        changed = await node.configure(config)
        assert not changed.rotated
        assert node.state.index == index


async def test_what_is_read_may_be_written_back_even_when_its_root_grew_old() -> None:
    short = operator_root("ec-256", days=32)
    async with leading_node(bootstrap_configuration(**short)) as node:
        await node.clock.advance(3 * DAY)
        index = node.state.index
        assert node.state.configuration is not None
        changed = await node.configure(json.loads(node.state.configuration.stored.given))
        assert (changed.rotated, node.state.index) == (False, index)


async def test_other_lifetimes_are_stored_without_a_rotation() -> None:
    async with leading_node() as node:
        root, epoch = active(node), node.state.ca_epoch
        changed = await node.configure({"LeafCertTTL": "24h", **UNLIMITED})
        assert not changed.rotated
        assert (active(node).id, node.state.ca_epoch) == (root.id, epoch)
        assert node.state.configuration is not None
        assert node.state.configuration.modify_index == changed.index
        (leaf,) = await node.sign("web")
        assert leaf.not_after - leaf.not_before == 24 * 3600


async def test_key_and_certificate_left_out_mean_a_generated_root() -> None:
    async with leading_node() as node:
        await node.configure(operator_root("ec-256"))
        operators = active(node)
        changed = await node.configure(UNLIMITED)
        assert changed.rotated
        assert any("generated root" in warning for warning in changed.warnings)
        assert active(node).id != operators.id
        (leaf,) = await node.sign("web")
        assert set(accepted_by(leaf, node).values()) == {None}


@pytest.mark.parametrize(("kind", "bits"), [("ec", 384), ("ec", 521), ("rsa", 2048)], ids=str)
async def test_another_kind_of_key_is_a_rotation_of_a_generated_root(kind: str, bits: int) -> None:
    async with leading_node() as node:
        changed = await node.configure({"PrivateKeyType": kind, "PrivateKeyBits": bits, **UNLIMITED})
        assert changed.rotated
        assert (active(node).key_type, active(node).key_bits) == (kind, bits)
        (leaf,) = await node.sign("web")
        assert set(accepted_by(leaf, node).values()) == {None}


async def test_a_key_alone_gets_a_root_and_keeps_it() -> None:
    async with leading_node() as node:
        config = {"PrivateKey": key_pem("ec-256"), **UNLIMITED}
        assert (await node.configure(config)).rotated
        root = active(node)
        assert not (await node.configure({**config, "LeafCertTTL": "48h"})).rotated
        assert active(node).id == root.id
        assert (await node.configure({"PrivateKey": key_pem("ec-256-b"), **UNLIMITED})).rotated


async def test_every_bundle_in_use_accepts_leaves_after_several_rotations() -> None:
    async with leading_node() as node:
        for key in ("ec-256", "rsa-2048", "ec-384"):
            await node.configure({**operator_root(key), **UNLIMITED})
            (leaf,) = await node.sign("web")
            assert set(accepted_by(leaf, node).values()) == {None}
        assert len(node.state.roots) == 4


async def test_rotating_back_takes_a_listed_root_and_keeps_every_bundle_working() -> None:
    async with leading_node() as node:
        first, second = operator_root("ec-256"), operator_root("ec-384")
        await node.configure({**first, **UNLIMITED})
        back = active(node)
        await node.configure({**second, **UNLIMITED})
        await node.configure({**first, **UNLIMITED})
        assert active(node).id == back.id
        assert active(node).create_index == back.create_index
        assert len(node.state.roots) == 3
        assert_one_active(node)
        (leaf,) = await node.sign("web")
        assert set(accepted_by(leaf, node).values()) == {None}


async def test_rotating_back_and_forth_does_not_make_the_chain_grow() -> None:
    async with leading_node() as node:
        for key in ("ec-256", "ec-384", "ec-256", "ec-384", "ec-256", "ec-384"):
            await node.configure({**operator_root(key), **UNLIMITED})
            (leaf,) = await node.sign("web")
            assert set(accepted_by(leaf, node).values()) == {None}
            assert len(active(node).intermediates) <= len(node.state.roots)


async def test_without_cross_signing_the_old_provider_is_left_alone() -> None:
    async with leading_node() as node:
        old = active(node)
        changed = await node.configure(operator_root("ec-256"), ForceWithoutCrossSigning=True)
        assert active(node).intermediates == ()
        assert "cross_sign" not in node.control.calls
        assert any("without cross-signing" in warning for warning in changed.warnings)
        (leaf,) = await node.sign("web")
        assert why_not(leaf, active(node).pem, node.clock.now()) is None
        assert why_not(leaf, old.pem, node.clock.now()) is not None


async def test_an_expired_root_is_replaced_without_its_help() -> None:
    short = operator_root("ec-256", days=32)
    async with leading_node(bootstrap_configuration(**short)) as node:
        await node.clock.advance(10 * DAY)
        changed = await node.configure({**operator_root("ec-384"), **UNLIMITED})
        assert any("expired" in warning for warning in changed.warnings)
        assert await node.sign("web")


async def test_a_root_whose_key_is_lost_gives_way_only_when_told_so() -> None:
    async with leading_node() as node:
        name = f"root/{active(node).id}"
        node.log.commit(Reseal(at=1, expect_index=node.state.roots_index, values=((name, Sealed(b"x" * 60)),)))
        node.authority._custody.forget()
        with pytest.raises(ProviderUnavailable, match="ForceWithoutCrossSigning"):
            await node.configure({**operator_root("ec-256"), **UNLIMITED})
        assert node.state.change is None
        await node.configure({**operator_root("ec-256"), **UNLIMITED}, ForceWithoutCrossSigning=True)
        assert await node.sign("web")


async def test_a_stale_index_is_a_conflict_and_changes_nothing() -> None:
    async with leading_node() as node:
        assert node.state.configuration is not None
        current, index = node.state.configuration.modify_index, node.state.index
        with pytest.raises(Conflict, match=f"at index {current}"):
            await node.configure({"LeafCertTTL": "24h"}, cas=current + 1)
        with pytest.raises(Conflict):
            await node.configure(operator_root("ec-256"), ModifyIndex=99999)
        with pytest.raises(Conflict):
            await node.configure({"LeafCertTTL": "24h"}, cas=0)
        assert node.state.index == index
        await node.configure({"LeafCertTTL": "24h"}, cas=current, ModifyIndex=current)
        assert node.state.configuration.modify_index > current


async def test_a_retry_with_the_same_id_has_one_effect() -> None:
    async with leading_node() as node:
        config = {**operator_root("ec-256"), **UNLIMITED}
        assert node.state.configuration is not None
        cas = node.state.configuration.modify_index
        first = await node.configure(config, request_id="a1", cas=cas)
        again = await node.configure(config, request_id="a1", cas=cas)
        assert (again.index, again.rotated) == (first.index, first.rotated)
        stored = await node.configure({**config, "LeafCertTTL": "24h"}, request_id="a2")
        repeated = await node.configure({**config, "LeafCertTTL": "24h"}, request_id="a2")
        assert (stored.index, stored.rotated) == (repeated.index, repeated.rotated)
        assert len(node.log.applied(ActivateRoot)) == 2
        assert len(node.log.applied(SetConfiguration)) == 1


async def test_a_faulty_root_is_refused_before_anything_is_begun() -> None:
    async with leading_node() as node:
        index = node.state.index
        with pytest.raises(InvalidConfig):
            await node.configure({**operator_root("ec-256"), "PrivateKey": key_pem("ec-256-b")})
        with pytest.raises(InvalidConfig):
            await node.configure(operator_root("ec-256", trust_domain="11111111-2222-4333-8444-555555555555.consul"))
        assert node.state.index == index


async def test_a_failure_while_preparing_gives_the_change_up() -> None:
    async with leading_node() as node:
        old = active(node)
        node.control.failures["cross_sign"] = ProviderUnavailable("the old backend is asleep")
        with pytest.raises(ProviderUnavailable, match="asleep"):
            await node.configure({**operator_root("ec-256"), **UNLIMITED}, request_id="a1")
        node.control.failures.clear()
        assert node.state.change is None
        assert active(node).id == old.id
        assert await node.sign("web")
        with pytest.raises(ProviderUnavailable, match="asleep"):
            await node.configure({**operator_root("ec-256"), **UNLIMITED}, request_id="a1")
        assert (await node.configure({**operator_root("ec-256"), **UNLIMITED}, request_id="a2")).rotated


async def test_a_failing_proof_refuses_the_change_unless_it_is_overridden() -> None:
    async with leading_node() as node:
        node.control.useless_cross_signing = True
        with pytest.raises(InvalidConfig, match="new leaf under the old root alone"):
            await node.configure({**operator_root("ec-256"), **UNLIMITED})
        assert node.state.change is None
        assert len(node.state.roots) == 1
        forced = await node.configure({**operator_root("ec-256"), **UNLIMITED}, force=True)
        assert any("new leaf under the old root alone" in warning for warning in forced.warnings)
        assert len(node.state.roots) == 2


async def test_changes_run_one_after_another() -> None:
    async with leading_node() as node:
        both = await asyncio.gather(
            node.configure({**operator_root("ec-256"), **UNLIMITED}),
            node.configure({**operator_root("ec-384"), **UNLIMITED}),
        )
        assert all(changed.rotated for changed in both)
        kinds = [type(command) for command in node.log.applied() if isinstance(command, BeginChange | ActivateRoot)]
        assert kinds == [BeginChange, ActivateRoot] * 3
        assert_one_active(node)


async def test_a_change_goes_on_when_its_caller_goes_away() -> None:
    async with leading_node() as node:
        node.log.hold(ActivateRoot)
        call = asyncio.ensure_future(node.configure({**operator_root("ec-256"), **UNLIMITED}))
        await settle()
        call.cancel()
        await settle()
        node.log.release()
        await settle()
        assert len(node.state.roots) == 2
        assert node.state.change is None


@pytest.mark.parametrize("config", [{**operator_root("ec-256")}, {"LeafCertTTL": "24h"}], ids=["rotate", "store"])
async def test_a_lost_reply_is_found_by_the_request_id(config: dict[str, object]) -> None:
    async with leading_node() as node:
        node.log.lose_next_reply(2)
        changed = await node.configure({**config, **UNLIMITED}, request_id="a1")
        assert changed.index == node.state.requests["a1"].index
        assert node.state.change is None


async def test_an_announcement_that_got_lost_is_unknown_and_may_be_repeated() -> None:
    async with leading_node() as node:
        node.log.lose_next_command()
        with pytest.raises(CommitUnknown):
            await node.configure({**operator_root("ec-256"), **UNLIMITED}, request_id="a1")
        assert (await node.configure({**operator_root("ec-256"), **UNLIMITED}, request_id="a1")).rotated


async def test_an_announcement_that_failed_changed_nothing() -> None:
    async with leading_node() as node:
        node.log.fail_next()
        with pytest.raises(CommitFailed):
            await node.configure({**operator_root("ec-256"), **UNLIMITED}, request_id="a1")
        assert node.state.change is None


@pytest.mark.parametrize("trouble", ["fail_next", "lose_next_command"])
async def test_an_activation_in_doubt_is_finished_by_the_retry(trouble: str) -> None:
    async with leading_node() as node:
        node.log.hold(ActivateRoot)
        call = asyncio.ensure_future(node.configure({**operator_root("ec-256"), **UNLIMITED}, request_id="a1"))
        await settle()
        getattr(node.log, trouble)()
        node.log.release()
        with pytest.raises(CommitUnknown):
            await call
        retried = await node.configure({**operator_root("ec-256"), **UNLIMITED}, request_id="a1")
        assert retried.rotated
        assert len(node.log.applied(ActivateRoot)) == 2
        assert node.state.change is None


async def test_giving_up_without_a_quorum_is_not_reported_as_certain() -> None:
    async with leading_node() as node:
        node.control.failures["prepare"] = ProviderUnavailable("asleep")
        node.log.hold(AbortChange)
        call = asyncio.ensure_future(node.configure({**operator_root("ec-256"), **UNLIMITED}, request_id="a1"))
        await settle()
        node.log.fail_next()
        node.log.release()
        with pytest.raises(CommitUnknown, match="asleep"):
            await call


async def test_the_announcement_names_the_root_that_came_into_force() -> None:
    async with leading_node() as node:
        node.log.hold(ActivateRoot)
        call = asyncio.ensure_future(node.configure({"PrivateKeyBits": 384, **UNLIMITED}, request_id="a1"))
        await settle()
        node.log.lose_next_reply()
        other = build_node(node.log.elsewhere("n2"), clock=node.clock, seed=2)
        async with running(other):
            other.log.become_leader()  # finishes the change with a root of its own
            await settle()
            node.log.become_leader()
            with capture_logs() as logs:
                node.log.release()
                changed = await call
        assert changed.rotated
        assert changed.index == node.state.roots_index
        told = [entry for entry in logs if "CA rotated to new root" in entry["event"]]
        assert [(entry["root_id"], entry["index"]) for entry in told] == [(active(node).id, node.state.roots_index)]


@pytest.mark.parametrize("force", [False, True])
async def test_a_later_leader_knows_whether_failing_proofs_are_overridden(*, force: bool) -> None:
    async with leading_node() as node:
        node.control.useless_cross_signing = True
        node.log.hold(ActivateRoot if force else AbortChange)
        call = asyncio.ensure_future(
            node.configure({**operator_root("ec-256"), **UNLIMITED}, request_id="a1", force=force)
        )
        await settle()
        other = build_node(node.log.elsewhere("n2"), clock=node.clock, seed=2)
        other.control.useless_cross_signing = True
        async with running(other):
            other.log.become_leader()
            await settle()
            node.log.release()
            with pytest.raises(CommitUnknown):
                await call
            assert other.state.change is None
            assert len(other.state.roots) == (2 if force else 1)
            repeated = other.configure({**operator_root("ec-256"), **UNLIMITED}, request_id="a1", force=force)
            if force:
                assert (await repeated).rotated
            else:
                with pytest.raises(InvalidConfig, match="would not verify after it"):
                    await repeated


@pytest.mark.parametrize("kind", [InvalidConfig, ProviderRefused, ProviderUnavailable])
async def test_the_repeat_of_a_change_that_was_given_up_is_told_the_same(kind: type[CaserverError]) -> None:
    async with leading_node() as node:
        node.control.failures["prepare"] = kind("no: not like this")
        for _ in range(2):
            with pytest.raises(CaserverError, match=r"^no: not like this$") as told:
                await node.configure({**operator_root("ec-256"), **UNLIMITED}, request_id="a1")
            assert type(told.value) is kind


async def test_after_many_rotations_the_oldest_bundles_are_left_behind_with_a_warning() -> None:
    limit = 2  # instead of eight: rotations take their time
    async with running(build_node(FakeLog(), hops_max=limit)) as node:
        order = [active(node).id]
        for number in range(limit + 2):
            changed = await node.configure({"PrivateKeyBits": 384 if number % 2 == 0 else 256, **UNLIMITED})
            order.append(active(node).id)
            assert changed.rotated
            assert len(active(node).intermediates) == min(number + 1, limit)
            assert bool(changed.warnings) == (number >= limit)
        (leaf,) = await node.sign("web")
        refused = {root_id for root_id, reason in accepted_by(leaf, node).items() if reason is not None}
        assert refused == set(order[:2])
        (warning,) = changed.warnings
        assert all(root_id in warning for root_id in refused)
