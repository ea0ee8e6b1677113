import asyncio
import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from structlog.testing import capture_logs

from caserver import errors
from caserver.api import status
from caserver.api.query import BlockedQueries, Call, Readiness, parse
from caserver.api.routes import ROUTES
from caserver.api.server import ApiServer, Listener
from caserver.environment import CURVES
from caserver.pki.csr import make_csr
from caserver.pki.keys import sec1_pem
from caserver.pki.spiffe import ServiceID
from caserver.requests import Answer, Caller, LeavesSigned, Request
from tests.contract.world import CLUSTER_ID, World, closed, parsed, running
from tests.testkit.fakes import settle
from tests.testkit.keys import private_key

ROOTS = "/v1/connect/ca/roots"
CONFIGURATION = "/v1/connect/ca/configuration"
SIGN = "/v1/connect/ca/sign"
LEAF = "/v1/agent/connect/ca/leaf/"
KIB = 1024


def csr(service: str = "web", cluster_id: str = CLUSTER_ID) -> str:
    key = ec.derive_private_key(0xC0FFEE, CURVES[256])
    return make_csr(key, ServiceID(f"{cluster_id}.consul", "dc1", service).uri)


async def served_with(world: World, **changes: Any) -> ApiServer:
    """Another server of the same node with a changed view."""
    server = ApiServer(replace(world.node, **changes), [Listener("127.0.0.1", 0)])
    await server.start()
    return server


class Scripted:
    """A leader that does as told."""

    def __init__(self, outcome: Answer | BaseException) -> None:
        self.outcome = outcome
        self.gate = asyncio.Event()
        self.gate.set()
        self.callers: list[Caller] = []
        self.finished = 0

    async def execute(self, caller: Caller, request: Request) -> Answer:
        self.callers.append(caller)
        await self.gate.wait()
        self.finished += 1
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


async def scripted(world: World, outcome: Answer | BaseException) -> Scripted:
    """Put a scripted leader in front of the node's own server."""
    leader = Scripted(outcome)
    await world.server.close()
    world.server = await served_with(world, leader=leader)
    return leader


# -- the trust bundle


async def test_the_bundle_comes_as_one_pem_file() -> None:
    async with running() as world:
        answered = await world.fetch("GET", f"{ROOTS}?pem=true")
        plain = await world.fetch("GET", f"{ROOTS}?pem=false")

    assert answered.headers["Content-Type"] == "application/pem-certificate-chain"
    assert len(x509.load_pem_x509_certificates(answered.body)) == 1
    assert plain.headers["Content-Type"] == "application/json"


async def test_a_pem_flag_that_is_neither_is_refused() -> None:
    async with running() as world:
        assert (await world.fetch("GET", f"{ROOTS}?pem=yes")).status == 400


async def test_a_rotation_wakes_who_waits_for_the_roots() -> None:
    async with running() as world:
        index = (await world.fetch("GET", ROOTS)).headers["X-Consul-Index"]
        waiting = asyncio.ensure_future(world.fetch("GET", f"{ROOTS}?index={index}&wait=60s"))
        change = {"Provider": "consul", "Config": {"PrivateKeyType": "ec", "PrivateKeyBits": 384}}
        put = await world.fetch("PUT", CONFIGURATION, body=json.dumps(change).encode())
        roots = json.loads((await waiting).text)["Roots"]

    assert (put.status, put.body) == (200, b"")
    assert sorted(root["PrivateKeyBits"] for root in roots) == [256, 384]
    assert [len(root["IntermediateCerts"] or ()) for root in roots if root["Active"]] == [1]


# -- the configuration


async def test_what_get_shows_can_be_put_back_and_changes_nothing() -> None:
    async with running() as world:
        before = await world.fetch("GET", CONFIGURATION)
        put = await world.fetch("PUT", CONFIGURATION, body=before.body)
        after = await world.fetch("GET", CONFIGURATION)

    assert (put.status, after.body) == (200, before.body)


async def test_a_private_key_is_shown_redacted_and_keeps_its_meaning() -> None:
    key = private_key("ec-256")
    body = {"Provider": "consul", "Config": {"PrivateKey": sec1_pem(key), "LeafCertTTL": "24h"}}
    async with running() as world:
        put = await world.fetch("PUT", CONFIGURATION, body=json.dumps(body).encode())
        shown = await world.fetch("GET", CONFIGURATION)
        index = world.log.state.index
        again = await world.fetch("PUT", CONFIGURATION, body=shown.body)

    assert (put.status, again.status) == (200, 200), again.text
    assert json.loads(shown.text)["Config"]["PrivateKey"] == "<redacted>"
    assert world.log.state.index == index


