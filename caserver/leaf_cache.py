"""This node's service keys and leaves: made once, served from memory, renewed in the background.

A key never leaves the process but to its caller and is never stored. One request per service is under way at a time,
whoever waits shares it. A leaf is renewed at a random point of its life, or, after a change of root or signing
certificate, within the window in which the whole cluster moves; blocking queries return when that happened here. A leaf
that nobody read for the length of its own life is dropped.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import heapq
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import structlog
from cryptography.hazmat.primitives.asymmetric import ec

from caserver.acl import SERVICE_WRITE
from caserver.authority.ports import Log
from caserver.environment import Clock, Entropy, PrivateKey, within
from caserver.errors import CaserverError, NotInitialized, PermissionDenied, Unavailable, from_kind
from caserver.forwarding.leader import Leader
from caserver.node_gate import NodeGate
from caserver.pki.csr import make_csr
from caserver.pki.keys import sec1_pem
from caserver.pki.spiffe import ServiceID, check_service_name
from caserver.raft.ports import Leadership
from caserver.requests import Caller, Failure, IssuedLeaf, LeavesSigned, SignLeaves
from caserver.state.lifecycle import epoch, renew_at, renew_window
from caserver.state.model import CAState

LAST_TENTH = 0.9  # of its life after which a leaf is renewed while its reader waits
WAIT_MAX = 600.0  # seconds that a blocking read waits unless told
TRUST_DOMAIN_DEADLINE = 7.0  # seconds for which a first leaf waits for the cluster to be bootstrapped
RENEWALS_MAX = 32  # under way at once in the background
_RETRY = (5.0, 15.0)  # seconds until a renewal that failed is tried again
_LOOK_AGAIN = 30.0  # seconds of sleep at most, so that a jump of the wall clock is noticed
_DUE_SLACK = 64  # stale places in the heap beyond as many as there are entries
_EXPIRY_MARGIN = 1  # seconds before NotAfter at which a leaf counts as expired
_log = structlog.get_logger("caserver.leaf_cache")


@dataclass(frozen=True, slots=True)
class CachedLeaf:
    """A leaf as this node serves it."""

    leaf: IssuedLeaf
    key_pem: str = field(repr=False)  # SEC1
    age: float  # seconds since this node received it
    hit: bool  # served as it was held, without waiting for anything
    memo: dict[bool, object] = field(default_factory=dict, repr=False, compare=False)  # the reader's renderings, shared


@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    leaf: IssuedLeaf
    key_pem: str = field(repr=False)
    received: float  # monotonic
    memo: dict[bool, object] = field(default_factory=dict, repr=False)

    @property
    def life(self) -> int:
        return self.leaf.not_after - self.leaf.not_before

    def serve(self, now: float, *, hit: bool) -> CachedLeaf:
        age = max(0.0, now - self.received)
        return CachedLeaf(self.leaf, self.key_pem, age, hit, self.memo)


@dataclass(slots=True, eq=False)
class _Entry:
    """One service."""

    service: str
    caller: Caller  # who read it last: on whose behalf it is renewed
    asked_for: Caller  # on whose behalf the latest request was made
    last_read: float  # monotonic
    held: _Held | None = None
    renew_at: float = 0.0  # wall clock, epoch seconds
    retry_at: float = 0.0  # wall clock; after a failure, a reader waits for no new try before this
    flight: asyncio.Task[_Held] | None = None
    readers: int = 0  # calls that hold on to the entry
    renewed: asyncio.Event = field(default_factory=asyncio.Event)


def trust_domain(state: CAState, _leadership: Leadership) -> str | None:
    """Selector: the trust domain, None before bootstrap."""
    return state.trust_domain


class LeafCache:
    """Serves leaves of services with their keys; ``run`` renews them."""

    def __init__(
        self,
        log: Log,
        leader: Leader,
        *,
        gate: NodeGate,
        clock: Clock,
        entropy: Entropy,
        datacenter: str,
        max_entries: int,
        clock_fault: Callable[[], str | None] = lambda: None,
    ) -> None:
        """``max_entries`` may be changed while it runs.

        ``clock_fault`` says why the wall clock of this node is not to be trusted: nothing falls due by it then.
        """
        self._log = log
        self._leader = leader
        self._gate = gate
        self._clock = clock
        self._entropy = entropy
        self._datacenter = datacenter
        self.max_entries = max_entries
        self._clock_fault = clock_fault
        self._entries: OrderedDict[str, _Entry] = OrderedDict()  # least recently read first
        self._due: list[tuple[float, int, _Entry]] = []  # heap; an entry's place counts if its time is the entry's
        self._pushed = 0
        self._kick = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def leaf(
        self, caller: Caller, service: str, *, after: int = 0, wait: float = WAIT_MAX, fresh: bool = False
    ) -> CachedLeaf:
        """The service's leaf and key.

        With ``after`` above zero it returns once the leaf's index is greater, or after ``wait`` seconds with what is
        held. ``fresh`` asks for a leaf under the present root and signing certificate. Never an expired leaf: raises what
        kept a new one from being issued. PermissionDenied unless the caller may write the service, at every read.
        """
        check_service_name(
            service, trust_domain=self._log.state.trust_domain or "<trust domain>", datacenter=self._datacenter
        )
        permission = SERVICE_WRITE.of(service)
        await self._gate.require(caller, permission, operation="leaf")
        entry = self._entry(caller, service)
        entry.readers += 1
        try:
            try:
                found = await self._read(entry, after=after, wait=wait, fresh=fresh)
            except PermissionDenied:
                if entry.asked_for == caller:
                    raise
                # It was denied to another reader, whose request this one joined.
                entry.caller = caller
                found = await self._read(entry, after=after, wait=wait, fresh=fresh)
            if not found.hit:  # what was waited for may come after the token was taken away
                await self._gate.require(caller, permission, operation="leaf")
            return found
        finally:
            entry.readers -= 1
            if entry.held is None and entry.flight is None and not entry.readers:
                self._drop(entry)

    @property
    def size(self) -> int:
        """How many services it holds."""
        return len(self._entries)

    async def run(self) -> None:
        """Renew leaves when they are due and drop those that nobody reads; runs until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._follow_epoch())
                group.create_task(self._renew_when_due())
        finally:
            for task in self._tasks:
                task.cancel()

    # -- reading

    async def _read(self, entry: _Entry, *, after: int, wait: float, fresh: bool) -> CachedLeaf:
        held, hit = entry.held, True
        if held is None or self._expired(held) or self._forgotten(held):
            held, hit = await self._flight(entry), False
        elif self._worn(entry, held):
            held, hit = await self._refreshed(entry, held)
        if fresh and not self._current(held):
            # Once more if need be: the first answer may be that of a request begun before the root changed.
            for _ in range(2):
                held, hit = await self._refreshed(entry, held)
                if hit or self._current(held):
                    break
        if after and held.leaf.index <= after:
            held, hit = await self._next(entry, after, wait), False
        return held.serve(self._clock.monotonic(), hit=hit)

    async def _refreshed(self, entry: _Entry, held: _Held) -> tuple[_Held, bool]:
        """A new leaf, or the old one while it is valid if none can be had; PermissionDenied if the leader denies it."""
        try:
            return await self._flight(entry), False
        except PermissionDenied:  # this node's copy of the tokens lags behind the leader's
            raise
        except CaserverError:
            return held, True

    async def _next(self, entry: _Entry, after: int, wait: float) -> _Held:
        with contextlib.suppress(TimeoutError):
            await within(self._clock, wait, self._passes(entry, after))
        held = entry.held
        if held is None or self._expired(held) or self._forgotten(held):
            return await self._flight(entry)
        return held

    async def _passes(self, entry: _Entry, after: int) -> None:
        while entry.held is None or entry.held.leaf.index <= after:
            await entry.renewed.wait()

    def _expired(self, held: _Held) -> bool:
        return self._clock.now().timestamp() >= held.leaf.not_after - _EXPIRY_MARGIN

    def _worn(self, entry: _Entry, held: _Held) -> bool:
        if self._ends_with_issuer(held):
            return False
        return self._clock.now().timestamp() >= max(held.leaf.not_before + LAST_TENTH * held.life, entry.retry_at)

    def _ends_with_issuer(self, held: _Held) -> bool:
        """Whether no renewal under the present root could bring a longer life."""
        root = self._log.state.active_root
        return root is not None and root.id == held.leaf.root_id and root.not_after <= held.leaf.not_after

    def _renewal_of(self, held: _Held) -> float:
        """Instant at which a leaf that just came is to be renewed, unless root or signing certificate change before."""
        leaf = held.leaf
        if self._ends_with_issuer(held):
            return float(leaf.not_after)
        jitter, now = self._entropy.uniform(0.0, 1.0), self._clock.now().timestamp()
        return float(renew_at(leaf.not_before, leaf.not_after, jitter, now=now))

    def _current(self, held: _Held) -> bool:
        """Whether the leaf was signed under the present root and signing certificate, as far as this node knows."""
        state = self._log.state
        root = state.active_root
        if root is None or state.index < held.leaf.index:
            return True  # this node lags behind the leader that signed
        if held.leaf.index <= state.restored_index:
            return False  # booked in a past that the cluster was restored over
        return (root.id, root.signing_key_id) == (held.leaf.root_id, held.leaf.signing_key_id)

    def _forgotten(self, held: _Held) -> bool:
        """Whether the leaf leads to a root that a restore took away: nobody who fetches the roots trusts it."""
        state = self._log.state
        return held.leaf.index <= state.restored_index and state.root(held.leaf.root_id) is None

    # -- entries

    def _entry(self, caller: Caller, service: str) -> _Entry:
        entry = self._entries.get(service)
        now = self._clock.monotonic()
        if entry is None:
            self._make_room()
            entry = self._entries[service] = _Entry(service, caller, caller, now)
            return entry
        entry.caller, entry.last_read = caller, now
        self._entries.move_to_end(service)
        return entry

    def _make_room(self) -> None:
        while len(self._entries) >= self.max_entries:
            idle = next((each for each in self._entries.values() if not each.readers and each.flight is None), None)
            if idle is None:
                raise Unavailable(
                    "every leaf that this node may hold is being waited for; raise leaf_cache_max or ask another node"
                )
            self._drop(idle)

    def _drop(self, entry: _Entry) -> None:
        """Forget a leaf and its key; places in the heap may outlive the entry."""
        if self._entries.get(entry.service) is entry:
            del self._entries[entry.service]
        entry.held = None

    # -- issuing

    async def _flight(self, entry: _Entry) -> _Held:
        """Join the request under way for this service, or start it; it goes on if its callers go away."""
        if entry.flight is None:
            entry.flight = self._spawn(entry)
        return await asyncio.shield(entry.flight)

    async def _issue(self, entry: _Entry) -> _Held:
        before, asked_in = entry.held, self._log.state.ca_epoch
        try:
            held = await self._sign(entry)
            self._store(entry, held, asked_in)
            return held
        finally:
            entry.flight = None
            if before is not None and entry.held is before:
                entry.retry_at = self._clock.now().timestamp() + self._entropy.uniform(*_RETRY)
                self._schedule(entry, entry.retry_at)

    async def _sign(self, entry: _Entry) -> _Held:
        identity = ServiceID(await self._trust_domain(), self._datacenter, entry.service)
        key = _ec(self._entropy.private_key("ec", 256))
        request = SignLeaves(csrs=(make_csr(key, identity.uri),))
        answer = await self._leader.execute(entry.asked_for, request)
        if not isinstance(answer, LeavesSigned) or len(answer.results) != 1:
            raise TypeError(f"signing one CSR was answered by {type(answer).__name__}")
        result = answer.results[0]
        if isinstance(result, Failure):
            raise from_kind(result.kind, result.detail)
        return _Held(leaf=result, key_pem=sec1_pem(key), received=self._clock.monotonic())

    async def _trust_domain(self) -> str:
        known = self._log.state.trust_domain
        if known is not None:
            return known
        try:
            known = await within(self._clock, TRUST_DOMAIN_DEADLINE, self._log.changed(trust_domain, None))
        except TimeoutError as exc:
            raise NotInitialized("this cluster has no trust domain yet; see /v1/status/ready for the reason") from exc
        if known is None:
            raise NotInitialized("this cluster has no trust domain yet")
        return known

    def _store(self, entry: _Entry, held: _Held, asked_in: int) -> None:
        entry.held = held
        self._schedule(entry, self._renewal_of(held))
        if self._log.state.ca_epoch != asked_in and not self._current(held):
            self._move(entry, self._window())  # signed just before a change that is known here by now
        renewed, entry.renewed = entry.renewed, asyncio.Event()
        renewed.set()

    def _spawn(self, entry: _Entry) -> asyncio.Task[_Held]:
        entry.asked_for = entry.caller
        task = asyncio.get_running_loop().create_task(self._issue(entry))
        self._tasks.add(task)
        task.add_done_callback(functools.partial(self._done, entry.service))
        return task

    def _done(self, service: str, task: asyncio.Task[_Held]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or (exc := task.exception()) is None:
            return
        if isinstance(exc, CaserverError):
            _log.warning("leaf_not_issued", service=service, error=exc.detail)
        else:
            _log.error("leaf_issue_broke", service=service, exc_info=exc)

    # -- renewing

    def _schedule(self, entry: _Entry, at: float) -> None:
        entry.renew_at = at
        self._pushed += 1
        heapq.heappush(self._due, (at, self._pushed, entry))
        if len(self._due) > 2 * len(self._entries) + _DUE_SLACK:
            self._due = [place for place in self._due if self._counts(place[0], place[2])]
            heapq.heapify(self._due)
        if self._due[0][2] is entry:
            self._kick.set()

    def _counts(self, at: float, entry: _Entry) -> bool:
        """Whether a place in the heap is that of an entry which is kept, and its latest one."""
        return at == entry.renew_at and self._entries.get(entry.service) is entry

    def _window(self) -> float:
        return float(renew_window(self._log.state, int(self._clock.now().timestamp())))

    def _move(self, entry: _Entry, window: float) -> None:
        """Renew within the window in which the cluster moves to a new root, or earlier if that was due."""
        at = self._clock.now().timestamp() + self._entropy.uniform(0.0, window)
        if at < entry.renew_at:
            self._schedule(entry, at)

    async def _follow_epoch(self) -> None:
        seen = epoch(self._log.state, self._log.leadership)
        while True:
            window = self._window()
            for entry in list(self._entries.values()):
                if entry.held is not None and not self._current(entry.held):
                    self._move(entry, window)
            seen = await self._log.changed(epoch, seen)

    async def _renew_when_due(self) -> None:
        limit = asyncio.Semaphore(RENEWALS_MAX)
        while True:
            entry = await self._next_due()
            if self._unread(entry):
                self._drop(entry)
            elif entry.held is not None and entry.flight is None:
                await limit.acquire()
                entry.flight = entry.flight or self._spawn(entry)
                entry.flight.add_done_callback(lambda _task: limit.release())

    def _unread(self, entry: _Entry) -> bool:
        """Nobody read the leaf for the length of its life, and nobody waits for it."""
        if entry.held is None or entry.readers:
            return False
        return self._clock.monotonic() - entry.last_read >= entry.held.life

    async def _next_due(self) -> _Entry:
        """Wait for the next entry that is due."""
        while True:
            now, doubted = self._clock.now().timestamp(), self._clock_fault() is not None
            while not doubted and self._due and self._due[0][0] <= now:
                at, _, entry = heapq.heappop(self._due)
                if self._counts(at, entry):
                    return entry
            pause = min(_LOOK_AGAIN, self._due[0][0] - now) if self._due and not doubted else _LOOK_AGAIN
            self._kick.clear()
            with contextlib.suppress(TimeoutError):
                await within(self._clock, pause, self._kick.wait())


def _ec(key: PrivateKey) -> ec.EllipticCurvePrivateKey:
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TypeError("service keys are EC keys")
    return key
