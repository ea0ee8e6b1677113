import json
from collections.abc import Mapping
from ipaddress import ip_network

import pytest

from caserver.api.origin import Hosts, Restrictions
from caserver.api.routes import ROUTES
from caserver.api.server import ApiServer, Listener
from caserver.errors import Misdirected, PermissionDenied
from tests.contract.world import World, running

HOSTS = Hosts({"ca1", "ca2.example.org."}, trusted={"ca.example.com", "*.mesh.example"})
CONFIGURATION = "/v1/connect/ca/configuration"
LEAF = "/v1/agent/connect/ca/leaf/web"
BROWSER = {"Accept-Language": "en", "Sec-Fetch-Mode": "cors"}


def refusal(method: str, headers: Mapping[str, str]) -> type[Exception] | None:
    try:
        HOSTS.check(method, headers)
    except (Misdirected, PermissionDenied) as exc:
        return type(exc)
    return None


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1:8500",
        "10.1.2.3",
        "[::1]:8500",
        "[2001:db8::1]",
        "localhost:8500",
        "ca1",
        "CA1:8500",
        "ca2.example.org",
        "ca.example.com.:443",
        "a.mesh.example",
    ],
)
def test_a_browser_may_call_this_node_by_its_names(host: str) -> None:
    assert refusal("GET", {"Host": host, **BROWSER}) is None


@pytest.mark.parametrize(
    "host", ["", "evil.example", "ca1.evil.example", "a.b.mesh.example", "mesh.example", "127.0.0.1.evil.example:8500"]
)
@pytest.mark.parametrize("mark", ["Origin", "Sec-Fetch-Site", "Sec-Fetch-Mode", "Sec-Fetch-Dest", "Accept-Language"])
def test_a_browser_that_calls_by_another_name_was_misled(host: str, mark: str) -> None:
    assert refusal("GET", {"Host": host, mark: "x"}) is Misdirected


def test_a_program_may_call_by_any_name() -> None:
    assert refusal("PUT", {"Host": "ca.service.consul:8500", "User-Agent": "Go-http-client/1.1"}) is None


@pytest.mark.parametrize(
    ("headers", "refused"),
    [
        ({"Origin": "http://127.0.0.1:8500"}, False),
        ({"Origin": "http://127.0.0.1:8500", "Sec-Fetch-Site": "same-origin"}, False),
        ({"Sec-Fetch-Site": "none"}, False),
        ({"Origin": "https://ca.example.com", "Sec-Fetch-Site": "same-site"}, False),  # listed by the operator
        ({"Origin": "https://a.mesh.example:8443"}, False),
        ({"Origin": "http://evil.example"}, True),
        ({"Origin": "http://127.0.0.1:3000"}, True),
        ({"Origin": "http://localhost:8500"}, True),
        ({"Origin": "null"}, True),
        ({"Origin": ""}, True),
        ({"Origin": "http://127.0.0.1:8500", "Sec-Fetch-Site": "cross-site"}, True),
        ({"Sec-Fetch-Site": "cross-site"}, True),
        ({"Sec-Fetch-Site": "same-site"}, True),
    ],
)
def test_only_a_page_of_this_origin_may_write(headers: dict[str, str], refused: bool) -> None:
    headers = {"Host": "127.0.0.1:8500", **headers}

    assert refusal("PUT", headers) is (PermissionDenied if refused else None)
    assert refusal("GET", headers) is None


async def exposed(world: World, *, exposed: bool) -> None:
    await world.server.close()
    world.server = ApiServer(world.node, [Listener("127.0.0.1", 0, exposed=exposed)])
    await world.server.start()


