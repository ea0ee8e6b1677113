"""A cluster whose first configuration was wrong: founded with a better one, without a restart."""

from __future__ import annotations

import asyncio
import json

import pytest

from caserver.errors import Conflict, InvalidConfig, NotInitialized, ProviderUnavailable
from caserver.requests import Caller, ChangeConfiguration
from caserver.state.commands import Bootstrap
from caserver.state.configuration import CAConfiguration, parse_bootstrap
from tests.testkit.external import FakeVault
from tests.testkit.fakes import FakeLog, ManualClock, settle
from tests.testkit.nodes import CLUSTER_ID, Node, bootstrap_configuration, build_node, operator_root, running

SEED = {
    "address": "https://vault:8200",
    "token": "bad",
    "root_pki_path": "root-a",
    "intermediate_pki_path": "inter-a",
    "csr_max_per_second": 0,
    "cluster_id": CLUSTER_ID,
}
WANTED = {
    "Address": "https://vault:8200",
    "Token": "s.good",
    "RootPKIPath": "root-a",
    "IntermediatePKIPath": "inter-a",
    "CSRMaxPerSecond": 0,
}


def seed(**changes: object) -> CAConfiguration:
    return parse_bootstrap("vault", {**SEED, **changes})


def scene(bootstrap: CAConfiguration | None = None) -> tuple[Node, FakeVault]:
    """A node whose file has a wrong token."""
    clock = ManualClock()
    server = FakeVault(clock)
    return build_node(FakeLog(), clock=clock, server=server, bootstrap=bootstrap or seed()), server


async def unfounded(node: Node) -> None:
    await node.clock.advance(300)  # long enough for the pauses between two tries to be long
    assert node.state.cluster_id is None
    told = dict(node.authority.degraded)["CATrouble"]
    assert "the Vault token was refused" in told
    assert "correct ca_config" in told
    with pytest.raises(NotInitialized):
        await node.sign("web")


async def test_a_corrected_file_founds_the_ca_at_once() -> None:
    node, _ = scene()
    async with running(node):
        await unfounded(node)
        node.authority.reseed(seed(token="s.good"))
        await settle()
        assert node.state.active_root is not None
        assert await node.sign("web")
        assert "CATrouble" not in dict(node.authority.degraded)


async def test_a_corrected_file_counts_for_nothing_once_the_ca_is_founded() -> None:
    node, _ = scene(seed(token="s.good"))
    async with running(node):
        root = node.state.active_root
        assert root is not None
        assert node.authority.is_founded
        node.authority.reseed(seed(token="s.good", root_pki_path="root-b"))
        await node.clock.advance(300)
        assert node.state.active_root == root


async def test_a_configuration_that_is_written_founds_the_ca() -> None:
    node, _ = scene()
    async with running(node):
        await unfounded(node)
        changed = await node.configure(WANTED, provider="vault", request_id="r1")
        assert changed.rotated
        assert len(node.state.roots) == 1
        assert await node.sign("web")
        assert await node.configure(WANTED, provider="vault", request_id="r1") == changed
        await node.clock.advance(60)
        assert node.authority.degraded == ()
        assert len(node.state.roots) == 1


async def test_another_provider_founds_the_ca_as_well_and_under_the_id_of_the_file() -> None:
    node, _ = scene()
    async with running(node):
        await unfounded(node)
        await node.configure({**operator_root("ec-256"), "CSRMaxPerSecond": 0}, cas=0)
        assert node.state.cluster_id == CLUSTER_ID
        assert await node.sign("web")


async def test_what_is_written_and_wrong_too_founds_nothing() -> None:
    node, server = scene()
    async with running(node):
        await unfounded(node)
        with pytest.raises(InvalidConfig, match="the Vault token was refused"):
            await node.configure({**WANTED, "Token": "bad"}, provider="vault")
        with pytest.raises(InvalidConfig, match="RootPKIPath"):
            await node.configure({**WANTED, "RootPKIPath": None}, provider="vault")
        with pytest.raises(Conflict):
            await node.configure(WANTED, provider="vault", cas=7)
        server.down = ProviderUnavailable("asleep")
        with pytest.raises(ProviderUnavailable):
            await node.configure(WANTED, provider="vault")
        assert node.state.cluster_id is None
        server.down = None
        assert (await node.configure(WANTED, provider="vault")).rotated


async def test_a_secret_that_is_left_out_is_that_of_the_file() -> None:
    node, server = scene(seed(token="s.good"))
    server.down = ProviderUnavailable("asleep")
    async with running(node):
        await node.clock.advance(300)
        assert node.state.cluster_id is None
        server.down = None
        body = {key: value for key, value in WANTED.items() if key != "Token"} | {"LeafCertTTL": "24h"}
        request = ChangeConfiguration(body=json.dumps({"Provider": "vault", "Config": body}))
        await node.authority.execute(Caller(), request)
        assert await node.sign("web")
        configuration = node.state.configuration
        assert configuration is not None
        assert configuration.stored.effective.leaf_ttl == 24 * 3600


async def test_whoever_founds_first_founds() -> None:
    """The file becomes good in the very moment in which somebody writes: both are right, and there is one root."""
    node, server = scene()
    async with running(node):
        await unfounded(node)
        server.latency = 0.01
        node.authority.reseed(seed(token="s.good"))
        await node.configure(WANTED, provider="vault")
        server.latency = 0.0
        await node.clock.advance(60)
        assert len(node.state.roots) == 1
        assert len(server.roots["root-a"]) == 1
        assert await node.sign("web")


async def test_of_two_who_found_on_nothing_only_one_does() -> None:
    node, _ = scene()
    async with running(node):
        await unfounded(node)
        node.log.hold(Bootstrap)
        vault = asyncio.create_task(node.configure(WANTED, provider="vault", cas=0))
        await settle()
        own = asyncio.create_task(node.configure({**operator_root("ec-256"), "CSRMaxPerSecond": 0}, cas=0))
        await settle()
        assert node.log.held == 2
        node.log.release()
        answers = await asyncio.gather(vault, own, return_exceptions=True)
        await settle()

        assert [isinstance(each, Conflict) for each in answers] == [False, True]
        assert [root.provider for root in node.state.roots] == ["vault"]


async def test_a_node_without_the_office_takes_note_of_the_file_for_later() -> None:
    log = FakeLog()
    node = build_node(log.elsewhere("n2"), bootstrap=bootstrap_configuration())
    async with running(node):
        node.authority.reseed(bootstrap_configuration(leaf_cert_ttl="24h"))
        await settle()
        assert node.state.cluster_id is None
        node.log.become_leader()
        await settle()
        configuration = node.state.configuration
        assert configuration is not None
        assert configuration.stored.effective.leaf_ttl == 24 * 3600
