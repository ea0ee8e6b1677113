import asyncio
import gzip
from dataclasses import replace

import pytest
from multidict import CIMultiDict

from caserver.api.query import (
    BlockedQueries,
    Body,
    BodyCache,
    Call,
    NodeView,
    Options,
    Readiness,
    block,
    fresh_state,
    metadata,
    parse,
    patience,
)
from caserver.errors import InvalidQuery, Unavailable
from caserver.fields import Secret
from caserver.raft.ports import Leadership
from caserver.requests import ReadAt, ReadIndex
from caserver.state.lifecycle import roots_index
from caserver.state.model import CAState, Index
from tests.testkit.fakes import ManualClock, SeededEntropy, settle


def options(query: str = "", **headers: str) -> Options:
    return parse(query, CIMultiDict({name.replace("_", "-"): value for name, value in headers.items()}))


def test_nothing_asked_is_the_default() -> None:
    assert options() == Options()


def test_every_option_is_read() -> None:
    found = options("index=7&wait=1m30s&stale&max_stale=5s&pretty=false&dc=dc2&token=t&foo=bar&index=8")

    assert (found.index, found.wait, found.stale, found.max_stale) == (7, 90.0, True, 5.0)
    assert (found.pretty, found.datacenter, found.token, found.flags["foo"]) == (True, "dc2", Secret("t"), "bar")


@pytest.mark.parametrize(
    ("query", "text"),
    [
        ("index=abc", "Invalid index"),
        ("index=-1", "Invalid index"),
        ("index=+1", "Invalid index"),
        ("index=1.5", "Invalid index"),
        ("index=18446744073709551616", "Invalid index"),
        ("index=" + "9" * 10_000, "Invalid index"),
        ("index=%D9%A1", "Invalid index"),  # an Arabic digit
        ("wait=xyz", "Invalid wait time"),
        ("wait=10", "Invalid wait time"),
        ("max_stale=bad", 'Invalid max_stale value "bad"'),
        ("stale&consistent", "Cannot specify ?stale with ?consistent, conflicting semantics."),
        ("wait=xyz&index=abc", "Invalid wait time"),
        ("index=abc&stale&consistent", "Cannot specify ?stale with ?consistent, conflicting semantics."),
        ("max_stale=1s&consistent", "Cannot specify ?stale with ?consistent, conflicting semantics."),
        ("max_stale=a%22b", r'Invalid max_stale value "a\"b"'),
        ("a=%zz&index=abc", 'Failed to decode query: invalid URL escape "%zz"'),
        ("a=b%2", 'Failed to decode query: invalid URL escape "%2"'),
    ],
)
def test_what_consul_refuses_is_refused_in_its_words(query: str, text: str) -> None:
    with pytest.raises(InvalidQuery) as caught:
        options(query)

    assert caught.value.detail == text


@pytest.mark.parametrize(
    "query", ["index=", "wait=", "index=18446744073709551615", "wait=-1s", "wait=10h", "index=007"]
)
def test_what_consul_accepts_is_accepted(query: str) -> None:
    assert options(query).index in {0, 7, 18446744073709551615}


@pytest.mark.parametrize(
    ("query", "stale"),
    [("max_stale=5s", True), ("max_stale=0s", False), ("max_stale=-1s", False), ("max_stale=", False)],
)
def test_who_bounds_the_age_of_an_answer_takes_one_that_is_not_the_leaders(query: str, *, stale: bool) -> None:
    assert options(query).stale is stale


@pytest.mark.parametrize("query", ["index=abc", "wait=xyz", "stale&consistent", "max_stale=bad"])
def test_a_write_has_nothing_to_be_fresh_or_to_wait_for(query: str) -> None:
    headers = CIMultiDict({"Cache-Control": "max-age=x"})
    found = parse(f"{query}&dc=dc2&token=t&pretty&cas=5", headers, reading=False)

    assert (found.index, found.wait, found.stale, found.consistent, found.fresh) == (0, 0.0, False, False, False)
    assert (found.datacenter, found.token, found.pretty, found.flags["cas"]) == ("dc2", Secret("t"), True, "5")


def test_freshness_is_judged_before_waiting() -> None:
    with pytest.raises(InvalidQuery, match=r"^Cannot specify"):
        options("stale&consistent", Cache_Control="max-age=x")
    with pytest.raises(InvalidQuery, match="Cache-Control"):
        options("wait=x", Cache_Control="max-age=x")


