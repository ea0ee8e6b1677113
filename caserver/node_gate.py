"""The gate of what this node answers itself: from its own copy of tokens and policies, as fresh as a refusal needs.

A follower's copy may lag behind the leader's by moments: a token that was made through another node is not refused before
the copy has caught up. While no leader is known the copy is trusted, or everything that needs a permission is refused: as
``acl.down_policy`` says.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from caserver.acl import Permission
from caserver.authority.gate import DENIED, OPEN, UNKNOWN_TOKEN, Gate, recorded
from caserver.authority.ports import Log
from caserver.environment import Clock, within
from caserver.errors import CaserverError, PermissionDenied
from caserver.fields import Secret
from caserver.forwarding.leader import Leader
from caserver.raft.ports import Leadership
from caserver.requests import Caller, ReadAt, ReadIndex
from caserver.state.acl import Token
from caserver.state.model import CAState, Index

CATCH_UP = 2.0  # seconds that a refused caller waits for this node's copy to become as fresh as the leader's


def applied(state: CAState, _leadership: Leadership) -> Index:
    """Selector: how far this node has applied."""
    return state.index


class NodeGate:
    """Asks the gate about what the leader is not asked about."""

    def __init__(self, gate: Gate, log: Log, leader: Leader, *, clock: Clock, down_deny: bool = False) -> None:
        self._gate = gate
        self._log = log
        self._leader = leader
        self._clock = clock
        self._down_deny = down_deny
        self.closed = gate is not OPEN  # whether ACLs are on: some callers may do more than others

    def is_stranger(self, token: Secret | None) -> bool:
        """Whether this is, while ACLs are on, the token of nobody, or one that cannot be checked."""
        if not self.closed:
            return False
        try:
            return token is None or self._gate.token(Caller(token=token)) is None
        except CaserverError:  # who needs a permission is told
            return True

    def doubts(self, caller: Caller, permission: Permission | None) -> bool:
        """Whether this node, by its own copy as it is now, would refuse the caller, or does not know who it is."""
        return (
            self.is_stranger(caller.token) if permission is None else self._gate.refusal(caller, permission) is not None
        )

    async def require(self, caller: Caller, permission: Permission | None, *, operation: str) -> None:
        """PermissionDenied, written down, unless the caller may."""
        refusal = await self._refusal(caller, permission)
        if refusal is not None:
            raise recorded(self._gate, refusal, caller, permission, operation=operation)

    async def covered(self, caller: Caller, permissions: Sequence[Permission], *, operation: str) -> list[bool]:
        """Which of these the caller has, for what is left out of an answer otherwise.

        PermissionDenied, written down, for a token that is not known or has expired.
        """
        for permission in permissions:
            refusal = await self._refusal(caller, permission)
            if refusal is None:
                continue
            if refusal.detail == UNKNOWN_TOKEN:
                raise recorded(self._gate, refusal, caller, permission, operation=operation)
            break  # this node's copy is as fresh now as it gets
        return [self._refusal_now(caller, permission) is None for permission in permissions]

    async def _refusal(self, caller: Caller, permission: Permission | None) -> PermissionDenied | None:
        """Why the caller may not, None if it may."""
        refusal = self._refusal_now(caller, permission)
        leadership = self._log.leadership
        if refusal is None or caller.token is None or leadership.is_leader or leadership.leader is None:
            return refusal
        with contextlib.suppress(TimeoutError, CaserverError):
            await within(self._clock, CATCH_UP, self._catch_up())
        return self._refusal_now(caller, permission)

    def _refusal_now(self, caller: Caller, permission: Permission | None) -> PermissionDenied | None:
        if permission is not None and self._down_deny and self._log.leadership.leader is None:
            return PermissionDenied(DENIED)
        return self._gate.refusal(caller, permission)

    def token(self, caller: Caller) -> Token | None:
        """The caller's token as this node knows it; None for none, for one that is not known and for one that has expired."""
        return self._gate.token(caller)

    async def _catch_up(self) -> None:
        answer = await self._leader.execute(Caller(), ReadIndex())
        index = answer.index if isinstance(answer, ReadAt) else 0
        seen = self._log.state.index
        while seen < index:
            seen = await self._log.changed(applied, seen)