@pytest.mark.parametrize(
    ("method", "path"), [("GET", CONFIGURATION), ("PUT", CONFIGURATION), ("PUT", "/v1/connect/ca/sign"), ("GET", LEAF)]
)
async def test_secrets_are_refused_where_others_may_read_along(method: str, path: str) -> None:
    async with running() as world:
        await exposed(world, exposed=True)
        refused = await world.fetch(method, path)
        roots = await world.fetch("GET", "/v1/connect/ca/roots")
        log_index = world.log.state.index
        await exposed(world, exposed=False)
        served = await world.fetch(method, path, body=b"{}" if method == "PUT" else b"")

    assert (refused.status, roots.status) == (403, 200)
    assert "http_config { allow_insecure_http = true }" in refused.text
    assert log_index == world.log.state.index or path == LEAF
    assert served.status != 403


def test_the_routes_with_secrets_and_changes_are_known() -> None:
    # Not GET, and they change nothing: one asks with a body, the other is refused to everybody.
    asking = {"/v1/agent/connect/authorize", "/v1/operator/raft/peer"}
    changing = {route.path for route in ROUTES if set(route.handlers) - {"GET"}} - asking

    acls = {route.path for route in ROUTES if route.path.startswith("/v1/acl/")}

    assert acls
    assert {route.path for route in ROUTES if route.secret} == changing | acls | {
        "/v1/connect/ca/configuration",
        "/v1/connect/ca/sign",
        "/v1/agent/connect/ca/leaf/",
    }


async def test_the_edge_answers_421_and_403() -> None:
    async with running() as world:
        misled = await world.fetch("GET", LEAF, {"Host": "evil.example:8500", **BROWSER})
        foreign = await world.fetch("PUT", CONFIGURATION, {"Origin": "http://evil.example"}, b"{}")
        index = world.log.state.index
        change = json.dumps({"Provider": "consul", "Config": {"LeafCertTTL": "24h"}}).encode()
        host, port = world.server.addresses[0]
        own = await world.fetch("PUT", CONFIGURATION, {"Origin": f"http://{host}:{port}"}, change)

    assert (misled.status, foreign.status, own.status) == (421, 403, 200)
    assert "allowed_hosts" in misled.text
    assert world.log.state.index > index


# -- what the operator closed


async def restricted(world: World, restrictions: Restrictions) -> None:
    await world.server.close()
    world.server = ApiServer(world.node, [Listener("127.0.0.1", 0)], restrictions=restrictions)
    await world.server.start()


async def test_a_path_that_is_closed_is_closed_however_it_is_written() -> None:
    async with running() as world:
        await restricted(world, Restrictions(blocked=("/v1/agent/connect/",)))
        refused = [
            await world.fetch("GET", path)
            for path in (LEAF, "/v1/agent/connect/ca/%72oots", "/v1/agent/connect/ca/leaf/a%20b")
        ]
        options = await world.fetch("OPTIONS", LEAF)
        served = await world.fetch("GET", "/v1/connect/ca/roots")

    assert [(each.status, each.text) for each in (*refused, options)] == [
        (403, "Endpoint is blocked by agent configuration")
    ] * 4
    assert served.status == 200


@pytest.mark.parametrize(("network", "status"), [("127.0.0.0/8", 400), ("10.0.0.0/8", 403), ("::/0", 403)])
async def test_what_changes_something_comes_from_where_it_may(network: str, status: int) -> None:
    async with running() as world:
        await restricted(world, Restrictions(write_from=(ip_network(network),)))
        written = await world.fetch("PUT", CONFIGURATION, body=b"x")
        read = await world.fetch("GET", CONFIGURATION)

    assert (written.status, read.status) == (status, 200)
    assert status != 403 or written.text == "Access is restricted"


async def test_every_answer_of_a_route_carries_the_headers_that_were_set() -> None:
    async with running() as world:
        await restricted(world, Restrictions(headers=(("X-Site", "a"),)))
        answers = [await world.fetch(method, path) for method, path in (("GET", LEAF), ("PUT", LEAF), ("GET", "/nope"))]

    assert [each.headers.get("X-Site") for each in answers] == ["a", "a", None]
