"""What one HTTP request asks besides its path: options, token, freshness, patience; and what a handler gives back.

Options are parsed before a handler runs, in Consul's order and with its texts. A read is served from this node's state
once that state is as fresh as was asked for; a blocking query waits for the index to pass the caller's.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import BinaryIO
from urllib.parse import parse_qsl

from caserver.api.metrics import Telemetry
from caserver.authority.ports import Log, Raft
from caserver.backup import Backups
from caserver.config.agent_config import AgentConfig
from caserver.environment import Clock, Entropy, within
from caserver.errors import InvalidQuery, InvalidRequest, NoLeader, NotInitialized, Unavailable
from caserver.fields import Secret, go_duration
from caserver.forwarding.leader import Leader
from caserver.leaf_cache import LeafCache
from caserver.node_gate import NodeGate
from caserver.nodes_wire import Site
from caserver.raft.ports import Leadership
from caserver.requests import Caller, ReadAt, ReadIndex
from caserver.state.lifecycle import leader_of
from caserver.state.model import CAState

WAIT_DEFAULT = 300.0  # seconds a blocking query waits unless told (Consul: DefaultQueryTime)
WAIT_MAX = 600.0  # and at most (Consul: MaxQueryTime)
JITTER = 16  # up to a sixteenth of the wait is added (Consul: JitterFraction)
APPLY_DEADLINE = 5.0  # seconds for the local state to reach an index that the leader named
LEADER_DEADLINE = 7.0  # seconds for which a read is held while no leader is known (Consul: RPCHoldTimeout)
INITIALIZE_DEADLINE = 7.0  # seconds for which a read is held while the CA has no root yet
BLOCKED_MAX = 8192  # blocking queries at once
CONTACT_MAX = 31536000.0  # seconds; what "not since this node started" is in a header
_INDEX_MAX = 1 << 64
_GZIP_LEVEL = 6
_TOKEN_HEADER = "X-Consul-Token"  # noqa: S105 the header's name
_NAMESPACE_HEADER = "X-Consul-Namespace"
# In a path or a query: a percent sign and what comes behind it.
BROKEN_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2}).{0,2}", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether this node can serve, and what is amiss: (code, reason)."""

    ready: bool
    degraded: tuple[tuple[str, str], ...] = ()


