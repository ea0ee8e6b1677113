"""Gets an operation done by whoever leads: here, or one hop away; a fail-over is a pause for the caller, not an error.

A call that finds no leader is held and tried again until ``hold_timeout``. Trying again is safe because signing is never
de-duplicated (an orphan booking expires) and because a change of the configuration carries a request id, drawn once, by
which the authority finds its first effect. A change whose outcome stays open ends as ``CommitUnknown``, whatever the later
tries said.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Protocol, assert_never

from caserver.acl_requests import ACLRequest, PutPolicy, PutToken
from caserver.authority.issuance import DROP_AFTER
from caserver.authority.ports import Log
from caserver.cleanup_requests import ForgetCleanup, ReadCleanups
from caserver.environment import Clock, Entropy, within
from caserver.errors import (
    CaserverError,
    CommitFailed,
    CommitUnknown,
    Conflict,
    NoLeader,
    NotInitialized,
    NotLeader,
    Unavailable,
)
from caserver.fields import Secret
from caserver.raft.ports import Leadership
from caserver.requests import (
    AbortRestore,
    AdmitRestore,
    Answer,
    Caller,
    ChangeConfiguration,
    CommitRestore,
    ReadIndex,
    ReadServers,
    Request,
    SignLeaves,
    StageRestore,
    TransferLeadership,
    decode_answer,
    encode_request,
)
from caserver.state.model import CAState

_REQUEST_ID_BYTES = 16
_BACKOFF = 0.05  # seconds before the second try while nothing seems to change; doubles up to
_BACKOFF_MAX = 0.5
_READ_DEADLINE = 5.0  # seconds for one try
_TRANSFER_DEADLINE = 10.0
_STEP_DEADLINE = 10.0  # for one command through the log
_ACL_DEADLINE = 15.0  # a write that is decided again and again
_CHANGE_DEADLINE = 120.0  # covers generating an RSA-4096 key and a slow backend

_Route = tuple[str | None, bool, int]


class Hop(Protocol):
    """One hop to another node."""

    async def send(self, node: str, frame: bytes, deadline: float) -> bytes:
        """Deliver one frame and return the answer frame; ``deadline`` in seconds.

        NotLeader if the frame certainly was not delivered, CommitUnknown if it may have been.
        """
        ...


def route(_state: CAState, leadership: Leadership) -> _Route:
    """Selector of ``Log.changed``: everything that decides where an operation goes."""
    return leadership.leader, leadership.is_leader, leadership.term


@dataclass(frozen=True, slots=True)
class Patience:
    """How long and how much is waited for a leader."""

    hold_timeout: float = 7.0  # seconds that a call is held
    suspicion: float = 0.25  # seconds after which an unanswered hop is raced against a change of leader
    held_max: int = 4096  # calls waiting for a leader at once
    held_bytes_max: int = 32 * 1024 * 1024  # and their size together


class Leader:
    """``execute`` runs an operation on the leader and returns its answer."""

    def __init__(
        self,
        log: Log,
        *,
        execute: Callable[[Caller, Request], Awaitable[Answer]],
        hop: Hop,
        clock: Clock,
        entropy: Entropy,
        patience: Patience | None = None,
        own_token: Secret | None = None,
    ) -> None:
        """``own_token`` is what this node shows when it asks on its own behalf; it may be changed while it runs."""
        self._log = log
        self._execute = execute
        self._hop = hop
        self._clock = clock
        self._entropy = entropy
        self._patience = patience or Patience()
        self.own_token = own_token
        self._held = 0
        self._held_bytes = 0
        self._rounds: dict[bool, asyncio.Task[Answer]] = {}  # reads that have not been sent yet
        self._round_locks = {False: asyncio.Lock(), True: asyncio.Lock()}

    async def execute(self, caller: Caller, request: Request) -> Answer:
        """Do ``request`` on the leader. Raises what the authority raised; NoLeader if none was found in time."""
        if isinstance(request, ReadIndex):
            return await self._join_round(request)
        if not caller.request_id:
            caller = replace(caller, request_id=self._entropy.bytes(_REQUEST_ID_BYTES).hex())
        return await self._held_execute(caller, request, self._clock.monotonic() + self._patience.hold_timeout)

    async def _join_round(self, request: ReadIndex) -> Answer:
        """Ask for the index once for all reads that arrive while the question before is under way.

        A round that was sent already is joined by nobody: its answer may be older than the read. The question is the
        node's own (its answer says nothing that a token would protect), so it carries no caller but this node.
        """
        task = self._rounds.get(request.consistent)
        if task is None:
            until = self._clock.monotonic() + self._patience.hold_timeout
            task = asyncio.get_running_loop().create_task(self._round(request, until))
            task.add_done_callback(_retrieve)
            self._rounds[request.consistent] = task
        return await asyncio.shield(task)

    async def _round(self, request: ReadIndex, until: float) -> Answer:
        async with self._round_locks[request.consistent]:
            del self._rounds[request.consistent]
            own = Caller(token=self.own_token, source=self._log.leadership.node)
            return await self._held_execute(own, request, until)

    async def _held_execute(self, caller: Caller, request: Request, until: float) -> Answer:
        try:
            return await self._once(caller, request)
        except (NotLeader, CommitFailed, CommitUnknown, NotInitialized) as exc:
            return await self._hold(caller, request, first=exc, until=until)

    async def _once(self, caller: Caller, request: Request) -> Answer:
        """One try. Leaves that were proposed longer ago than a signature may take are dropped, wherever they were held up.

        The leader drops late signatures too, but it may stand still after it looked. Nothing was proposed before this
        try began, so its own length bounds the age of what it brings.
        """
        began = self._clock.monotonic()
        answer = await self._try(caller, request)
        if isinstance(request, SignLeaves) and self._clock.monotonic() - began > DROP_AFTER:
            raise CommitUnknown(f"the leaves came later than {DROP_AFTER:g} s after they were asked for: dropped")
        return answer

    async def _try(self, caller: Caller, request: Request) -> Answer:
        leadership = self._log.leadership
        if leadership.is_leader:
            return await self._execute(caller, request)
        leader = leadership.leader
        if leader is None or leader == leadership.node:
            raise NotLeader("no leader is known")
        return await self._forward(leader, caller, request)

    async def _forward(self, node: str, caller: Caller, request: Request) -> Answer:
        """One hop; given up early if the leader changes while the answer is awaited."""
        seen = route(self._log.state, self._log.leadership)
        send = asyncio.ensure_future(self._hop.send(node, encode_request(caller, request), _deadline(request)))
        changed: asyncio.Future[_Route] | None = None
        try:
            await asyncio.wait((send,), timeout=self._patience.suspicion)
            if not send.done():
                changed = asyncio.ensure_future(self._log.changed(route, seen))
                await asyncio.wait((send, changed), return_when=asyncio.FIRST_COMPLETED)
            if not send.done():
                raise CommitUnknown(f"{node} ceased to lead before it answered")
            return decode_answer(send.result())
        finally:
            send.cancel()
            if changed is not None:
                changed.cancel()

    async def _hold(self, caller: Caller, request: Request, *, first: Unavailable, until: float) -> Answer:
        """Try again until it works or the time is over; within the bounds on held calls."""
        size = _size(request)
        if self._held >= self._patience.held_max or self._held_bytes + size > self._patience.held_bytes_max:
            raise Unavailable("too many calls are waiting for a leader on this node; try again later") from first
        self._held += 1
        self._held_bytes += size
        try:
            return await self._retry(caller, request, first=first, until=until)
        finally:
            self._held -= 1
            self._held_bytes -= size

    async def _retry(self, caller: Caller, request: Request, *, first: Unavailable, until: float) -> Answer:
        doubt = _doubt(request, first)
        last = first
        backoff = _BACKOFF
        while (left := until - self._clock.monotonic()) > 0:
            await self._pause(min(left, backoff), left)
            backoff = min(2 * backoff, _BACKOFF_MAX)
            try:
                return await self._once(caller, request)
            except (NotLeader, CommitFailed, CommitUnknown, NotInitialized) as exc:
                last = exc
                doubt = _doubt(request, exc) or doubt
            except CaserverError as exc:
                if _lost_the_comparison(request, exc):
                    raise
                # A refusal after an open outcome may be the echo of our own first try.
                raise doubt or exc from exc
        raise doubt or _final(last)

    async def _pause(self, backoff: float, left: float) -> None:
        """Wait for a reason to try again: a change of leadership if there is no leader, else a moment."""
        leadership = self._log.leadership
        if leadership.is_leader or leadership.leader not in {None, leadership.node}:
            await self._clock.sleep(backoff * self._entropy.uniform(0.5, 1.0))
            return
        with contextlib.suppress(TimeoutError):
            await within(self._clock, left, self._log.changed(route, route(self._log.state, leadership)))


def _retrieve(task: asyncio.Task[Answer]) -> None:
    """Take note of a failure that every reader may have stopped waiting for."""
    if not task.cancelled():
        task.exception()


def _doubt(request: Request, error: Unavailable) -> CommitUnknown | None:
    lasting = isinstance(request, ChangeConfiguration | CommitRestore | ForgetCleanup | ACLRequest)
    return error if isinstance(error, CommitUnknown) and lasting else None


def _final(last: Unavailable) -> Unavailable:
    """What the caller is told when the time is over."""
    return last if isinstance(last, (NotInitialized, CommitFailed)) else NoLeader()


def _lost_the_comparison(request: Request, error: CaserverError) -> bool:
    """Whether the refusal settles what an earlier try left open.

    The authority refuses a compare-and-set in the very state in which it found no effect of the same request id, after a
    barrier: no earlier try succeeded. As indexes only grow, none that is still under way can.
    """
    return isinstance(error, Conflict) and isinstance(request, ChangeConfiguration) and request.cas is not None


def _deadline(request: Request) -> float:
    if isinstance(request, ACLRequest):
        return _ACL_DEADLINE
    match request:
        case ReadIndex() | ReadServers() | ReadCleanups() | AdmitRestore():
            return _READ_DEADLINE
        case StageRestore() | AbortRestore():
            return _STEP_DEADLINE
        case SignLeaves():
            return DROP_AFTER
        case TransferLeadership():
            return _TRANSFER_DEADLINE
        case ChangeConfiguration() | CommitRestore() | ForgetCleanup():
            return _CHANGE_DEADLINE
        case _:
            assert_never(request)


def _size(request: Request) -> int:
    match request:
        case SignLeaves(csrs=csrs):
            return sum(map(len, csrs))
        case ChangeConfiguration(body=body) | PutToken(body=body) | PutPolicy(body=body):
            return len(body)
        case StageRestore(piece=piece):
            return len(piece)
        case _:
            return 0