@pytest.mark.parametrize(
    ("header", "fresh"),
    [
        ("no-cache", False),
        ("max-age=0", True),
        ("Max-Age=0 , foo", True),
        ("max-age=60", False),
        ("must-revalidate, max-age=1", True),
        ("stale-if-error=0", False),
    ],
)
def test_cache_control_may_ask_for_a_fresh_answer(header: str, *, fresh: bool) -> None:
    assert options(Cache_Control=header).fresh is fresh


@pytest.mark.parametrize("header", ["max-age=x", "max-age=", "stale-if-error=1.5", "max-age=1s"])
def test_a_cache_control_that_says_no_number_is_refused(header: str) -> None:
    with pytest.raises(InvalidQuery, match=r"^Invalid Cache-Control header\.$"):
        options(Cache_Control=header)


@pytest.mark.parametrize(
    ("query", "headers", "token"),
    [
        ("", {}, None),
        ("token=a", {"X_Consul_Token": "b", "Authorization": "Bearer c"}, "a"),
        ("token=", {"X_Consul_Token": "b"}, "b"),
        ("", {"X_Consul_Token": "b", "Authorization": "Bearer c"}, "b"),
        ("", {"X_Consul_Token": "", "Authorization": "bEARER   c "}, "c"),
        ("", {"X_Consul_Token": ""}, None),
        ("", {"Authorization": "Basic Yzpk"}, None),
        ("", {"Authorization": "Bearer"}, None),
        ("", {"Authorization": "Bearer c d"}, "c"),
        ("", {"Authorization": "Bearer\tc"}, None),
    ],
)
def test_the_token_comes_from_parameter_header_or_bearer(
    query: str, headers: dict[str, str], token: str | None
) -> None:
    assert options(query, **headers).token == (None if token is None else Secret(token))


def test_a_namespace_is_a_fault_for_the_endpoints_that_refuse_it() -> None:
    tail = "Namespaces are a Consul Enterprise feature"

    assert options("ns=default").namespace_fault == f'Bad request: Invalid query parameter: "ns" - {tail}'
    assert (
        options(X_Consul_Namespace="x").namespace_fault == f'Bad request: Invalid header: "X-Consul-Namespace" - {tail}'
    )
    assert options("ns=").namespace_fault == ""


@pytest.mark.parametrize(("wait", "seconds"), [("", 300.0), ("-1s", 300.0), ("2s", 2.0), ("10h", 600.0)])
def test_patience_has_a_default_and_an_end(wait: str, seconds: float) -> None:
    assert patience(options(f"wait={wait}")) == seconds


def test_a_body_is_zipped_once() -> None:
    body = Body(b"{}" * 100)

    assert gzip.decompress(body.gzipped) == body.plain
    assert body.gzipped is body.gzipped


def test_the_body_cache_keeps_the_last_few() -> None:
    cache, built = BodyCache(size=2), []

    def get(key: str) -> bytes:
        return cache.get(key, lambda: built.append(key) or key.encode()).plain  # type: ignore[func-returns-value]

    assert [get(key) for key in ("a", "b", "a", "c", "a")] == [b"a", b"b", b"a", b"c", b"a"]
    assert built == ["a", "b", "c", "a"]


class SetLog:
    """A log whose state and leadership the test sets."""

    def __init__(self) -> None:
        self.state = CAState(index=Index(5), roots_index=Index(5))
        self.leadership = Leadership(node="n1", leader="n2", term=1, is_leader=False, last_contact=0.25)
        self._moved = asyncio.Event()

    def set(self, index: int) -> None:
        self.state = CAState(index=Index(index), roots_index=Index(index))
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    async def changed(self, select, seen):  # noqa: ANN001 as the port says
        while (value := select(self.state, self.leadership)) == seen:
            await self._moved.wait()
        return value