async def test_a_change_decided_on_a_stale_index_is_a_conflict() -> None:
    body = b'{"Provider":"consul","Config":{"LeafCertTTL":"24h"}}'
    async with running() as world:
        stale = await world.fetch("PUT", f"{CONFIGURATION}?cas=99", body=body)
        index = json.loads((await world.fetch("GET", CONFIGURATION)).text)["ModifyIndex"]
        right = await world.fetch("PUT", f"{CONFIGURATION}?cas={index}", body=body)
        odd = await world.fetch("PUT", f"{CONFIGURATION}?cas=x", body=body)

    assert (stale.status, right.status, odd.status) == (409, 200, 400)


async def test_a_write_that_is_tried_again_and_again_is_logged_once() -> None:
    body = b'{"Provider":"consul","Config":{"LeafCertTTL":"48h"}}'
    async with running(dev=False, node="n1", leader="n2") as world:
        (lead,) = [view for view in world.log.views if view.node == "n2"]
        lead.fail_next(3)
        with capture_logs() as logs:
            put = await world.fetch("PUT", CONFIGURATION, body=body, advance=10.0)
            again = await world.fetch("PUT", CONFIGURATION, body=body)

    writes = [each for each in logs if each["event"] == "CA configuration write"]
    assert (put.status, again.status, world.hop.sent > 4) == (200, 200, True)
    assert len(writes) == len({each["request_id"] for each in writes}) == 2


async def test_a_change_through_a_follower_is_in_force_there() -> None:
    async with running(dev=False, node="n1", leader="n2") as world:
        put = await world.fetch("PUT", CONFIGURATION, body=b'{"Provider":"consul","Config":{"LeafCertTTL":"48h"}}')
        shown = await world.fetch("GET", CONFIGURATION)

    assert (put.status, put.body) == (200, b"")
    assert json.loads(shown.text)["Config"] == {"LeafCertTTL": "48h"}
    assert world.hop.sent == 2


# -- signing


@pytest.mark.parametrize("node", ["n1", "n2"])
async def test_a_csr_is_signed_and_the_key_stays_with_the_caller(node: str) -> None:
    async with running(dev=False, node=node, leader="n2") as world:
        plain = await world.fetch("PUT", SIGN, body=csr().encode())
        wrapped = await world.fetch("PUT", SIGN, body=json.dumps({"CSR": csr("db")}).encode())

    assert (plain.status, wrapped.status) == (200, 200)
    assert json.loads(plain.text)["Service"] == "web"
    assert json.loads(wrapped.text)["Service"] == "db"
    assert "PrivateKeyPEM" not in plain.text
    leaf = x509.load_pem_x509_certificate(json.loads(plain.text)["CertPEM"].encode())
    assert leaf.public_key() == ec.derive_private_key(0xC0FFEE, CURVES[256]).public_key()


async def test_of_a_list_each_csr_is_signed_on_its_own_merits() -> None:
    foreign = csr("web", "99999999-2222-3333-4444-555555555555")
    async with running() as world:
        answered = await world.fetch(
            "PUT", SIGN, body=json.dumps({"CSRs": [csr("a"), foreign, "junk", csr("b")]}).encode()
        )

    results = json.loads(answered.text)
    assert answered.status == 200
    assert [each.get("Service") for each in results] == ["a", None, None, "b"]
    assert [each.get("Status") for each in results] == [None, 400, 400, None]
    assert list(results[1]) == ["Error", "Status"]


@pytest.mark.parametrize("body", [b"", b"junk", b"\xff\xfe", b"{", b'{"CSR":5}', b"[]"])
async def test_what_is_no_csr_is_the_callers_mistake(body: bytes) -> None:
    async with running() as world:
        assert (await world.fetch("PUT", SIGN, body=body)).status == 400


async def test_beyond_the_csr_limit_the_answer_is_429_at_once() -> None:
    async with running(config={"CSRMaxPerSecond": 1}) as world:
        first = await world.fetch("GET", f"{LEAF}a")
        second = await world.fetch("GET", f"{LEAF}b")

    assert (first.status, second.status, second.text) == (200, 429, "Rate limit reached, try again later")
    assert int(second.headers["Retry-After"]) >= 1


