"""Everything that must be refused is, with a 4xx and a reason; nothing is changed by it, and memory stays flat."""

from __future__ import annotations

import asyncio
import gc
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from caserver.state.codec import encode_state
from tests.contract.bad_input import addresses, configurations, csrs, roots, wire
from tests.contract.bad_input.case import CONFIGURATION, SIGN, Case, put
from tests.contract.world import CLUSTER_ID, Answered, World, closed, parsed, running
from tests.testkit.keys import key_pem

TRUST_DOMAIN = f"{CLUSTER_ID}.consul"
CASES = (
    *csrs.cases(TRUST_DOMAIN),
    *roots.cases(TRUST_DOMAIN),
    *configurations.cases(),
    *addresses.cases(),
    *wire.cases(),
)
GROUPS: dict[str, list[Case]] = {}
for each in CASES:
    GROUPS.setdefault(each.name.partition("-")[0], []).append(each)
AT_LEAST = 300
ROUNDS = 2
GROWTH_MAX = 16 << 20  # bytes of resident memory from the first round to the last


async def sent(world: World, case: Case) -> Answered:
    """What one case is answered; no answer at all is a failure."""
    if case.raw is None:
        return await world.fetch(case.method, case.path, dict(case.headers), case.body)
    reader, writer = await asyncio.open_connection(*world.server.addresses[0])
    try:
        writer.write(case.raw)
        # Not until the end of the connection: it may linger for the rest of a body that is not read.
        async with asyncio.timeout(10):
            head = await reader.readuntil(b"\r\n\r\n")
            answered = parsed(head)
            body = await reader.readexactly(int(answered.headers["Content-Length"]))
    finally:
        await closed(writer)
    return replace(answered, body=body)


@asynccontextmanager
async def world_of_ours() -> AsyncIterator[World]:
    async with running(dev=False, cluster_id=CLUSTER_ID, config={"CSRMaxPerSecond": 0}) as world:
        yield world


def state_bytes(world: World) -> bytes:
    return b"".join(encode_state(world.log.state))


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_the_corpus_is_as_large_as_it_says() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= AT_LEAST


@pytest.mark.parametrize(
    "case",
    [
        put("csr", SIGN, csrs.good(TRUST_DOMAIN).pem()),
        put(
            "root",
            CONFIGURATION,
            {
                "Provider": "consul",
                "Config": {"RootCert": roots.good(TRUST_DOMAIN).pem(), "PrivateKey": key_pem("ec-256")},
            },
        ),
    ],
    ids=lambda case: case.name,
)
async def test_what_the_cases_were_broken_from_is_sound(case: Case) -> None:
    async with world_of_ours() as world:
        answered = await sent(world, case)

    assert answered.status == 200, answered.text


@pytest.mark.parametrize("group", sorted(GROUPS))
async def test_it_is_refused_with_a_reason_and_changes_nothing(group: str) -> None:
    async with world_of_ours() as world:
        before = state_bytes(world)
        for case in GROUPS[group]:
            answered = await sent(world, case)
            told = f"{case.name}: {answered.status} {answered.text[:300]}"

            assert 400 <= answered.status < 500, told
            assert case.bare or answered.text.strip(), told
            assert state_bytes(world) == before, told


async def test_memory_stays_flat() -> None:
    async with world_of_ours() as world:
        sizes = []
        for _ in range(ROUNDS):
            for case in CASES:
                await sent(world, case)
            gc.collect()
            sizes.append(resident())

    assert sizes[-1] - sizes[0] < GROWTH_MAX, json.dumps(sizes)
