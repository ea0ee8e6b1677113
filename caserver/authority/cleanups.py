"""Clean-up that is owed at the backends of former CA providers, as operators see it and give it up.

It is tried again for as long as it is owed (see ``maintenance``): a backend may be gone for good, and only people know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import assert_never

import structlog

from caserver.authority.custody import Custody
from caserver.authority.ports import Leavings, Log, verdict
from caserver.authority.rotation import Rotation
from caserver.cleanup_requests import (
    CleanupForgotten,
    CleanupRequest,
    CleanupsRead,
    ForgetCleanup,
    OwedCleanup,
    ReadCleanups,
)
from caserver.environment import Clock
from caserver.errors import CaserverError, CommitFailed, CommitUnknown, Corrupt, NotFound
from caserver.raft.ports import NotCommitted, OutcomeUnknown
from caserver.requests import Caller
from caserver.state.commands import Applied, ProviderRetired, Reason, Refused
from caserver.state.configuration import open_stored
from caserver.state.model import CAState, Retiring

_log = structlog.get_logger(__name__)


class Cleanups:
    """Lists what is owed, and forgets."""

    def __init__(
        self, log: Log, *, custody: Custody, rotation: Rotation, clock: Clock, why: Callable[[Retiring], str]
    ) -> None:
        """``why`` says why the latest try failed, if one did."""
        self._log = log
        self._custody = custody
        self._rotation = rotation
        self._clock = clock
        self._why = why

    async def execute(
        self, caller: Caller, request: CleanupRequest, *, still: Callable[[], None]
    ) -> CleanupsRead | CleanupForgotten:
        """Do one of the two; NotFound if what is to be forgotten is not owed.

        ``still`` raises if the caller may not any more when it is the turn of the request.
        """
        match request:
            case ReadCleanups():
                await self._log.barrier()
                state = self._log.state
                return CleanupsRead(tuple(self._described(state, each) for each in state.retiring))
            case ForgetCleanup():
                # Not while it is being tried: what it says of what is left would be wrong in a moment.
                return await self._rotation.alone(lambda: self._forget(caller, request, still))
            case _:
                assert_never(request)

    async def _forget(self, caller: Caller, request: ForgetCleanup, still: Callable[[], None]) -> CleanupForgotten:
        await self._log.barrier()
        state = self._log.state
        done = state.requests.get(caller.request_id)
        if done is not None:
            return CleanupForgotten(done.index)
        still()
        retiring = next((each for each in state.retiring if each.id == request.cleanup_id), None)
        if retiring is None:
            raise NotFound(
                f'no clean-up "{request.cleanup_id[:64]}" is owed: it was done or given up, or never was; '
                "`caserver connect ca cleanup list` shows those that are"
            )
        command = ProviderRetired(
            at=int(self._clock.now().timestamp()),
            root_id=retiring.root_id,
            epoch=retiring.epoch,
            request_id=caller.request_id,
        )
        owed = self._described(state, retiring)
        outcome = verdict(await self._log.propose(command))
        match outcome:
            case Applied(index=index):
                _log.warning("an operator gave a clean-up up", **_told(owed), source=caller.source, index=index)
                return CleanupForgotten(index)
            case Refused(reason=Reason.DUPLICATE_REQUEST, record=record) if record is not None:
                return CleanupForgotten(record.index)
            case Refused() as refused:
                raise NotFound(f"the clean-up is not owed any more: {refused.detail}")
            case NotCommitted(reason=why):
                raise CommitFailed(f"the clean-up was not given up: {why}")
            case OutcomeUnknown(reason=why):
                raise CommitUnknown(f"outcome unknown, read before repeating: {why}")
            case _:
                assert_never(outcome)

    def _described(self, state: CAState, retiring: Retiring) -> OwedCleanup:
        found = self._leavings(state, retiring) or Leavings("", "", "", ())
        return OwedCleanup(
            id=retiring.id,
            provider=retiring.configuration.provider,
            address=found.address,
            namespace=found.namespace,
            path=found.path,
            left=found.things,
            not_before=retiring.not_before,
            reason=self._why(retiring),
        )

    def _leavings(self, state: CAState, retiring: Retiring) -> Leavings | None:
        try:
            of = self._custody.kind(retiring.configuration.provider).leavings
            configuration = open_stored(retiring.configuration, self._custody.keyring)
        except (CaserverError, Corrupt):
            return None  # it cannot be cleaned up for that very reason, which is told
        if of is None:
            return None
        return of(configuration, trust_domain=state.trust_domain or "", epoch=retiring.epoch)


def _told(owed: OwedCleanup) -> dict[str, object]:
    return {
        "id": owed.id,
        "provider": owed.provider,
        "address": owed.address,
        "namespace": owed.namespace,
        "path": owed.path,
        "left": owed.left,
        "reason": owed.reason,
    }