async def test_a_backend_that_is_away_is_a_reason_to_come_back_later() -> None:
    async with running() as world:
        await scripted(world, errors.ProviderUnavailable("Vault at https://vault:8200 is sealed"))
        answered = await world.fetch("PUT", SIGN, body=csr().encode())

    assert (answered.status, answered.text) == (503, "Vault at https://vault:8200 is sealed")
    assert int(answered.headers["Retry-After"]) >= 1


async def test_the_caller_is_known_by_token_and_address() -> None:
    async with running() as world:
        leader = await scripted(world, LeavesSigned(()))
        await world.fetch("PUT", SIGN, {"X-Consul-Token": "hush"}, csr().encode())
    caller = leader.callers[0]

    assert caller.token is not None
    assert (caller.token.reveal(), caller.source.rpartition(":")[0]) == ("hush", "n1 127.0.0.1")


# -- Connect disabled


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [("GET", ROOTS, ""), ("GET", f"{LEAF}web", ""), ("PUT", SIGN, "x"), ("PUT", CONFIGURATION, "{}")],
)
async def test_without_connect_the_ca_says_so(method: str, path: str, body: str) -> None:
    async with running(enabled=False) as world:
        answered = await world.fetch(method, path, body=body.encode())

    assert (answered.status, answered.text) == (500, "Connect must be enabled in order to use this endpoint")


async def test_without_connect_the_cluster_can_be_asked_about_itself() -> None:
    async with running(dev=False, enabled=False, node="n1", leader="n2") as world:
        answered = [
            (await world.fetch("GET", path)).status for path in ("/v1/status/leader", "/v1/operator/raft/configuration")
        ]

    assert answered == [200, 200]


# -- readiness


async def test_readiness_names_what_is_amiss() -> None:
    async with running(dev=False) as world:
        await world.server.close()
        world.server = await served_with(world, ready=lambda: Readiness(ready=False, degraded=(("NoLeader", "none"),)))
        ready = await world.fetch("GET", "/v1/status/ready")
        live = await world.fetch("GET", "/v1/status/live")

    assert (ready.status, ready.text) == (503, '{"Ready":false,"Degraded":[{"Code":"NoLeader","Reason":"none"}]}')
    assert (live.status, live.text) == (200, '{"Live":true}')


# -- errors


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (errors.NoLeader(), 500, "No cluster leader"),
        (errors.CommitUnknown("n2 did not answer"), 503, "outcome unknown, read before repeating\nn2 did not answer"),
        (errors.CommitFailed("lost"), 503, "lost"),
        (errors.NotInitialized("soon"), 503, "soon"),
        (errors.PermissionDenied("Permission denied"), 403, "Permission denied"),
        (errors.NotFound("gone"), 404, "gone"),
        (errors.ProviderRefused("no"), 502, "no"),
    ],
)
async def test_an_error_has_its_status_and_its_text(error: errors.CaserverError, code: int, text: str) -> None:
    async with running() as world:
        await scripted(world, error)
        answered = await world.fetch("PUT", CONFIGURATION, body=b"{}")

    assert (answered.status, answered.text) == (code, text)
    assert answered.headers["Content-Type"] == "text/plain; charset=utf-8"


async def test_a_bug_is_a_bare_500_and_a_traceback_in_the_log() -> None:
    async with running() as world:
        await scripted(world, ZeroDivisionError("secret detail"))
        with capture_logs() as logs:
            answered = await world.fetch("PUT", SIGN, body=csr().encode())

    assert (answered.status, answered.text) == (500, "internal error")
    assert [(each["event"], each["path"], each["exc_info"]) for each in logs if each["log_level"] == "error"] == [
        ("request_failed", SIGN, True)
    ]


def test_every_error_class_has_a_status() -> None:
    def classes(root: type[errors.CaserverError]) -> list[type[errors.CaserverError]]:
        return [root, *(each for child in root.__subclasses__() for each in classes(child))]

    for kind in classes(errors.CaserverError):
        error = kind("x")
        assert 400 <= status.status_of(error) <= 503


# -- HTTP


