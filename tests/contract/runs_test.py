"""Replays what was recorded over several steps: who wakes at a rotation, which spelling counts, what verifies, what is pruned."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Collection
from datetime import timedelta
from typing import Any

from caserver.pki.certificates import describe
from caserver.pki.chain import verify_chain
from tests.contract.recordings import RUNS
from tests.contract.replay_test import CONFIGURATION, assert_same_shape
from tests.contract.world import CLUSTER_ID, Answered, World, running
from tests.testkit.nodes import operator_root, split_chain

TRUST_DOMAIN = f"{CLUSTER_ID}.consul"
ROOTS = "/v1/connect/ca/roots"
LEAF = "/v1/agent/connect/ca/leaf/"
PATHS = {"roots": ROOTS, "agentroots": "/v1/agent/connect/ca/roots"}
WINDOW = 30.0  # seconds in which the leaves of so few services move


async def rotate(world: World, key: str) -> str:
    """Make an operator's root the active one; its PEM."""
    config = operator_root(key, trust_domain=TRUST_DOMAIN)
    body = json.dumps({"Provider": "consul", "Config": config}).encode()
    answered = await world.fetch("PUT", CONFIGURATION, body=body)
    assert answered.status == 200, answered.text
    return str(config["RootCert"])


async def fetched(world: World, path: str) -> Any:
    answered = await world.fetch("GET", path)
    assert answered.status == 200, answered.text
    return json.loads(answered.text)


async def blocked(world: World, count: int) -> None:
    """Return when so many queries wait."""
    async with asyncio.timeout(10):
        while world.node.blocked.count < count:  # noqa: ASYNC110 - counted by the server, who tells nobody
            await asyncio.sleep(0.001)


async def passed(world: World, tasks: Collection[asyncio.Task[Answered]], *, seconds: float, step: float) -> None:
    """Let virtual time pass until all tasks are done, ``seconds`` at most."""
    until = world.clock.monotonic() + seconds
    while not all(task.done() for task in tasks) and world.clock.monotonic() < until:
        await world.clock.advance(step)
        await asyncio.sleep(0.001)


async def test_who_waits_wakes_at_a_rotation_and_leaves_within_the_window() -> None:
    recorded = RUNS["c01-blocking-wakeup-on-rotation"]["results"]
    async with running(cluster_id=CLUSTER_ID) as world:
        paths = {name: PATHS.get(name) or LEAF + name.removeprefix("leaf-") for name in recorded}
        indexes = {name: (await world.fetch("GET", path)).headers["X-Consul-Index"] for name, path in paths.items()}
        began = world.clock.monotonic()
        ended: dict[str, float] = {}

        async def wait(name: str) -> Answered:
            answered = await world.fetch("GET", f"{paths[name]}?index={indexes[name]}&wait=60s")
            ended[name] = world.clock.monotonic() - began
            return answered

        waiting = {name: asyncio.ensure_future(wait(name)) for name in recorded}
        await blocked(world, len(recorded))
        await world.clock.advance(2.0)
        assert not ended
        await rotate(world, "ec-256")
        await asyncio.gather(waiting["roots"], waiting["agentroots"])
        assert ended["roots"] == ended["agentroots"] == 2.0
        await passed(world, waiting.values(), seconds=2 * WINDOW, step=0.25)
        answers = {name: await task for name, task in waiting.items()}

    leaves = [seconds for name, seconds in ended.items() if name.startswith("leaf-")]
    assert max(leaves) <= 2.0 + WINDOW + 0.5
    assert len(set(leaves)) > 1, "leaves move one by one, not all at once"
    for name, (_, status, _, certificates) in recorded.items():
        assert answers[name].status == status
        assert int(answers[name].headers["X-Consul-Index"]) > int(indexes[name])
        if name.startswith("leaf-"):
            assert len(split_chain(json.loads(answers[name].text)["CertPEM"])) == certificates


async def test_which_spelling_of_a_key_counts() -> None:
    # Consul keeps snake_case over HTTP without heeding it; here it means what it says.
    recorded = RUNS["c02-effective-key-spelling"]["results"] | {"leaf_cert_ttl": ["26h", 200, 26.0]}
    async with running() as world:
        for service, (key, (value, status, hours)) in enumerate(recorded.items()):
            body = json.dumps({"Provider": "consul", "Config": {key: value}}).encode()
            assert (await world.fetch("PUT", CONFIGURATION, body=body)).status == status
            leaf = describe(split_chain((await fetched(world, f"{LEAF}s{service}"))["CertPEM"])[0])
            assert (leaf.not_after - leaf.not_before) / 3600 == hours


async def test_a_leaf_verifies_under_every_root_under_which_consuls_did_and_under_those_it_left_behind() -> None:
    recorded = RUNS["c03-chain-verification"]["results"]
    stages = ("after R1", "after R2", "after R3")
    async with running(cluster_id=CLUSTER_ID) as world:
        trusted = [(await fetched(world, ROOTS))["Roots"][0]["RootCert"]]
        for stage, key in zip(stages, ("ec-256", "ec-384", "rsa-2048"), strict=True):
            trusted.append(await rotate(world, key))
            chain = split_chain((await fetched(world, f"{LEAF}{key}"))["CertPEM"])
            assert len(trusted) == len(recorded[stage]["verify"])
            for root in trusted:
                assert verify_chain(chain[0], chain[1:], (root,), world.clock.now()) is None


async def test_pruning_wakes_who_waits_for_roots() -> None:
    recording = RUNS["c04-roots-blocking-across-prune"]
    async with running(cluster_id=CLUSTER_ID) as world:
        await rotate(world, "ec-256")
        world.clock.jump(timedelta(hours=143, minutes=59).total_seconds())
        before = await world.fetch("GET", ROOTS)
        asked = f"{ROOTS}?index={before.headers['X-Consul-Index']}&wait=10m"
        waiting = asyncio.ensure_future(world.fetch("GET", asked))
        await blocked(world, 1)
        await passed(world, [waiting], seconds=500.0, step=10.0)
        answered = await waiting

    assert len(json.loads(before.text)["Roots"]) == 2
    assert answered.status == recording["response"]["status"]
    assert int(answered.headers["X-Consul-Index"]) > int(before.headers["X-Consul-Index"])
    assert_same_shape(json.loads(recording["response"]["body"]), json.loads(answered.text))
    assert [each["Active"] for each in json.loads(answered.text)["Roots"]] == [True]
