from __future__ import annotations

import asyncio

import pytest
import structlog

from caserver.authority.authority import Authority
from caserver.authority.ports import Providers
from caserver.environment import InlineWorkers
from caserver.errors import ConnectDisabled, InvalidConfig, NotInitialized, NotLeader, ProviderUnavailable
from caserver.internode.keyring import Keyring
from caserver.pki.certificates import describe
from caserver.providers.builtin import builtin_kind
from caserver.requests import Caller, CARequest, ChangeConfiguration, ReadAt, ReadIndex, SignLeaves
from caserver.state.commands import ActivateRoot, BeginChange, Bootstrap
from caserver.state.configuration import parse_bootstrap
from tests.testkit.access import access
from tests.testkit.fakes import FakeLog, ManualClock, SeededEntropy, settle
from tests.testkit.keys import key_pem
from tests.testkit.nodes import (
    CLUSTER_ID,
    DATACENTER,
    TRUST_DOMAIN,
    bootstrap_configuration,
    build_node,
    csr_for,
    leading_node,
    operator_root,
    running,
    why_not,
)


async def test_the_first_leader_gives_the_cluster_a_ca() -> None:
    async with leading_node() as node:
        assert [type(command) for command in node.log.applied()] == [Bootstrap, BeginChange, ActivateRoot]
        state, root = node.state, node.state.active_root
        assert state.cluster_id == CLUSTER_ID
        assert root is not None
        assert state.sealed_hmac_key is not None
        assert (root.provider, root.name, root.key_type, root.key_bits) == ("consul", "Consul CA Root Cert", "ec", 256)
        assert describe(root.pem).uri_sans == (f"spiffe://{TRUST_DOMAIN}",)
        assert root.intermediates == ()
        assert state.retiring == ()
        assert node.authority.degraded == ()


async def test_the_cluster_id_comes_from_the_operators_root_where_the_file_names_none() -> None:
    other = "99999999-aaaa-4bbb-8ccc-dddddddddddd"
    root = operator_root("ec-256", trust_domain=f"{other}.consul")
    async with leading_node(parse_bootstrap("consul", root)) as node:
        assert node.state.cluster_id == other
        active = node.state.active_root
        assert active is not None
        assert active.pem == root["RootCert"]


async def test_the_cluster_id_is_drawn_where_nothing_names_one() -> None:
    async with leading_node(parse_bootstrap(None, {})) as node:
        assert node.state.cluster_id is not None
        assert len(node.state.cluster_id) == 36


async def test_a_generated_root_follows_the_file() -> None:
    async with leading_node(
        bootstrap_configuration(private_key_type="rsa", private_key_bits=2048, root_cert_ttl="17520h")
    ) as node:
        root = node.state.active_root
        assert root is not None
        assert (root.key_type, root.key_bits) == ("rsa", 2048)
        assert root.not_after - root.not_before == 17520 * 3600
        assert root.not_before == int(node.clock.now().timestamp()) - 300


async def test_a_follower_does_nothing_and_says_who_it_is() -> None:
    log = FakeLog("leader")
    follower = build_node(log.elsewhere("follower"))
    async with running(follower):
        assert log.entries == ()
        for request in (SignLeaves(()), ChangeConfiguration("{}"), ReadIndex()):
            with pytest.raises(NotLeader):
                await follower.authority.execute(Caller(), request)


@pytest.mark.parametrize("request_", [SignLeaves(()), ChangeConfiguration("{}")], ids=str)
async def test_without_connect_every_operation_of_the_ca_says_so(request_: CARequest) -> None:
    async with running(build_node(FakeLog(), connect=False)) as node:
        with pytest.raises(ConnectDisabled):
            await node.authority.execute(Caller(), request_)
        assert node.log.entries == ()
        assert node.authority.degraded == ()


async def test_without_connect_the_log_can_still_be_read() -> None:
    log = FakeLog()
    async with running(build_node(log, connect=False)) as node:
        assert await node.authority.execute(Caller(), ReadIndex(consistent=True)) == ReadAt(log.state.index)