async def test_paths_are_cleaned_with_their_query_kept() -> None:
    async with running() as world:
        answered = await world.fetch("GET", "//v1/./connect/ca/roots?pem=true&x=%20")
        encoded = await world.fetch("GET", "/v1//agent/connect/ca/leaf/a%20b")
        put = await world.fetch("PUT", "//v1/connect/ca/configuration")
        bare = await world.fetch("GET", "/v1/agent/connect/ca/leaf")
        root = await world.fetch("GET", "/")

    assert (answered.status, answered.headers["Location"]) == (301, "/v1/connect/ca/roots?pem=true&x=%20")
    assert encoded.headers["Location"] == "/v1/agent/connect/ca/leaf/a%20b"
    assert (put.status, put.body) == (301, b"")
    assert bare.headers["Location"] == LEAF
    assert root.headers["Location"] == "/ui/"


async def test_a_location_cannot_carry_markup() -> None:
    async with running() as world:
        answered = await world.fetch("GET", '//a"><script>?"<b>')

    assert "<script>" not in answered.text
    assert '"<b>' not in answered.text


async def test_a_percent_encoded_path_is_the_path() -> None:
    async with running() as world:
        assert (await world.fetch("GET", "/v1/connect/ca/%72oots")).status == 200


@pytest.mark.parametrize("target", ["http://elsewhere/v1/status/live", "/v1/status/live?x#y"])
async def test_other_forms_of_a_target_are_understood(target: str) -> None:
    async with running() as world:
        assert (await world.fetch("GET", target)).status == 200


async def test_a_name_that_is_not_utf8_is_refused() -> None:
    async with running() as world:
        assert (await world.fetch("GET", f"{LEAF}%ff%fe")).status == 400


async def test_errors_are_zipped_for_who_asks_for_it() -> None:
    async with running() as world:
        answered = await world.fetch("GET", f"{ROOTS}?index=x", {"Accept-Encoding": "deflate, gzip;q=0.5"})

    assert gzip.decompress(answered.body) == b"Invalid index"