class BlockedQueries:
    """Counts the queries that wait, refuses those beyond ``limit`` and ends them all when the server closes."""

    def __init__(self, limit: int = BLOCKED_MAX) -> None:
        self.limit = limit
        self._tasks: set[asyncio.Task[object] | None] = set()

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Hold one place while waiting; Unavailable if there is none."""
        if len(self._tasks) >= self.limit:
            raise Unavailable("too many blocking queries are waiting on this node; ask another node or poll")
        task = asyncio.current_task()
        self._tasks.add(task)
        try:
            yield
        finally:
            self._tasks.discard(task)

    @property
    def count(self) -> int:
        """How many wait now."""
        return len(self._tasks)

    def cancel(self) -> None:
        """End every waiting query without an answer."""
        for task in self._tasks:
            if task is not None:
                task.cancel()


class Body:
    """The bytes of an answer, compressed once if ever."""

    __slots__ = ("_gzipped", "plain")

    def __init__(self, plain: bytes) -> None:
        self.plain = plain
        self._gzipped: bytes | None = None

    @property
    def gzipped(self) -> bytes:
        """The same bytes as one gzip member without a time stamp."""
        if self._gzipped is None:
            self._gzipped = gzip.compress(self.plain, _GZIP_LEVEL, mtime=0)
        return self._gzipped


class BodyCache:
    """Keeps the last few rendered bodies; a key must determine the bytes."""

    def __init__(self, size: int = 16) -> None:
        self._size = size
        self._bodies: dict[object, Body] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._bodies

    def get(self, key: object, build: Callable[[], bytes]) -> Body:
        """The body of ``key``, built at the first call."""
        body = self._bodies.get(key)
        if body is None:
            while len(self._bodies) >= self._size:
                del self._bodies[next(iter(self._bodies))]
            body = self._bodies[key] = Body(build())
        return body


class Roster:
    """Which servers were alive when this node last looked, and the index at which it first saw them so.

    Nothing of it is replicated: another node has seen other things, so its index is another one.
    """

    def __init__(self) -> None:
        self.index = 0
        self._picture: object = None

    def look(self, picture: tuple[tuple[str, bool], ...], state_index: int) -> int:
        """Note what is seen now, name and whether alive; the index, which grows whenever that changes."""
        if picture != self._picture:
            self.index = max(self.index + 1, state_index)
            self._picture = picture
        return self.index


@dataclass(frozen=True, slots=True)
class NodeView:
    """What handlers need of the node that they run on."""

    log: Log
    leader: Leader
    leaf_cache: LeafCache
    gate: NodeGate
    clock: Clock
    entropy: Entropy
    datacenter: str
    node_name: str
    peers: Mapping[str, tuple[str, int]]  # name -> (Raft address, Raft port), this node included
    connect_enabled: bool
    settings: Callable[[], AgentConfig]  # in force now
    reload: Callable[[], Awaitable[None]]  # read them again; ReloadFailed
    ready: Callable[[], Readiness]
    raft: Raft
    backups: Backups
    telemetry: Telemetry
    dev: bool = False  # every body is pretty
    blocked: BlockedQueries = field(default_factory=BlockedQueries)
    roster: Roster = field(default_factory=Roster)
    bodies: BodyCache = field(default_factory=BodyCache)
    requests: Counter[tuple[str, str, int]] = field(default_factory=Counter)  # (path, method, status) -> answers


@dataclass(frozen=True, slots=True)
class Options:
    """The query options of one request."""

    index: int = 0
    wait: float = 0.0  # seconds; not above zero means the default
    stale: bool = False
    consistent: bool = False
    max_stale: float = 0.0  # seconds; 0 = any
    fresh: bool = False  # Cache-Control asks for more than a cached answer
    pretty: bool = False
    datacenter: str = ""
    namespace_fault: str = ""  # Consul's text, for the endpoints that refuse a namespace
    token: Secret | None = None
    flags: Mapping[str, str] = field(default_factory=dict)  # every parameter but the token; the first value of each


@dataclass(frozen=True, slots=True)
class Call:
    """One request as a handler sees it."""

    options: Options
    remote: str
    body: bytes = b""
    tail: str = ""  # what follows the route's path, decoded
    upload: BinaryIO | None = None  # the body of a route that takes a file

    def caller(self, node: NodeView) -> Caller:
        """On whose behalf the handler acts."""
        return Caller(token=self.options.token, source=f"{node.node_name} {self.remote}")


@dataclass(frozen=True, slots=True)
class Reply:
    """A handler's answer; a non-empty body is JSON unless ``content_type`` says otherwise."""

    body: Body | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    content_type: str = "application/json"
    status: int = 200
    pieces: Sequence[bytes] | None = None  # a body that is sent in chunks, as it is


def site(node: NodeView) -> Site:
    """What documents about servers say of their cluster."""
    return Site(node.datacenter, node.peers, acls=node.settings().acl.enabled)


_PLAIN_OPTIONS = Options()


def parse(query: str, headers: Mapping[str, str], *, reading: bool = True) -> Options:
    """Read the options of a raw query string and the headers; InvalidQuery with Consul's text.

    A request that changes something (not ``reading``) has a datacenter and a token, but nothing to be fresh or to wait for:
    as in Consul such options are passed over then, whatever they say.
    """
    token = _token("", headers)
    if not query and "Cache-Control" not in headers and _NAMESPACE_HEADER not in headers:
        return _PLAIN_OPTIONS if token is None else Options(token=token)
    flags = _flags(query)
    token = _token(flags.pop("token", ""), headers)
    options = Options(
        pretty="pretty" in flags,
        datacenter=flags.get("dc", ""),
        namespace_fault=_namespace_fault(flags, headers),
        token=token,
        flags=flags,
    )
    return _with_freshness(options, headers) if reading else options


