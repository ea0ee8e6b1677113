"""Clean-ups that are owed, over HTTP, on a node that leads and through one that does not."""

from __future__ import annotations

import json

import pytest

from tests.contract.world import World, running
from tests.testkit.nodes import operator_root

LIST, FORGET = "/v1/connect/ca/cleanup", "/v1/connect/ca/cleanup/forget"


async def owed(world: World) -> list[dict[str, object]]:
    answer = await world.fetch("GET", LIST)
    assert answer.status == 200, answer.text
    found: list[dict[str, object]] = json.loads(answer.text)["Cleanups"]
    return found


@pytest.mark.parametrize("leader", ["n1", "n2"])
async def test_a_clean_up_is_listed_and_given_up(leader: str) -> None:
    async with running(dev=False, leader=leader) as world:
        assert await owed(world) == []
        domain = world.log.state.trust_domain
        assert domain is not None
        config = operator_root("ec-256", trust_domain=domain)
        body = json.dumps({"Provider": "consul", "Config": config}).encode()
        put = await world.fetch("PUT", "/v1/connect/ca/configuration", body=body, advance=5)
        assert put.status == 200, put.text
        (one,) = await owed(world)
        assert (one["Provider"], one["Left"], one["Reason"]) == ("consul", [], "")
        answer = await world.fetch("PUT", f"{FORGET}?id={one['ID']}")
        assert (answer.status, json.loads(answer.text)) == (200, {"Success": True})
        assert await owed(world) == []


@pytest.mark.parametrize(("query", "status"), [("", 400), ("?id=", 400), ("?id=9", 404)])
async def test_nothing_else_is_given_up(query: str, status: int) -> None:
    async with running() as world:
        answer = await world.fetch("PUT", FORGET + query)
        assert answer.status == status
        assert "cleanup" in answer.text