async def test_a_later_leader_only_reads_what_is_complete() -> None:
    async with leading_node() as first:
        (leaf,) = await first.sign("web")
        second = build_node(first.log.elsewhere("n2"), clock=first.clock, seed=2)
        entries = len(first.log.entries)
        async with running(second):
            second.log.become_leader()
            await settle()
            assert len(first.log.entries) == entries
            (again,) = await second.sign("web")
            root = second.state.active_root
            assert root is not None
            assert again.root_id == leaf.root_id == root.id
            assert why_not(again, root.pem, second.clock.now()) is None
            with pytest.raises(NotLeader):
                await first.sign("web")


@pytest.mark.parametrize(
    ("file", "changed", "named"),
    [
        ({"leaf_cert_ttl": "24h"}, {}, "LeafCertTTL"),
        ({"leaf_cert_ttl": "72h0m0s", "rotation_period": "2160h"}, {}, ""),
        ({}, {"LeafCertTTL": "24h"}, ""),  # which says nothing of it
        ({"leaf_cert_ttl": "24h"}, {"LeafCertTTL": "24h"}, ""),
        ({"private_key_bits": 384, "leaf_cert_ttl": "48h"}, {"LeafCertTTL": "24h"}, "LeafCertTTL, PrivateKeyBits"),
        (operator_root("ec-256"), {}, "PrivateKey, RootCert"),
    ],
)
async def test_a_file_that_is_not_in_force_is_named_by_who_leads(
    file: dict[str, object], changed: dict[str, object], named: str
) -> None:
    async with leading_node() as first:
        if changed:
            await first.configure({**changed, "CSRMaxPerSecond": 0})
        bootstrap = bootstrap_configuration(**file)
        second = build_node(first.log.elsewhere("n2"), clock=first.clock, seed=2, bootstrap=bootstrap)
        async with running(second):
            with structlog.testing.capture_logs() as lines:
                second.log.become_leader()
                await settle()

    found = [each["event"] for each in lines if each["log_level"] == "warning"]
    said = "of this node's file: not what is in force; it seeds the first bootstrap only, change the CA with"
    assert found == ([f"ca_config: {named} {said} `caserver connect ca set-config`"] if named else [])


async def test_nothing_is_generated_while_leadership_is_not_proven() -> None:
    log = FakeLog()
    log.unproven = True
    async with running(build_node(log)) as node:
        await node.clock.advance(60)
        assert log.entries == ()
        log.unproven = False
        await node.clock.advance(120)
        assert len(node.state.roots) == 1


async def test_ca_trouble_leaves_leadership_and_reads_alone_and_is_shown() -> None:
    broken = bootstrap_configuration(**{**operator_root("ec-256"), "PrivateKey": key_pem("ec-256-b")})
    async with running(build_node(FakeLog(), bootstrap=broken)) as node:
        assert node.log.leadership.is_leader
        assert node.log.entries == (), "a configuration that cannot work is not fixed for ever"
        assert {code for code, _ in node.authority.degraded} == {"CATrouble", "CANotInitialized"}
        assert await node.authority.execute(Caller(), ReadIndex()) == ReadAt(0)
        with pytest.raises(NotInitialized):
            await node.authority.execute(Caller(), SignLeaves((csr_for("web"),)))


async def test_trouble_that_passes_is_overcome_by_itself() -> None:
    node = build_node(FakeLog())
    node.control.failures["prepare"] = ProviderUnavailable("the backend is asleep")
    async with running(node):
        assert ("CATrouble", "the backend is asleep") in node.authority.degraded
        with pytest.raises(NotInitialized, match="asleep"):
            await node.authority.execute(Caller(), SignLeaves((csr_for("web"),)))
        await node.clock.advance(5)
        assert node.state.active_root is None
        node.control.failures.clear()
        await node.clock.advance(60)
        assert node.authority.degraded == ()
        assert await node.sign("web")


