"""Who has no valid token changes nothing and slows nobody who has one, while ACLs are on."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from caserver.api.pace import BURST
from caserver.api.server import DOUBTFUL_BODIES, ApiServer, Listener
from caserver.state.codec import encode_state
from tests.contract.acl_table_test import LINES
from tests.contract.world import Answered, World, closed, running
from tests.testkit.acl_world import MASTER, UNKNOWN, get, guarded

ROOTS = "/v1/connect/ca/roots"
SIGN = "/v1/connect/ca/sign"


@pytest_asyncio.fixture
async def world() -> AsyncIterator[World]:
    async with guarded() as found:
        yield found


async def serve_at(world: World, strangers_per_second: float) -> None:
    """Put a server in place that lets so many strangers in."""
    await world.server.close()
    world.server = ApiServer(world.node, [Listener("127.0.0.1", 0)], strangers_per_second=strangers_per_second)
    await world.server.start()


@pytest.mark.parametrize("token", ["", UNKNOWN], ids=["none", "unknown"])
async def test_no_call_of_a_stranger_changes_anything(world: World, token: str) -> None:
    before = b"".join(encode_state(world.log.state))
    for (method, path), line in LINES.items():
        body = b"" if line.body is None else json.dumps(line.body).encode()
        await world.fetch(method, line.path or path, {"X-Consul-Token": token} if token else {}, body)

        assert b"".join(encode_state(world.log.state)) == before, f"{method} {path}"
    assert world.reloads.count == 0


async def test_strangers_wait_while_callers_with_a_token_do_not(world: World) -> None:
    await serve_at(world, 10.0)
    strangers = [asyncio.ensure_future(world.fetch("GET", ROOTS)) for _ in range(BURST)]
    assert {each.status for each in await asyncio.gather(*strangers)} == {200}
    late = [asyncio.ensure_future(world.fetch("GET", path)) for path in (ROOTS, "/v1/nope", ROOTS + "?index=x")]

    for headers, query in (
        ({"X-Consul-Token": MASTER}, ""),
        ({"Authorization": f"Bearer {MASTER}"}, ""),
        ({}, f"?token={MASTER}"),
    ):
        answered = await world.fetch("GET", "/v1/connect/ca/configuration" + query, headers)
        assert answered.status == 200
    assert not any(each.done() for each in late)
    while not all(each.done() for each in late):
        await world.clock.advance(0.1)
        await asyncio.sleep(0.001)

    assert sorted(each.result().status for each in late) == [200, 400, 404]


async def test_without_acls_nobody_waits() -> None:
    async with running() as world:
        await serve_at(world, 0.001)
        answers = [await world.fetch("GET", ROOTS) for _ in range(2 * BURST)]

    assert {each.status for each in answers} == {200}


async def test_a_server_that_closes_lets_nobody_wait(world: World) -> None:
    await serve_at(world, 0.001)
    waiting = [asyncio.ensure_future(world.fetch("GET", ROOTS)) for _ in range(BURST + 3)]
    done, late = set[asyncio.Task[Answered]](), set(waiting)
    while len(done) < BURST:
        done, late = await asyncio.wait(waiting, timeout=0.01)
    await world.server.close()

    for each in late:
        with pytest.raises((IndexError, ConnectionError)):  # closed without an answer
            await each


async def invited(world: World, token: str = "") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection that waits for leave to send its body."""
    reader, writer = await asyncio.open_connection(*world.server.addresses[0])
    shown = f"X-Consul-Token: {token}\r\n" if token else ""
    head = f"PUT {SIGN} HTTP/1.1\r\nHost: x\r\n{shown}Expect: 100-continue\r\nContent-Length: 500000\r\n\r\n"
    writer.write(head.encode())
    return reader, writer


async def test_of_callers_who_will_be_refused_few_send_a_body_at_a_time(world: World) -> None:
    strangers = [await invited(world, token) for token in [UNKNOWN] * DOUBTFUL_BODIES]
    for reader, _ in strangers:
        assert b"100 Continue" in await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
    late, late_writer = await invited(world)
    waiting = asyncio.ensure_future(late.readuntil(b"\r\n\r\n"))
    known, known_writer = await invited(world, MASTER)
    assert b"100 Continue" in await asyncio.wait_for(known.readuntil(b"\r\n\r\n"), 10)
    assert (await get(world, "/v1/acl/token/self", UNKNOWN)).status == 403  # what has no body is answered meanwhile
    assert not waiting.done()

    strangers[0][1].write(b"x" * 500000)
    assert b"403" in await asyncio.wait_for(strangers[0][0].readuntil(b"\r\n\r\n"), 10)
    assert b"100 Continue" in await asyncio.wait_for(waiting, 10)
    for writer in (late_writer, known_writer, *(writer for _, writer in strangers)):
        await closed(writer)