@pytest.mark.parametrize("weight", ["q=0", "q=0.0", "q=0.", "Q=0.000"])
async def test_gzip_that_weighs_nothing_is_not_used(weight: str) -> None:
    async with running() as world:
        answered = await world.fetch("GET", ROOTS, {"Accept-Encoding": f"gzip; {weight}, *"})

    assert "Content-Encoding" not in answered.headers


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what happens in the sockets of this process."""
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it did not happen")


async def raw(world: World, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(*world.server.addresses[0])
    writer.write(request)
    try:
        return await asyncio.wait_for(reader.read(), 5)
    finally:
        await closed(writer)


@pytest.mark.parametrize("request_bytes", [b"junk\r\n\r\n", b"GET / HTTP/1.1\r\nBad Header\r\n\r\n"])
async def test_what_is_not_http_gets_a_bare_400(request_bytes: bytes) -> None:
    async with running() as world:
        answered = parsed(await raw(world, request_bytes))

    assert (answered.status, answered.body, "Server" in answered.headers) == (400, b"", False)


@pytest.mark.parametrize(("path", "limit"), [(CONFIGURATION, 64 * KIB), (SIGN, 512 * KIB)])
async def test_a_body_over_the_limit_is_413(path: str, limit: int) -> None:
    async with running() as world:
        announced = await world.fetch("PUT", path, body=b"x" * (limit + 1))
        chunk = b"%x\r\n" % (limit + 1) + b"x" * (limit + 1) + b"\r\n0\r\n\r\n"
        head = f"PUT {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
        chunked = parsed(await raw(world, head.encode() + chunk))
        within_limit = await world.fetch("PUT", path, body=b"x" * limit)

    assert (announced.status, chunked.status, within_limit.status) == (413, 413, 400)
    assert announced.text == f"the request body is larger than {limit // KIB} KiB"


async def test_a_compressed_body_is_not_blown_up() -> None:
    async with running() as world:
        bomb = gzip.compress(b" " * (64 * KIB * 100))
        answered = await world.fetch("PUT", CONFIGURATION, {"Content-Encoding": "gzip"}, bomb)

    assert answered.status == 400


async def test_a_client_that_waits_for_leave_to_send_gets_it() -> None:
    async with running() as world:
        reader, writer = await asyncio.open_connection(*world.server.addresses[0])
        body = csr().encode()
        writer.write(
            f"PUT {SIGN} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nExpect: 100-continue\r\n"
            f"Content-Length: {len(body)}\r\n\r\n".encode()
        )
        leave = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        writer.write(body)
        answered = parsed(await asyncio.wait_for(reader.read(), 5))
        await closed(writer)

    assert leave == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert answered.status == 200


async def test_a_body_that_does_not_arrive_is_given_up() -> None:
    async with running() as world:
        reader, writer = await asyncio.open_connection(*world.server.addresses[0])
        writer.write(f"PUT {SIGN} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 10\r\n\r\n12345".encode())
        await writer.drain()
        for _ in range(100):
            await asyncio.sleep(0.001)
            await world.clock.advance(1.0)
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        await closed(writer)

    assert head.startswith(b"HTTP/1.1 408 ")


async def test_requests_follow_each_other_on_one_connection() -> None:
    async with running(dev=False) as world:
        both = await raw(
            world,
            b"GET /v1/status/live HTTP/1.1\r\nHost: x\r\n\r\nGET /v1/status/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        )

    assert both.count(b'{"Live":true}') == 2


async def test_a_write_goes_on_when_its_client_leaves() -> None:
    async with running() as world:
        leader = await scripted(world, LeavesSigned(()))
        leader.gate.clear()
        _, writer = await asyncio.open_connection(*world.server.addresses[0])
        body = csr().encode()
        writer.write(f"PUT {SIGN} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        await until(lambda: bool(leader.callers))
        await closed(writer)
        await asyncio.sleep(0.01)
        leader.gate.set()
        await settle()

    assert leader.finished == 1


async def test_a_blocking_query_ends_when_its_client_leaves() -> None:
    async with running() as world:
        index = (await world.fetch("GET", ROOTS)).headers["X-Consul-Index"]
        _, writer = await asyncio.open_connection(*world.server.addresses[0])
        writer.write(f"GET {ROOTS}?index={index} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        blocked = world.node.blocked
        await until(lambda: bool(blocked._tasks))
        await closed(writer)
        await until(lambda: not blocked._tasks)


async def test_closing_the_server_ends_blocking_queries() -> None:
    async with running() as world:
        index = (await world.fetch("GET", ROOTS)).headers["X-Consul-Index"]
        waiting = asyncio.ensure_future(raw(world, f"GET {ROOTS}?index={index} HTTP/1.1\r\nHost: x\r\n\r\n".encode()))
        await until(lambda: bool(world.node.blocked._tasks))
        await asyncio.wait_for(world.server.close(), 2)

        assert await waiting == b""


async def test_closing_the_server_takes_in_the_rest_of_a_request_and_answers_it() -> None:
    async with running() as world:
        reader, writer = await asyncio.open_connection(*world.server.addresses[0])
        body = b"no request"
        writer.write(f"PUT {SIGN} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n".encode())
        writer.write(b"Expect: 100-continue\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
        closing = asyncio.ensure_future(world.server.close())
        await settle()
        assert not closing.done()
        writer.write(body)
        answer = await reader.read()
        await closing
        writer.close()

    assert answer.startswith(b"HTTP/1.1 400")
    assert b"Connection: close" in answer


async def test_beyond_the_cap_a_blocking_query_is_turned_away() -> None:
    async with running() as world:
        await world.server.close()
        world.server = await served_with(world, blocked=BlockedQueries(limit=0))
        answered = await world.fetch("GET", f"{ROOTS}?index=1000")

    assert answered.status == 503


async def test_beyond_the_limit_of_one_client_connections_are_turned_away() -> None:
    async with running(dev=False) as world:
        server = ApiServer(world.node, [Listener("127.0.0.1", 0)], connections_per_client=1)
        await server.start()
        await world.server.close()
        world.server = server
        _, first = await asyncio.open_connection(*server.addresses[0])
        refused = await raw(world, b"GET /v1/status/live HTTP/1.1\r\nHost: x\r\n\r\n")
        await closed(first)
        for _ in range(1000):
            answered = await raw(world, b"GET /v1/status/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            if b" 200 OK" in answered:
                break

    assert refused.startswith(b"HTTP/1.1 503 ")
    assert b" 200 OK" in answered


async def test_an_address_in_use_is_reported() -> None:
    async with running() as world:
        host, port = world.server.addresses[0]
        with pytest.raises(OSError, match="address already in use"):
            await ApiServer(world.node, [Listener("127.0.0.1", 0), Listener(host, port)]).start()


def test_every_route_says_what_it_is() -> None:
    assert all(route.summary and route.path.startswith(("/v1/", "/openapi.json")) for route in ROUTES)
    assert len({route.path for route in ROUTES}) == len(ROUTES)


def test_a_token_shows_in_no_repr() -> None:
    call = Call(options=parse("token=hush&pretty", {}), remote="x")

    assert "hush" not in repr(call)
