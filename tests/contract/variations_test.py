"""The recordings, varied: what they show of one endpoint holds for all, in every combination of method, path, option and encoding."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress

import pytest
import pytest_asyncio

from caserver.api.routes import EXACT, ROUTES, SUBTREES, Route
from caserver.api.server import ApiServer, Listener
from caserver.archive import read_meta
from tests.contract.world import Answered, World, closed, parsed, running

CONFIGURATION = "/v1/connect/ca/configuration"
ROOTS = "/v1/connect/ca/roots"
AGENT_ROOTS = "/v1/agent/connect/ca/roots"
LEAF = "/v1/agent/connect/ca/leaf/web"
METHODS = ("GET", "PUT", "POST", "DELETE", "PATCH", "HEAD", "TRACE")
JSON = "application/json"
INDENTED_ALWAYS = {"/v1/agent/metrics"}
BLOCKING = (ROOTS, AGENT_ROOTS, LEAF)
# What one connection may be asked without a body, one path of each route that answers JSON to GET.
READ = tuple(
    route.path + {"/v1/agent/connect/ca/leaf/": "web", "/v1/health/node/": "n1"}.get(route.path, "")
    for route in ROUTES
    if "GET" in route.handlers and not route.path.startswith(("/v1/snapshot", "/v1/acl"))
)


@pytest_asyncio.fixture(params=[False, True], ids=["server", "dev"])
async def world(request: pytest.FixtureRequest) -> AsyncIterator[World]:
    async with running(dev=request.param) as found:
        yield found


@pytest_asyncio.fixture
async def server() -> AsyncIterator[World]:
    async with running(dev=False) as found:
        yield found


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.path)
async def test_a_method_is_refused_or_offered_in_one_way(server: World, route: Route) -> None:
    allow = ",".join(("OPTIONS", *route.handlers))
    path = route.path + ("x" if route.subtree else "")
    offered = await server.fetch("OPTIONS", path)
    assert (offered.status, offered.body, offered.headers["Allow"]) == (200, b"", allow)
    assert "Content-Type" not in offered.headers

    for method in METHODS:
        if method in route.handlers:
            continue
        answered = await server.fetch(method, path)
        text = f"method {method} not allowed"
        assert answered.status == 405
        assert answered.headers["Allow"] == allow
        assert answered.headers["Vary"] == "Accept-Encoding"
        assert answered.headers["Content-Type"] == "text/plain; charset=utf-8"
        assert answered.headers["Content-Length"] == str(len(text))
        assert answered.text == ("" if method == "HEAD" else text)


@pytest.mark.parametrize("path", EXACT)
async def test_a_path_is_found_as_it_is_written_or_not_at_all(server: World, path: str) -> None:
    for other in (path + "/", path.upper(), path + "x", path + "%20", path + ";a", path[:-1]):
        if other in EXACT or any(other.startswith(each.path) for each in SUBTREES):
            continue
        answered = await server.fetch("GET", other)
        assert (answered.status, answered.body) == (404, b""), other
        assert not {"Content-Type", "Vary", "X-Consul-Index", "Allow"} & set(answered.headers)
    for other in ("/" + path, path.replace("/v1/", "/v1//"), "/x/.." + path, "/." + path):
        moved = await server.fetch("GET", other + "?stale&pretty")
        if other != path:  # not every path has a "/v1/" to double
            assert (moved.status, moved.headers["Location"]) == (301, path + "?stale&pretty")
            assert moved.text == f'<a href="{path}?stale&amp;pretty">Moved Permanently</a>.\n\n'
            assert moved.headers["Content-Type"] == "text/html; charset=utf-8"
            assert "Vary" not in moved.headers


@pytest.mark.parametrize(
    "route", [each for each in SUBTREES if each.path.rstrip("/") not in EXACT], ids=lambda route: route.path
)
async def test_a_subtree_without_its_slash_moves(server: World, route: Route) -> None:
    moved = await server.fetch("GET", route.path.rstrip("/") + "?a=b")

    assert (moved.status, moved.headers["Location"]) == (301, route.path + "?a=b")


@pytest.mark.parametrize("path", READ)
async def test_json_is_laid_out_as_was_asked(world: World, path: str) -> None:
    for query in ("", "?pretty", "?pretty=false", "?pretty=1", "?foo=bar&pretty"):
        answered = await world.fetch("GET", path + query)
        assert (answered.status, answered.headers["Content-Type"]) == (200, JSON), answered.text
        indented = world.node.dev or "pretty" in query or path in INDENTED_ALWAYS
        found = json.loads(answered.text)
        assert answered.text == (
            json.dumps(found, indent=4, ensure_ascii=False) + "\n"
            if indented
            else json.dumps(found, separators=(",", ":"), ensure_ascii=False)
        ).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


ENCODINGS = {
    "gzip": True,
    "GZIP": True,
    "deflate, gzip;q=0.5": True,
    "gzip;q=1.0, *;q=0": True,
    "br": False,
    "*": False,
    "identity": False,
    "gzip;q=0": False,
    "gzip;q=0.0": False,
    "xgzip": False,
    "": False,
    "gzip ; q=0.2": True,
    "gzip;q=0, gzip": True,
    "gzip, gzip;q=0": False,
    "gzip;q=x": False,
    "gzip;q=-1": False,
    "gzip;level=9;q=0.00": False,
}


@pytest.mark.parametrize("path", [*READ, ROOTS + "?index=x", "/v1/nope"])
async def test_a_body_is_zipped_for_who_names_gzip(server: World, path: str) -> None:
    for accepted, zipped in ENCODINGS.items():
        answered = await server.fetch("GET", path, {"Accept-Encoding": accepted})
        known = answered.status != 404

        assert ("Content-Encoding" in answered.headers) is (zipped and known), accepted
        assert ("Vary" in answered.headers) is known
        assert int(answered.headers["Content-Length"]) == len(answered.body)
        if zipped and known:
            assert gzip.decompress(answered.body)


FAULTS = {
    "index=abc": "Invalid index",
    "index=-1": "Invalid index",
    "wait=xyz": "Invalid wait time",
    "wait=10": "Invalid wait time",
    "stale&consistent": "Cannot specify ?stale with ?consistent, conflicting semantics.",
    "max_stale=bad": 'Invalid max_stale value "bad"',
}


@pytest.mark.parametrize("path", READ)
async def test_options_are_read_before_anything_else(server: World, path: str) -> None:
    for query, text in FAULTS.items():
        answered = await server.fetch("GET", f"{path}?{query}")
        assert (answered.status, answered.text) == (400, text)
        assert not {"X-Consul-Index", "X-Cache"} & set(answered.headers)
    answered = await server.fetch("GET", path, {"Cache-Control": "max-age=x"})
    assert (answered.status, answered.text) == (400, "Invalid Cache-Control header.")


async def test_a_change_has_no_use_for_the_options_of_a_read(server: World) -> None:
    body = b'{"Provider":"consul","Config":{"LeafCertTTL":"48h"}}'
    for query in FAULTS:
        answered = await server.fetch("PUT", f"{CONFIGURATION}?{query}", {"Cache-Control": "max-age=x"}, body=body)
        assert (answered.status, answered.body) == (200, b"")
    assert (await server.fetch("PUT", CONFIGURATION + "?dc=nope", body=body)).text == "No path to datacenter"
    assert (await server.fetch("PUT", CONFIGURATION + "?a=%zz", body=body)).status == 400


@pytest.mark.parametrize("path", READ)
async def test_another_datacenter_is_out_of_reach(server: World, path: str) -> None:
    told = not path.startswith(("/v1/agent/", "/v1/status/live", "/v1/status/ready", "/openapi.json"))
    if told or "/ca/" in path:
        answered = await server.fetch("GET", path + "?dc=nope")
        assert (answered.status, answered.text) == (400, "No path to datacenter")


@pytest.mark.parametrize("what", ["%00", "%09", "%0d%0aX:y", "%7f", "%C2%A0", "%E2%80%AE", "%zz", "%2", "%"])
async def test_a_path_that_cannot_be_printed_is_refused(server: World, what: str) -> None:
    for path in ("/v1/nope/", ROOTS, "//v1/acl/policy/name/"):
        answered = await server.fetch("GET", path + what)
        assert (answered.status, answered.body) == (400, b"")
        assert not {"Content-Type", "Vary", "X-Consul-Index", "Location"} & set(answered.headers)
    assert (await server.fetch("GET", LEAF + what)).status == 400


@pytest.mark.parametrize("node", ["n1", "n2"], ids=["leader", "follower"])
@pytest.mark.parametrize("path", BLOCKING)
async def test_an_index_that_is_not_passed_is_waited_for_on_every_node(node: str, path: str) -> None:
    async with running(dev=False, node=node, leader="n1") as world:
        first = await world.fetch("GET", path)
        index = int(first.headers["X-Consul-Index"])
        for asked, waits in ((0, False), (index - 1, False), (index, True), (index + 1000, True)):
            before = world.clock.monotonic()
            answered = await world.fetch("GET", f"{path}?index={asked}&wait=2s", advance=5.0 if waits else 0.0)
            waited = world.clock.monotonic() - before
            assert answered.status == 200
            assert answered.headers["X-Consul-Index"] == str(index)
            assert answered.body == first.body
            # Virtual time moves in quarters; what comes on top of two seconds is jitter, one sixteenth at most.
            assert (2.0 <= waited <= 2.75) if waits else waited == 0


@pytest.mark.parametrize(
    "query", ["", "?stale", "?consistent", "?stale&max_stale=1h", "?dc=dc1", "?near=_agent&filter=x"]
)
@pytest.mark.parametrize("node", ["n1", "n2"], ids=["leader", "follower"])
async def test_every_read_is_the_same_whatever_freshness_is_asked_for(node: str, query: str) -> None:
    async with running(dev=False, node=node, leader="n1") as world:
        plain: Mapping[str, Answered] = {path: await world.fetch("GET", path) for path in (ROOTS, CONFIGURATION)}
        for path, expected in plain.items():
            answered = await world.fetch("GET", path + query)
            assert (answered.status, answered.body) == (200, expected.body)
            assert set(answered.headers) == set(expected.headers)


async def exchanged(world: World, sent: bytes, count: int = 1) -> list[Answered]:
    """What is answered to bytes on one connection, ``count`` answers."""
    reader, writer = await asyncio.open_connection(*world.server.addresses[0])
    try:
        writer.write(sent)
        found = []
        async with asyncio.timeout(20):
            for _ in range(count):
                answered = parsed(await reader.readuntil(b"\r\n\r\n"))
                answered.body = await reader.readexactly(int(answered.headers.get("Content-Length", 0)))
                found.append(answered)
        return found
    finally:
        await closed(writer)


async def test_requests_in_a_row_are_answered_in_order(server: World) -> None:
    line = "GET {} HTTP/1.1\r\nhost: localhost\r\n\r\n"
    paths = (ROOTS, "/v1/nope", LEAF, "/v1/status/leader", CONFIGURATION + "?index=x")
    answers = await exchanged(server, "".join(map(line.format, paths)).encode(), len(paths))

    assert [each.status for each in answers] == [200, 404, 200, 200, 400]
    assert json.loads(answers[2].text)["Service"] == "web"


async def test_a_client_of_http_1_0_gets_a_plain_answer(server: World) -> None:
    (closing,) = await exchanged(server, f"GET {ROOTS} HTTP/1.0\r\n\r\n".encode())
    (kept,) = await exchanged(server, f"GET {ROOTS} HTTP/1.0\r\nConnection: keep-alive\r\n\r\n".encode())

    assert closing.status == kept.status == 200
    assert closing.body == kept.body
    assert "Transfer-Encoding" not in closing.headers
    assert kept.headers["Connection"].lower() == "keep-alive"


async def test_a_client_of_http_1_0_gets_a_file_with_its_length(server: World) -> None:
    (answered,) = await exchanged(server, b"GET /v1/snapshot HTTP/1.0\r\n\r\n")

    assert answered.status == 200
    assert "Transfer-Encoding" not in answered.headers
    assert read_meta(io.BytesIO(answered.body)).index == int(answered.headers["X-Consul-Index"])


@pytest.mark.parametrize("framing", ["length", "chunks", "expect", "form", "lower"])
async def test_a_body_counts_however_it_is_framed(server: World, framing: str) -> None:
    body = b'{"Provider":"consul","Config":{"LeafCertTTL":"48h"}}'
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:7], body[7:8], body[8:])) + b"0\r\n\r\n"
    length = b"Content-Length: %d\r\n" % len(body)
    lines, content = {
        "length": (length, body),
        "chunks": (b"Transfer-Encoding: chunked\r\n", chunks),
        "expect": (length + b"Expect: 100-continue\r\n", body),
        "form": (length + b"Content-Type: application/x-www-form-urlencoded\r\n", body),
        "lower": (length.lower() + b"x-consul-token: abc\r\n", body),
    }[framing]
    head = f"PUT {CONFIGURATION} HTTP/1.1\r\nHost: localhost\r\n".encode()
    answers = await exchanged(server, head + lines + b"\r\n" + content, 2 if framing == "expect" else 1)

    assert [each.status for each in answers][-1:] == [200]
    assert answers[-1].headers["Content-Length"] == "0"
    assert "Content-Type" not in answers[-1].headers
    shown = await server.fetch("GET", CONFIGURATION)
    assert json.loads(shown.text)["Config"] == {"LeafCertTTL": "48h"}


async def test_the_body_of_a_read_is_passed_over(server: World) -> None:
    head = f"GET {ROOTS} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\n".encode()
    answers = await exchanged(server, head + b"xxxxx" + head + b"yyyyy", 2)

    assert [each.status for each in answers] == [200, 200]


@pytest.mark.parametrize(
    "begun", [b"", b"G", b"GET /v1/status/live HTTP/1.1\r\nHost: x\r\n"], ids=["none", "one", "head"]
)
async def test_a_head_that_does_not_end_is_given_up(server: World, begun: bytes) -> None:
    impatient = ApiServer(server.node, [Listener("127.0.0.1", 0)], idle_deadline=0.2)
    await impatient.start()
    try:
        reader, writer = await asyncio.open_connection(*impatient.addresses[0])
        writer.write(begun)
        ended = asyncio.ensure_future(reader.read())
        async with asyncio.timeout(20):
            while not ended.done():
                writer.write(b"X: y\r\n" if len(begun) > 1 else b"")  # little by little, so that something always comes
                await asyncio.wait((ended,), timeout=0.02)
        with suppress(ConnectionError):  # reset, if something was on its way when it was closed
            assert await ended == b""
        await closed(writer)
    finally:
        await impatient.close()