def _flags(query: str) -> dict[str, str]:
    if (escape := BROKEN_ESCAPE.search(query)) is not None:
        raise InvalidQuery(f'Failed to decode query: invalid URL escape "{escape[0][:3]}"')
    flags: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True, errors="replace"):
        flags.setdefault(name, value)
    return flags


def _with_freshness(options: Options, headers: Mapping[str, str]) -> Options:
    """What a read asks for besides; faults in Consul's order."""
    stale, consistent, max_stale = _consistency(options.flags)
    fresh = _cache_control(headers.get("Cache-Control", ""))
    wait = _duration(options.flags.get("wait", ""), "Invalid wait time")
    return replace(
        options,
        index=_index(options.flags.get("index", "")),
        wait=wait,
        stale=stale,
        consistent=consistent,
        max_stale=max_stale,
        fresh=fresh,
    )


def token_of(query: str, headers: Mapping[str, str]) -> Secret | None:
    """The caller's token, before anything else of the request is read."""
    named = parse_qsl(query, keep_blank_values=True, errors="replace") if "token=" in query else ()
    return _token(next((value for name, value in named if name == "token"), ""), headers)


def _token(parameter: str, headers: Mapping[str, str]) -> Secret | None:
    """The caller's token: parameter before header before bearer; an empty one is none."""
    if parameter:
        return Secret(parameter)
    if header := headers.get(_TOKEN_HEADER):
        return Secret(header)
    scheme, _, value = headers.get("Authorization", "").strip().partition(" ")
    words = value.split()  # a bearer token is one word (RFC 6750)
    return Secret(words[0]) if scheme.lower() == "bearer" and words else None


def _cache_control(raw: str) -> bool:
    fresh = False
    for directive in (each.strip().lower() for each in raw.split(",")):
        name, _, value = directive.partition("=")
        if name == "must-revalidate":
            fresh = True
        if name in {"max-age", "stale-if-error"} and "=" in directive:
            fresh = (_seconds(value) == 0 and name == "max-age") or fresh
    return fresh


def _seconds(value: str) -> int:
    digits = value[1:] if value[:1] in {"-", "+"} else value
    if not (digits.isascii() and digits.isdigit()):
        raise InvalidQuery("Invalid Cache-Control header.")
    return int(digits[:18])


def _consistency(flags: Mapping[str, str]) -> tuple[bool, bool, float]:
    given = flags.get("max_stale", "")
    max_stale = _duration(given, f"Invalid max_stale value {json.dumps(given, ensure_ascii=False)}")
    # Who says how old an answer may be takes one that is not the leader's.
    stale, consistent = "stale" in flags or max_stale > 0, "consistent" in flags
    if stale and consistent:
        raise InvalidQuery("Cannot specify ?stale with ?consistent, conflicting semantics.")
    return stale, consistent, max_stale


def _duration(text: str, fault: str) -> float:
    if not text:
        return 0.0
    try:
        return go_duration(text)
    except ValueError as exc:
        raise InvalidQuery(fault) from exc


def _index(text: str) -> int:
    if not text:
        return 0
    if (
        not (text.isascii() and text.isdigit())
        or len(text.lstrip("0")) > len(str(_INDEX_MAX))
        or int(text) >= _INDEX_MAX
    ):
        raise InvalidQuery("Invalid index")
    return int(text)


def _namespace_fault(flags: Mapping[str, str], headers: Mapping[str, str]) -> str:
    tail = "Namespaces are a Consul Enterprise feature"
    if headers.get(_NAMESPACE_HEADER):
        return f'Bad request: Invalid header: "{_NAMESPACE_HEADER}" - {tail}'
    return f'Bad request: Invalid query parameter: "ns" - {tail}' if flags.get("ns") else ""


def check_datacenter(node: NodeView, options: Options) -> None:
    """InvalidRequest for another datacenter than this one (there is no path to any)."""
    if options.datacenter not in {"", node.datacenter}:
        raise InvalidRequest("No path to datacenter")