async def test_an_office_that_ends_by_itself_ends_the_authority() -> None:
    class Stopped(ManualClock):
        async def sleep(self, seconds: float) -> None:
            raise LookupError("a defect")

    node = build_node(FakeLog(), clock=Stopped())
    node.control.failures["prepare"] = ProviderUnavailable("the backend is asleep")

    with pytest.raises(LookupError, match="a defect"):
        await asyncio.wait_for(node.authority.run(), 10)


async def test_a_better_configuration_gets_a_ca_out_of_trouble() -> None:
    node = build_node(FakeLog())
    node.control.failures["prepare"] = ProviderUnavailable("the backend is asleep")
    async with running(node):
        node.control.failures.clear()
        assert (await node.configure({"PrivateKeyBits": 384, "CSRMaxPerSecond": 0})).rotated
        assert len(node.state.roots) == 1
        assert await node.sign("web")
        await node.clock.advance(60)
        assert len(node.state.roots) == 1
        assert node.authority.degraded == ()


@pytest.mark.parametrize("trouble", ["fail_next", "lose_next_reply", "lose_next_command"])
async def test_a_log_that_stumbles_delays_the_first_root_only(trouble: str) -> None:
    log = FakeLog()
    getattr(log, trouble)(3)
    async with running(build_node(log)) as node:
        await node.clock.advance(60)
        assert len(node.state.roots) == 1
        assert len(log.applied(Bootstrap)) == 1
        assert await node.sign("web")


async def test_a_cluster_secret_that_does_not_open_the_key_is_shown() -> None:
    async with leading_node() as first:
        log, clock, entropy = first.log.elsewhere("n2"), first.clock, SeededEntropy(3)
        own = access(log, keyring=Keyring([b"?" * 32]), clock=clock, entropy=entropy)
        stranger = Authority(
            log,
            providers=Providers({"consul": builtin_kind(clock, entropy, InlineWorkers())}),
            keyring=Keyring([b"?" * 32]),
            clock=clock,
            entropy=entropy,
            workers=InlineWorkers(),
            datacenter=DATACENTER,
            bootstrap=bootstrap_configuration(),
            gate=own.gate,
            tokens=own.tokens,
        )
        task = asyncio.ensure_future(stranger.run())
        log.become_leader()
        await settle()
        ((code, reason),) = stranger.degraded
        assert code == "CATrouble"
        assert "cluster_secret" in reason
        assert await stranger.execute(Caller(), ReadIndex(consistent=True)) == ReadAt(log.state.index)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_consistent_read_proves_leadership_first() -> None:
    async with leading_node() as node:
        steps = len(node.log.tripwire.steps)
        await node.authority.execute(Caller(), ReadIndex(consistent=False))
        assert len(node.log.tripwire.steps) == steps
        await node.authority.execute(Caller(), ReadIndex(consistent=True))
        assert node.log.tripwire.steps[steps:] == ["barrier"]


async def test_an_expired_root_is_shown() -> None:
    async with leading_node(bootstrap_configuration(**operator_root("ec-256", days=32))) as node:
        node.clock.jump(10 * 24 * 3600)
        assert [code for code, _ in node.authority.degraded] == ["CARootExpired"]


async def test_an_unknown_provider_in_the_state_is_refused_by_name() -> None:
    clock, log, entropy = ManualClock(), FakeLog(), SeededEntropy()
    own = access(log, keyring=Keyring([b"k" * 32]), clock=clock, entropy=entropy)
    bare = Authority(
        log,
        providers=Providers({}),
        keyring=Keyring([b"k" * 32]),
        clock=clock,
        entropy=entropy,
        workers=InlineWorkers(),
        datacenter=DATACENTER,
        bootstrap=bootstrap_configuration(),
        gate=own.gate,
        tokens=own.tokens,
    )
    task = asyncio.ensure_future(bare.run())
    await settle()
    told = dict(bare.degraded)["CATrouble"]
    assert told.startswith('could not initialize provider: unknown CA provider "consul"\nthe CA was never founded')
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_faults_of_a_change_name_the_field() -> None:
    async with leading_node() as node:
        with pytest.raises(InvalidConfig, match="LeafCertTTL"):
            await node.configure({"LeafCertTTL": "1s"})
