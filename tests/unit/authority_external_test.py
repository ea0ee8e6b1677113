"""Changes to, from and below an external provider, and what its leader does for it: on a stand-in for its server."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from structlog.testing import capture_logs

from caserver.authority.issuance import DROP_AFTER
from caserver.authority.rotation import CHANGE_MAX, CLEAN_UP_AFTER
from caserver.errors import InvalidConfig, NotLeader, ProviderRefused, ProviderUnavailable
from caserver.fields import Secret
from caserver.pki.certificates import describe
from caserver.requests import Caller, IssuedLeaf, SignLeaves
from caserver.state.commands import ActivateRoot, BeginChange, RecordSerials, SetConfiguration, SetIntermediate
from caserver.state.configuration import parse_bootstrap
from caserver.state.model import HOUR, CARoot, Index
from tests.testkit.external import FakeVault
from tests.testkit.fakes import FakeLog, ManualClock, settle
from tests.testkit.nodes import (
    CLUSTER_ID,
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
from tests.testkit.states import restores

UNLIMITED = {"CSRMaxPerSecond": 0}
RETIRED = 90  # seconds after which a clean-up is done, clock guard included


def vault(root: str = "root-a", intermediate: str = "inter-a", **more: object) -> dict[str, object]:
    return {
        "Address": "https://vault:8200",
        "Token": "s.token",
        "RootPKIPath": root,
        "IntermediatePKIPath": intermediate,
        **UNLIMITED,
        **more,
    }


VAULT_A, VAULT_B = vault(), vault("root-b", "inter-b")
VAULT_B_SAME_PATH = vault("root-b", "inter-a")
BUILTIN = {**operator_root("ec-256"), **UNLIMITED}


async def put(node: Node, config: dict[str, object], **more: Any) -> Any:
    return await node.configure(config, provider="vault" if "Address" in config else "consul", **more)


def scene(**bootstrap: object) -> tuple[Node, FakeVault]:
    """A node that begins with a generated root, and an external server."""
    clock = ManualClock()
    server = FakeVault(clock)
    return build_node(FakeLog(), clock=clock, server=server, bootstrap=bootstrap_configuration(**bootstrap)), server


def active(node: Node) -> CARoot:
    root = node.state.active_root
    assert root is not None
    return root


def accepted_by(leaf: IssuedLeaf, node: Node) -> dict[str, str | None]:
    return {root.id: why_not(leaf, root.pem, node.clock.now()) for root in node.state.roots}


async def assert_seamless(node: Node, before: list[IssuedLeaf]) -> None:
    (leaf,) = await node.sign("web")
    assert set(accepted_by(leaf, node).values()) == {None}
    for old in before:
        issuer = node.state.root(old.root_id)
        assert issuer is not None
        assert why_not(old, issuer.pem, node.clock.now()) is None
    before.append(leaf)


@pytest.mark.parametrize(
    "way",
    [
        [VAULT_A],
        [VAULT_A, BUILTIN],
        [VAULT_A, VAULT_B],
        [VAULT_A, VAULT_B_SAME_PATH],
        [VAULT_A, VAULT_B, VAULT_A],
        [BUILTIN, VAULT_A, BUILTIN, VAULT_B_SAME_PATH],
    ],
    ids=["in", "in-out", "a-b", "a-b-same-path", "a-b-a", "there-and-back"],
)
async def test_every_way_is_seamless_and_leaves_one_issuer_behind(way: list[dict[str, object]]) -> None:
    node, server = scene()
    async with running(node):
        leaves = await node.sign("first")
        for config in way:
            changed = await put(node, config)
            assert changed.rotated
            await assert_seamless(node, leaves)
            await node.clock.advance(RETIRED)
            await assert_seamless(node, leaves)
        assert node.authority.degraded == ()
        assert node.state.retiring == ()
        at = dict(active(node).backend)
        assert server.standing == ({(at["path"], int(at["epoch"]))} if at else set())
        assert active(node).name == f"{active(node).provider.capitalize()} CA Root Cert"


async def test_a_cluster_may_begin_with_an_external_provider() -> None:
    clock = ManualClock()
    server = FakeVault(clock)
    seed = parse_bootstrap("vault", {**VAULT_A, "cluster_id": CLUSTER_ID})
    async with leading_node(seed, clock=clock, server=server) as node:
        root = active(node)
        (leaf,) = await node.sign("web")
        assert (root.provider, root.sealed_key, root.epoch) == ("vault", None, 1)
        assert root.signing_key_id == describe(root.intermediates[0]).signing_key_id
        assert len(split_chain(leaf.chain_pem)) == 2
        assert set(accepted_by(leaf, node).values()) == {None}


async def test_a_cluster_waits_for_an_external_provider_that_is_down() -> None:
    clock = ManualClock()
    server = FakeVault(clock, down=ProviderUnavailable("asleep"))
    node = build_node(
        FakeLog(), clock=clock, server=server, bootstrap=parse_bootstrap("vault", {**VAULT_A, "cluster_id": CLUSTER_ID})
    )
    async with running(node):
        assert dict(node.authority.degraded)["CATrouble"].startswith("asleep\nthe CA was never founded")
        server.down, server.hang = None, asyncio.Event()
        await clock.advance(40)
        assert "did not answer in time" in dict(node.authority.degraded)["CATrouble"]
        server.hang = None
        await clock.advance(120)
        assert node.authority.degraded == ()
        assert await node.sign("web")


class TestLeaves:
    async def test_serials_are_the_providers_and_reach_the_ledger(self) -> None:
        node, server = scene()
        async with running(node):
            await put(node, VAULT_A)
            server.signed.clear()
            leaves = await node.sign("web", "db")
            rows = [row for within in node.state.ledger.hours.values() for row in within.rows.values()]
            assert [row.serial for row in rows] == [None, None]
            await node.clock.advance(1)
            rows = [row for within in node.state.ledger.hours.values() for row in within.rows.values()]
            assert {row.serial for row in rows} == {leaf.serial for leaf in leaves} == set(server.signed)
            assert len(node.log.applied(RecordSerials)) == 1
            for leaf in leaves:
                (row,) = [row for row in rows if row.serial == leaf.serial]
                assert leaf.not_after <= row.not_after
                facts = describe(split_chain(leaf.chain_pem)[0])
                assert (leaf.not_before, leaf.not_after) == (facts.not_before, facts.not_after)

    async def test_serials_that_cannot_be_booked_are_tried_again_a_few_times(self) -> None:
        node, _ = scene()
        async with running(node):
            await put(node, VAULT_A)
            await node.sign("web")
            node.log.fail_next(2)
            await node.clock.advance(10)
            assert len(node.log.applied(RecordSerials)) == 1
            (leaf,) = await node.sign("web")
            node.log.fail_next(50)
            with capture_logs() as logs:
                await node.clock.advance(10)
            assert [entry["leaves"] for entry in logs if "serials were not booked" in entry["event"]] == [1]
            assert leaf.serial

    async def test_a_signature_that_takes_too_long_is_dropped_and_others_are_not_held_up(self) -> None:
        node, _ = scene()
        async with running(node):
            await put(node, VAULT_A)
            node.external.hang = asyncio.Event()
            slow = [
                asyncio.ensure_future(node.authority.execute(Caller(), SignLeaves((csr_for("a"),)))) for _ in "1234"
            ]
            await settle()
            node.external.hang, released = None, node.external.hang
            assert await node.sign("b")
            await node.clock.advance(DROP_AFTER + 1)
            for call in slow:
                with pytest.raises(ProviderUnavailable, match="did not sign within 5 s"):
                    await call
            assert released is not None

    async def test_a_signature_that_a_stalled_process_finds_too_late_is_dropped(self) -> None:
        node, _ = scene()
        async with running(node):
            await put(node, VAULT_A)
            node.external.hang = asyncio.Event()
            call = asyncio.ensure_future(node.authority.execute(Caller(), SignLeaves((csr_for("a"),))))
            await settle()
            node.clock.jump(DROP_AFTER + 1)  # nobody wakes to notice before the answer is there
            node.external.hang.set()
            with pytest.raises(ProviderUnavailable, match="did not sign within 5 s"):
                await call

    async def test_a_leaf_that_was_booked_before_a_restore_is_not_given_out_after(self) -> None:
        node, _ = scene()
        async with running(node):
            await put(node, VAULT_A)
            past = node.state
            node.external.hang = asyncio.Event()
            signing = asyncio.ensure_future(node.authority.execute(Caller(), SignLeaves((csr_for("a"),))))
            await settle()
            for command in restores(past):
                node.log.commit(command)
            node.external.hang.set()
            with pytest.raises(NotLeader, match="the cluster was restored"):
                await signing
            await node.clock.advance(1)
            assert node.log.applied(RecordSerials) == []

    async def test_serials_of_leaves_from_before_a_restore_are_not_those_of_later_ones(self) -> None:
        node, _ = scene()
        async with running(node):
            await put(node, VAULT_A)
            past = restores(node.state)
            await node.sign("before")
            for command in past:
                node.log.commit(command)
            await settle()
            (after,) = await node.sign("after")
            await node.clock.advance(2)
            rows = [row for within in node.state.ledger.hours.values() for row in within.rows.values()]
            assert [(row.service, row.serial) for row in rows] == [("after", after.serial)]

    async def test_a_failure_of_one_leaf_is_its_own(self) -> None:
        node, server = scene()
        async with running(node):
            await put(node, VAULT_A)
            server.down = ProviderUnavailable("Vault is sealed")
            with pytest.raises(ProviderUnavailable, match="sealed"):
                await node.authority.execute(Caller(), SignLeaves((csr_for("a"),)))
            server.down = None
            assert await node.sign("a")


class TestChanges:
    @pytest.mark.parametrize(
        "config",
        [vault(Token="s.other"), vault(LeafCertTTL="24h"), vault(TLSServerName="x"), vault(CSRMaxPerSecond=5)],
        ids=["token", "leaf-ttl", "tls", "limit"],
    )
    async def test_what_does_not_touch_the_intermediate_is_stored(self, config: dict[str, object]) -> None:
        node, _ = scene()
        async with running(node):
            await put(node, VAULT_A)
            epoch, begun = node.state.ca_epoch, len(node.log.applied(BeginChange))
            changed = await put(node, config)
            assert not changed.rotated
            assert (node.state.ca_epoch, len(node.log.applied(BeginChange))) == (epoch, begun)
            assert len(node.log.applied(SetConfiguration)) == 1
            assert await node.sign("web")

    @pytest.mark.parametrize(
        "config",
        [vault(intermediate="inter-c"), vault(IntermediateCertTTL="1000h"), vault(PrivateKeyBits=384)],
        ids=["path", "ttl", "key"],
    )
    async def test_what_concerns_the_intermediate_makes_another_one(self, config: dict[str, object]) -> None:
        node, server = scene()
        async with running(node):
            await put(node, BUILTIN)
            await put(node, VAULT_A)
            before = await node.sign("web")
            root, signer, hops = active(node), active(node).signing_key_id, active(node).intermediates[1:]
            changed = await put(node, config)
            assert not changed.rotated
            assert active(node).id == root.id
            assert active(node).signing_key_id != signer
            assert active(node).intermediates[1:] == hops
            await assert_seamless(node, before)
            await node.clock.advance(RETIRED)
            await assert_seamless(node, before)
            assert server.standing == {(str(config["IntermediatePKIPath"]), active(node).epoch)}

    async def test_an_equal_configuration_changes_nothing_unless_the_root_did(self) -> None:
        node, server = scene()
        async with running(node):
            await put(node, VAULT_A)
            index, old = node.state.index, active(node)
            assert not (await put(node, VAULT_A)).rotated
            assert node.state.index == index
            pem = server.new_root("root-a", TRUST_DOMAIN)
            before = await node.sign("web")
            assert (await put(node, VAULT_A)).rotated
            assert active(node).pem == pem != old.pem
            await assert_seamless(node, before)

    async def test_without_cross_signing_the_old_server_is_not_called(self) -> None:
        node, server = scene()
        async with running(node):
            await put(node, VAULT_A)
            server.down = ProviderUnavailable("gone for good")
            with pytest.raises(ProviderUnavailable, match="ForceWithoutCrossSigning"):
                await put(node, BUILTIN)
            node.external.calls.clear()
            assert (await put(node, BUILTIN, ForceWithoutCrossSigning=True)).rotated
            assert node.external.calls == []
            assert await node.sign("web")
            await node.clock.advance(RETIRED)
            assert "CleanupOwed" in dict(node.authority.degraded)
            server.down = None
            await node.clock.advance(600)
            assert server.standing == set()
            assert node.authority.degraded == ()

    async def test_a_server_that_is_gone_keeps_nothing_else_from_being_cleaned_up(self) -> None:
        node, server = scene()
        async with running(node):
            await put(node, VAULT_A)
            owed = active(node).epoch
            server.down = ProviderUnavailable("gone for good")
            await put(node, BUILTIN, ForceWithoutCrossSigning=True)
            await node.clock.advance(RETIRED)
            assert "CleanupOwed" in dict(node.authority.degraded)
            await put(node, {**operator_root("ec-384"), **UNLIMITED})
            await node.clock.advance(RETIRED)
            assert [each.epoch for each in node.state.retiring] == [owed]
            assert "gone for good" in dict(node.authority.degraded)["CleanupOwed"]

    async def test_what_an_old_token_may_not_clean_up_any_more_the_one_in_force_does(self) -> None:
        node, server = scene()
        async with running(node):
            await put(node, VAULT_A)
            server.revoked.add("s.token")
            await put(node, vault("root-b", "inter-b", Token="s.new"))
            await node.clock.advance(RETIRED)
            assert server.standing == {("inter-b", active(node).epoch)}
            assert node.authority.degraded == ()

    @pytest.mark.parametrize("elsewhere", [{"Address": "https://other:8200"}, {"Namespace": "mesh"}])
    async def test_a_token_never_follows_a_clean_up_to_another_server_or_namespace(
        self, elsewhere: dict[str, object]
    ) -> None:
        node, server = scene()
        async with running(node):
            await put(node, VAULT_A)
            server.revoked.add("s.token")
            await put(node, vault("root-b", "inter-b", Token="s.new", **elsewhere))
            await node.clock.advance(RETIRED)
            assert "permission denied" in dict(node.authority.degraded)["CleanupOwed"]
            server.revoked.clear()
            await node.clock.advance(600)
            assert node.authority.degraded == ()

    @pytest.mark.parametrize("member", ["prepare", "sign_leaves"])
    async def test_a_change_that_fails_leaves_the_live_ca_and_what_it_made_is_cleaned_up(self, member: str) -> None:
        node, server = scene()
        async with running(node):
            await put(node, VAULT_A)
            root, standing = active(node), server.standing
            node.external.failures[member] = ProviderRefused("permission denied")
            with pytest.raises(ProviderRefused, match="permission denied"):
                await put(node, VAULT_B_SAME_PATH)
            node.external.failures.clear()
            assert active(node).id == root.id
            assert await node.sign("web")
            assert [each.root_id for each in node.state.retiring if each.epoch > active(node).epoch] == [""]
            await node.clock.advance(CLEAN_UP_AFTER + RETIRED)
            assert node.state.retiring == ()
            assert server.standing == standing
            assert (await put(node, VAULT_B_SAME_PATH)).rotated

    async def test_a_hanging_server_does_not_hold_a_change_up_for_ever(self) -> None:
        node, server = scene()
        async with running(node):
            await put(node, VAULT_A)
            root = active(node)
            for _ in range(2):
                server.hang = asyncio.Event()
                call = asyncio.ensure_future(put(node, VAULT_B))
                await node.clock.advance(CHANGE_MAX + 1)
                with pytest.raises(ProviderUnavailable, match="did not answer in time"):
                    await call
                server.hang = None
            assert active(node).id == root.id
            assert await node.sign("web")

    async def test_a_token_that_is_refused_changes_nothing(self) -> None:
        node, _ = scene()
        async with running(node):
            await put(node, VAULT_A)
            index = node.state.index
            with pytest.raises(InvalidConfig, match="token was refused"):
                await put(node, vault(Token="bad"))
            assert node.state.index == index

    async def test_warnings_of_the_provider_reach_the_caller(self) -> None:
        node, server = scene()
        async with running(node):
            server.intermediate_life = timedelta(hours=400)
            assert "the intermediate was clamped" in (await put(node, VAULT_A)).warnings


class TestRenewal:
    async def test_at_half_its_life_and_leaves_go_on(self) -> None:
        node, server = scene(leaf_cert_ttl="1h")
        async with running(node):
            server.intermediate_life = timedelta(hours=10)
            await put(node, vault(LeafCertTTL="1h"))
            before = await node.sign("web")
            signer, epoch, root = active(node).signing_key_id, node.state.ca_epoch, active(node)
            await node.clock.advance(4 * HOUR + 1800)
            assert active(node).signing_key_id == signer
            before = await node.sign("web")
            await node.clock.advance(1800 + 60)
            assert active(node).signing_key_id != signer
            assert active(node).id == root.id
            assert node.state.ca_epoch > epoch
            assert len(node.log.applied(SetIntermediate)) == 1
            await assert_seamless(node, before)
            await node.clock.advance(RETIRED)
            assert server.standing == {("inter-a", active(node).epoch)}
            assert node.state.configuration is not None
            assert len(node.log.applied(ActivateRoot)) == 2

    async def test_a_server_that_is_down_is_asked_again_and_costs_the_log_nothing(self) -> None:
        node, server = scene(leaf_cert_ttl="1h")
        async with running(node):
            server.intermediate_life = timedelta(hours=10)
            await put(node, vault(LeafCertTTL="1h"))
            server.down = ProviderUnavailable("asleep")
            begun = len(node.log.applied(BeginChange))
            await node.clock.advance(6 * HOUR)
            assert len(node.log.applied(BeginChange)) == begun
            assert "could not be renewed: asleep" in dict(node.authority.degraded)["IntermediateExpiring"]
            server.down = None
            await node.clock.advance(600)
            assert len(node.log.applied(SetIntermediate)) == 1
            assert node.authority.degraded == ()

    async def test_one_that_ends_with_its_root_or_lives_too_short_is_not_renewed_in_a_loop(self) -> None:
        node, server = scene(leaf_cert_ttl="1h")
        async with running(node):
            server.intermediate_life = timedelta(minutes=90)
            await put(node, vault(LeafCertTTL="1h"))
            await node.clock.advance(3 * HOUR)
            assert 4 <= len(node.log.applied(SetIntermediate)) <= 6

    async def test_one_that_is_gone_is_made_anew_at_once(self) -> None:
        node, server = scene()
        async with running(node):
            await put(node, VAULT_A)
            await node.clock.advance(60)
            server.signers["inter-a"].clear()
            with pytest.raises(ProviderUnavailable, match="gone"):
                await node.authority.execute(Caller(), SignLeaves((csr_for("a"),)))
            await node.clock.advance(60)
            assert await node.sign("web")
            assert len(node.log.applied(SetIntermediate)) == 1
            await node.clock.advance(RETIRED)
            assert node.authority.degraded == ()


class TestTending:
    async def test_troubles_are_shown_and_logged_when_they_come_and_go(self) -> None:
        node, server = scene()
        async with running(node):
            await put(node, VAULT_A)
            server.troubles = (("vault-token-expiring", "tomorrow"),)
            server.token_expires_at = 5.0
            with capture_logs() as logs:
                await node.clock.advance(100)
                assert node.authority.degraded == (("vault-token-expiring", "tomorrow"),)
                assert node.authority.token_expires_at == 5.0
                server.troubles = ()
                await node.clock.advance(100)
            assert not node.authority.degraded
            told = [entry["event"] for entry in logs if entry.get("code") == "vault-token-expiring"]
            assert told == ["the CA provider is in trouble", "a trouble of the CA provider is over"]

    async def test_a_server_that_hangs_is_a_trouble_and_nothing_else_waits_for_it(self) -> None:
        node, server = scene()
        async with running(node):
            await put(node, VAULT_A)
            node.log.commit(RecordSerials(1, ((1, 1, 1),), Index(0)))
            server.hang = asyncio.Event()
            await node.clock.advance(100)
            assert "ProviderUnavailable" in dict(node.authority.degraded)
            server.hang = None
            await node.clock.advance(100)
            assert node.authority.degraded == ()

    async def test_a_follower_has_no_troubles(self) -> None:
        node, server = scene()
        async with running(node):
            await put(node, VAULT_A)
            server.troubles = (("x", "y"),)
            await node.clock.advance(60)
            assert node.authority.degraded
            node.log.step_down()
            await settle()
            assert node.authority.degraded == ()


async def test_no_secret_is_logged_or_shown() -> None:
    node, _ = scene()
    with capture_logs() as logs:
        async with running(node):
            await put(node, vault(Token="s.very-secret"))
            await put(node, vault("root-b", Token="s.very-secret"))
    assert "s.very-secret" not in repr(logs)
    assert "s.very-secret" not in repr(node.state)
    assert Secret("s.very-secret").reveal() not in repr(node.authority)