def check_namespace(options: Options) -> None:
    """InvalidQuery for a namespace, which there is not: what is meant for one must not count for all."""
    if options.namespace_fault:
        raise InvalidQuery(options.namespace_fault)


async def fresh_state(node: NodeView, call: Call) -> CAState:
    """This node's state, as fresh as the options ask: stale, default (the leader's word) or consistent (a quorum's).

    A leader's word counts while a quorum stands by it: one that was stopped, or cut off, asks the others first.
    """
    options, leadership = call.options, node.log.leadership
    if options.stale and not (0 < options.max_stale < leadership.last_contact):
        return node.log.state
    leads = leadership.is_leader and node.clock.monotonic() < leadership.fresh_until
    if options.consistent or not leads:
        answer = await node.leader.execute(call.caller(node), ReadIndex(consistent=options.consistent))
        if isinstance(answer, ReadAt):
            await reached(node, answer.index)
    return node.log.state


def applied_index(state: CAState, _leadership: Leadership) -> int:
    """Selector: how far this node has applied."""
    return state.index


def bundle_exists(state: CAState, _leadership: Leadership) -> bool:
    """Selector: whether the CA has an active root."""
    return state.active_root is not None


async def known_leader(node: NodeView) -> None:
    """Wait until this node knows a leader; NoLeader if it finds none in time."""
    if node.log.leadership.leader is None:
        try:
            await within(node.clock, LEADER_DEADLINE, node.log.changed(leader_of, None))
        except TimeoutError as exc:
            raise NoLeader from exc


async def reached(node: NodeView, index: int) -> None:
    """Wait until this node has applied ``index``; Unavailable if that takes too long."""
    if node.log.state.index < index:
        try:
            await within(node.clock, APPLY_DEADLINE, _apply_to(node.log, index))
        except TimeoutError as exc:
            raise Unavailable("this node lags behind the leader; ask another node or use ?stale") from exc


async def _apply_to(log: Log, index: int) -> None:
    applied: int = log.state.index
    while applied < index:
        applied = await log.changed(applied_index, applied)


async def initialized(node: NodeView, call: Call) -> CAState:
    """``fresh_state`` once the CA has a root; a read other than a stale one is held a while for it, then NotInitialized."""
    state = await fresh_state(node, call)
    if state.active_root is None and not call.options.stale:
        try:
            await within(node.clock, INITIALIZE_DEADLINE, node.log.changed(bundle_exists, False))
        except TimeoutError as exc:
            raise NotInitialized("the CA has no active root yet; see /v1/status/ready for the reason") from exc
        state = node.log.state
    return state


async def block(
    node: NodeView, options: Options, index_of: Callable[[CAState, Leadership], int], *, jitter: bool = False
) -> bool:
    """Wait, if the options ask for it, until the index passes theirs or their time is over; True if anything was waited for."""
    if not options.index or index_of(node.log.state, node.log.leadership) > options.index:
        return False
    wait = patience(options)
    if jitter:
        wait += node.entropy.uniform(0.0, wait / JITTER)
    with node.blocked.slot(), suppress(TimeoutError):
        await within(node.clock, wait, _pass(node.log, index_of, options.index))
    return True


async def _pass(log: Log, index_of: Callable[[CAState, Leadership], int], index: int) -> None:
    while (current := index_of(log.state, log.leadership)) <= index:
        await log.changed(index_of, current)


def patience(options: Options) -> float:
    """Seconds that a blocking query waits."""
    return min(options.wait, WAIT_MAX) if options.wait > 0 else WAIT_DEFAULT


def metadata(node: NodeView, index: int, *, stale: bool = True) -> dict[str, str]:
    """The X-Consul headers; an answer that was made sure of (not ``stale``) has no age."""
    leadership = node.log.leadership
    contact = min(leadership.last_contact, CONTACT_MAX) if stale and not leadership.is_leader else 0.0
    return {
        "X-Consul-Index": str(max(1, index)),
        "X-Consul-Knownleader": "false" if leadership.leader is None else "true",
        "X-Consul-Lastcontact": str(int(contact * 1000)),
    }