class Asked:
    """The leader as it is asked for an index."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.requests: list[object] = []

    async def execute(self, caller: object, request: object) -> ReadAt:
        self.requests.append(request)
        return ReadAt(self.index)


def view(log: SetLog, *, index: int = 5) -> NodeView:
    return NodeView(
        log=log,  # type: ignore[arg-type]
        leader=Asked(index),  # type: ignore[arg-type]
        leaf_cache=None,  # type: ignore[arg-type]
        gate=None,  # type: ignore[arg-type]
        clock=ManualClock(),
        entropy=SeededEntropy(),
        datacenter="dc1",
        node_name="n1",
        peers={},
        connect_enabled=True,
        settings=None,  # type: ignore[arg-type]
        reload=None,  # type: ignore[arg-type]
        ready=lambda: Readiness(ready=True),
        raft=None,  # type: ignore[arg-type]
        backups=None,  # type: ignore[arg-type]
        telemetry=None,  # type: ignore[arg-type]
    )


def call(query: str) -> Call:
    return Call(options=options(query), remote="10.0.0.1:5")


def lead(log: SetLog) -> None:
    log.leadership = Leadership(node="n1", leader="n1", term=2, is_leader=True)


@pytest.mark.parametrize(
    ("leads", "query", "asked"),
    [
        (True, "", []),
        (True, "consistent", [ReadIndex(consistent=True)]),
        (True, "stale", []),
        (None, "", [ReadIndex()]),
        (None, "stale", []),
        (False, "", [ReadIndex()]),
        (False, "consistent", [ReadIndex(consistent=True)]),
        (False, "stale", []),
        (False, "stale&max_stale=1s", []),
        (False, "stale&max_stale=100ms", [ReadIndex()]),
    ],
)
async def test_who_is_asked_how_fresh_a_read_must_be(*, leads: bool | None, query: str, asked: list[ReadIndex]) -> None:
    log = SetLog()
    node = view(log)
    if leads is not False:
        lead(log)
    if leads is None:  # it leads, but has not made sure of it lately
        log.leadership = replace(log.leadership, fresh_until=node.clock.monotonic())
    await fresh_state(node, call(query))

    assert node.leader.requests == asked  # type: ignore[attr-defined]


async def test_a_follower_waits_until_it_has_applied_what_the_leader_named() -> None:
    log = SetLog()
    node = view(log, index=7)
    task = asyncio.ensure_future(fresh_state(node, call("")))
    await settle()
    log.set(6)
    await settle()

    assert not task.done()
    log.set(7)
    assert (await task).index == 7


async def test_a_follower_that_cannot_catch_up_says_so() -> None:
    node = view(SetLog(), index=7)
    task = asyncio.ensure_future(fresh_state(node, call("")))
    await node.clock.advance(6.0)  # type: ignore[attr-defined]

    assert isinstance(task.exception(), Unavailable)


async def test_a_blocking_query_waits_for_a_greater_index() -> None:
    log = SetLog()
    node = view(log)
    task = asyncio.ensure_future(block(node, options("index=6&wait=60s"), roots_index))
    await settle()
    log.set(6)
    await settle()

    assert not task.done()
    log.set(7)
    assert await task is True


async def test_a_blocking_query_ends_with_its_time_and_a_little_jitter() -> None:
    node = view(SetLog())
    task = asyncio.ensure_future(block(node, options("index=5&wait=16s"), roots_index, jitter=True))
    await node.clock.advance(16.0)  # type: ignore[attr-defined]
    early = task.done()
    await node.clock.advance(1.0)  # type: ignore[attr-defined]

    assert (early, task.result()) == (False, True)


@pytest.mark.parametrize("query", ["", "index=0", "index=4&wait=60s"])
async def test_an_index_that_is_passed_already_waits_for_nothing(query: str) -> None:
    assert await block(view(SetLog()), options(query), roots_index) is False


async def test_only_so_many_queries_may_wait() -> None:
    blocked = BlockedQueries(limit=1)

    async def wait() -> None:
        with blocked.slot():
            await asyncio.Event().wait()

    first = asyncio.ensure_future(wait())
    await settle()
    with pytest.raises(Unavailable, match="too many blocking queries"):
        await wait()
    blocked.cancel()
    await asyncio.wait((first,))

    assert first.cancelled()


def test_metadata_tells_the_truth_about_the_leader() -> None:
    log = SetLog()
    node = view(log)

    assert metadata(node, 9) == {"X-Consul-Index": "9", "X-Consul-Knownleader": "true", "X-Consul-Lastcontact": "250"}
    assert metadata(node, 0, stale=False)["X-Consul-Lastcontact"] == "0"
    log.leadership = Leadership(node="n1", leader=None, term=2, is_leader=False, last_contact=3.0)
    assert metadata(node, 0) == {
        "X-Consul-Index": "1",
        "X-Consul-Knownleader": "false",
        "X-Consul-Lastcontact": "3000",
    }
