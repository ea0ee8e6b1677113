"""The door to everything that the leader does: what operators ask of the cluster is done here, the rest by the authority.

It counts what is signed and what is refused on its way through, for the metrics of this node.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable

import structlog

from caserver.acl import permission_of
from caserver.authority.gate import Gate, admit
from caserver.authority.ports import Log, Raft
from caserver.authority.tokens import Tokens
from caserver.cleanup_requests import ForgetCleanup, ReadCleanups
from caserver.environment import Clock
from caserver.errors import CaserverError, InvalidRequest, NotLeader, Unavailable
from caserver.raft.status import PeerStatus, RaftStatus
from caserver.requests import (
    AbortRestore,
    AdmitRestore,
    Answer,
    CAAnswer,
    Caller,
    CARequest,
    ChangeConfiguration,
    CommitRestore,
    IssuedLeaf,
    LeadershipMoved,
    LeavesSigned,
    ReadIndex,
    ReadServers,
    Request,
    ServersRead,
    ServerStatus,
    SignLeaves,
    StageRestore,
    TransferLeadership,
)

TRAILING_MAX = 250  # entries that a healthy server may lack (Consul: MaxTrailingLogs)
UNHEARD = -1.0  # last_contact of a server that was not heard since this one started

_log = structlog.get_logger(__name__)


class Operations:
    """Executes any request on the leader; refuses with NotLeader elsewhere."""

    def __init__(
        self,
        log: Log,
        *,
        raft: Raft,
        authority: Callable[[Caller, CARequest], Awaitable[CAAnswer]],
        gate: Gate,
        tokens: Tokens,
        clock: Clock,
    ) -> None:
        self._log = log
        self._raft = raft
        self._authority = authority
        self._gate = gate
        self._tokens = tokens
        self._clock = clock
        self.signed = 0  # leaves
        self.refused: Counter[str] = Counter()  # signing requests by kind of error

    async def execute(self, caller: Caller, request: Request) -> Answer:
        """Do one operation; NotLeader if this node does not lead, PermissionDenied if the caller's token does not allow it."""
        try:
            self._require_lead()
            admit(self._gate, caller, permission_of(request), operation=type(request).__name__)
            return await self._do(caller, request)
        except CaserverError as exc:
            if isinstance(request, SignLeaves):
                self.refused[exc.kind] += len(request.csrs)
            raise

    async def _do(self, caller: Caller, request: Request) -> Answer:
        match request:
            case SignLeaves():
                return self._counted(await self._authority(caller, request))
            case ChangeConfiguration() | ReadIndex() | ReadCleanups() | ForgetCleanup():
                return await self._authority(caller, request)
            case AdmitRestore() | StageRestore() | CommitRestore() | AbortRestore():
                return await self._authority(caller, request)
            case ReadServers(consistent=consistent):
                return await self._servers(consistent=consistent)
            case TransferLeadership():
                return await self._transfer(caller, request)
            case _:
                return await self._tokens.execute(caller, request)

    def _counted(self, answer: Answer) -> Answer:
        if isinstance(answer, LeavesSigned):
            for each in answer.results:
                if isinstance(each, IssuedLeaf):
                    self.signed += 1
                else:
                    self.refused[each.kind] += 1
        return answer

    async def _servers(self, *, consistent: bool) -> ServersRead:
        self._require_lead()
        if consistent:
            await self._log.barrier()
        status = await self._raft.status()
        if not status.leadership.is_leader:
            raise NotLeader("this node does not lead")
        return servers(status, now=self._clock.now().timestamp())

    async def _transfer(self, caller: Caller, request: TransferLeadership) -> LeadershipMoved:
        leadership = self._log.leadership
        self._require_lead()
        if leadership.node == request.to or (request.to is None and leadership.node != request.away_from):
            return LeadershipMoved(leadership.node)
        if not leadership.peers:
            raise InvalidRequest("there is no other server that could lead")
        if request.to is not None and request.to not in leadership.peers:
            names = ", ".join(sorted({leadership.node, *leadership.peers}))
            raise InvalidRequest(f'id "{request.to[:64]}" is no server of this cluster; they are {names}')
        _log.info("leadership transfer", to=request.to, source=caller.source)
        await self._raft.transfer_leadership(request.to)
        after = self._log.leadership
        if after.is_leader or after.leader is None:
            raise Unavailable(
                f"leadership was not handed over: {request.to or 'no other server'} could not take it; "
                "see /v1/operator/autopilot/health"
            )
        if request.to not in (None, after.leader):  # somebody else won an election meanwhile
            raise Unavailable(f"{after.leader} leads now, not {request.to}: ask again if it shall be {request.to}")
        return LeadershipMoved(after.leader)

    def _require_lead(self) -> None:
        if not self._log.leadership.is_leader:
            raise NotLeader("this node does not lead")


def servers(status: RaftStatus, *, now: float) -> ServersRead:
    """All servers as the node of ``status`` sees them, by name; the whole truth only if it leads. ``now`` is epoch seconds."""
    leadership = status.leadership
    own = ServerStatus(
        name=leadership.node,
        leader=leadership.is_leader,
        voter=leadership.is_voter,
        healthy=leadership.is_leader or leadership.leader is not None,
        connected=True,
        last_contact=0.0,
        last_index=status.last_index,
        last_term=status.last_term,
        stable_since=int(now - status.running_for),
        release=status.release,
    )
    found = [own, *(_server(status, name, peer, now) for name, peer in status.peers.items())]
    return ServersRead(tuple(sorted(found, key=lambda each: each.name)))


def _server(status: RaftStatus, name: str, peer: PeerStatus, now: float) -> ServerStatus:
    heard = peer.last_contact is not None and peer.last_contact <= status.contact_max
    follows = not status.leadership.is_leader or peer.last_index >= status.last_index - TRAILING_MAX
    return ServerStatus(
        name=name,
        leader=status.leadership.leader == name,
        voter=peer.voter,
        healthy=peer.connected and heard and follows,
        connected=peer.connected,
        last_contact=UNHEARD if peer.last_contact is None else peer.last_contact,
        last_index=peer.last_index,
        last_term=peer.last_term,
        stable_since=int(now - peer.steady_for),
        release=peer.release,
    )
