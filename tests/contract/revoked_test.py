"""What requests on their way come to when a token is taken away, or the state of another time is restored."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from structlog.testing import capture_logs

from caserver.internode.keyring import Sealed
from caserver.state.acl import ANONYMOUS_ID, MANAGEMENT_ID
from caserver.state.acl_commands import DeleteToken
from caserver.state.commands import BeginChange
from caserver.state.model import HOUR
from tests.contract.snapshot_test import PATH, save, unchunked, until
from tests.contract.world import Answered, World, running
from tests.testkit.acl_world import MASTER, ON, get, guarded, made_token, put
from tests.testkit.states import restores

MANAGEMENT = [{"Name": "global-management"}]


def take_away(world: World, token: Mapping[str, Any]) -> None:
    """Delete a token behind the back of the node under test."""
    world.log.commit(DeleteToken("taken away", int(world.clock.now().timestamp()), token["AccessorID"]))


async def configure(world: World, token: str, config: Mapping[str, object]) -> Answered:
    return await put(world, "/v1/connect/ca/configuration", {"Provider": "consul", "Config": config}, token)


@pytest.mark.parametrize("path", ["/v1/acl/tokens", "/v1/connect/ca/configuration", PATH, "/v1/operator/keyring"])
async def test_a_follower_whose_copy_was_behind_refuses_as_soon_as_it_is_fresh(path: str) -> None:
    async with guarded(dev=False, node="n2") as world:
        token = await made_token(world, Policies=MANAGEMENT)
        assert (await get(world, path, token["SecretID"])).status == 200
        world.hop.before = lambda: take_away(world, token)
        answer = await get(world, path, token["SecretID"])

    assert (answer.status, answer.text) == (403, "ACL not found")


async def test_who_may_not_restore_takes_nobodys_place() -> None:
    async with guarded(dev=False, node="n2") as world:
        saved = unchunked((await get(world, PATH)).body)
        world.log.step_down()
        idle = world.log.waiting
        stranger = asyncio.ensure_future(world.fetch("PUT", PATH, body=saved))
        await until(lambda: world.log.waiting > idle)
        own = asyncio.ensure_future(world.fetch("PUT", PATH, {"X-Consul-Token": MASTER}, saved))
        await until(lambda: own.done() or world.log.waiting > idle + 1)
        world.log.views[0].become_leader()

        assert [(await stranger).status, (await own).status] == [403, 200]


async def test_a_state_of_before_access_control_comes_back_with_access_control() -> None:
    async with running() as before:
        saved = await save(before)
    async with guarded(replace(ON, initial_management=None)) as world:
        secret = json.loads((await world.fetch("PUT", "/v1/acl/bootstrap")).text)["SecretID"]
        assert (await world.fetch("PUT", PATH, {"X-Consul-Token": secret}, saved.body)).status == 200
        stranger = await world.fetch("PUT", "/v1/acl/bootstrap")
        acl, reset = world.log.state.acl, world.accesses["n1"].reset
        reset.index = acl.bootstrap_index
        again = await world.fetch("PUT", "/v1/acl/bootstrap")

        assert (ANONYMOUS_ID in acl.tokens, MANAGEMENT_ID in acl.policies) == (True, True)
        assert (stranger.status, again.status) == (403, 200), again.text


async def test_the_management_token_of_the_file_counts_after_a_restore() -> None:
    async with running() as before:
        saved = await save(before)
    async with guarded() as world:
        assert (await world.fetch("PUT", PATH, {"X-Consul-Token": MASTER}, saved.body)).status == 200
        assert (await get(world, "/v1/acl/tokens")).status == 200


async def test_tokens_that_cannot_be_checked_keep_nobody_from_what_needs_none() -> None:
    async with guarded() as world:
        for command in restores(replace(world.log.state, sealed_hmac_key=Sealed(b"of another key" * 5))):
            world.log.commit(command)
        open_to_all = await get(world, "/v1/status/ready")
        closed = await get(world, "/v1/connect/ca/configuration")

    assert open_to_all.status == 200
    assert (closed.status, "no token can be checked on this node" in closed.text) == (503, True)


async def test_a_restore_tells_which_tokens_count_again() -> None:
    async with guarded() as world:
        old = await made_token(world, Policies=MANAGEMENT)
        saved = unchunked((await get(world, PATH)).body)
        await world.fetch("DELETE", f"/v1/acl/token/{old['AccessorID']}", {"X-Consul-Token": MASTER})
        made = [await made_token(world) for _ in range(2)]
        with capture_logs() as logs:
            assert (await world.fetch("PUT", PATH, {"X-Consul-Token": MASTER}, saved)).status == 200
        own = [(await get(world, "/v1/acl/token/self", each["SecretID"])).status for each in (old, *made)]

    assert own == [200, 403, 403]
    (told,) = [each for each in logs if each["event"] == "the cluster is restored"]
    assert (told["tokens_back"], told["tokens_gone"]) == (1, 2)


async def test_a_change_that_waited_for_its_turn_is_not_made_for_a_token_that_is_gone() -> None:
    with capture_logs() as logs:
        async with guarded() as world:
            token = await made_token(world, 'operator = "write"')
            world.log.hold(BeginChange)
            first = asyncio.ensure_future(configure(world, MASTER, {"PrivateKeyBits": 384}))
            await until(lambda: world.log.held > 0)
            second = asyncio.ensure_future(configure(world, token["SecretID"], {"LeafCertTTL": "24h"}))
            await until(lambda: sum(each["event"] == "CA configuration write" for each in logs) > 1)
            take_away(world, token)
            world.log.release()

            assert [(await first).status, (await second).status] == [200, 403]
            assert world.log.state.configuration is not None
            assert world.log.state.configuration.stored.effective.leaf_ttl == 72 * HOUR


async def test_a_restore_that_waited_for_its_turn_is_not_made_for_a_token_that_is_gone() -> None:
    async with guarded() as world:
        token = await made_token(world, Policies=MANAGEMENT)
        saved = unchunked((await get(world, PATH)).body)
        world.log.hold(BeginChange)
        first = asyncio.ensure_future(configure(world, MASTER, {"PrivateKeyBits": 384}))
        await until(lambda: world.log.held > 0)
        second = asyncio.ensure_future(world.fetch("PUT", PATH, {"X-Consul-Token": token["SecretID"]}, saved))
        await until(lambda: world.log.state.restoring is not None)
        take_away(world, token)
        world.log.release()

        assert [(await first).status, (await second).status] == [200, 403]
        assert world.log.state.restored_index == 0
