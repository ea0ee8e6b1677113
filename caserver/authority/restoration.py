"""A restore as the leader sees it: pieces of another state on their way into the log, then one commit.

The node that received the snapshot verified it and brings it here piece by piece, across changes of leader if need be.
Nothing is decided on what that node claims: what is committed is what the log holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import assert_never

import structlog

from caserver.authority.ports import Log, Verdict, verdict
from caserver.authority.rotation import Rotation
from caserver.environment import Clock
from caserver.errors import CommitFailed, CommitUnknown, Conflict, InvalidArchive
from caserver.internode.keyring import Keyring
from caserver.raft.ports import NotCommitted, OutcomeUnknown
from caserver.requests import (
    AbortRestore,
    AdmitRestore,
    Caller,
    CommitRestore,
    RestoreProgress,
    RestoreRequest,
    StageRestore,
)
from caserver.state.commands import Applied, Reason, Refused, RestoreAbort, RestoreChunk, RestoreCommit
from caserver.state.key_change import reports
from caserver.state.lifecycle import is_idle
from caserver.state.model import RESTORE_IDLE, CAState

_BUSY = (
    "another restore is in progress; wait for its end "
    f"(one whose node died is given up after {RESTORE_IDLE} s) and try again"
)
_log = structlog.get_logger(__name__)


class Restoration:
    """Takes the steps of a restore."""

    def __init__(self, log: Log, *, rotation: Rotation, keyring: Keyring, clock: Clock) -> None:
        self._log = log
        self._rotation = rotation
        self._keyring = keyring
        self._clock = clock

    async def execute(self, caller: Caller, request: RestoreRequest, *, still: Callable[[], None]) -> RestoreProgress:
        """Take one step. Conflict: another restore is in the way, or this one was given up; InvalidArchive: it cannot be.

        ``still`` raises if the caller may not any more when it is the turn of a commit.
        """
        match request:
            case AdmitRestore():
                return self._admit()
            case StageRestore():
                return await self._stage(caller, request)
            case CommitRestore():
                return await self._rotation.alone(lambda: self._commit(caller, request, still))
            case AbortRestore():
                return await self._abort(caller)
            case _:
                assert_never(request)

    def _admit(self) -> RestoreProgress:
        state = self._log.state
        if state.restoring is not None and not is_idle(state.restoring, self._now()):
            raise Conflict(_BUSY)
        return RestoreProgress(state.index)

    async def _stage(self, caller: Caller, request: StageRestore) -> RestoreProgress:
        if request.number == 0:
            self._require_keys(request.key_ids)
            _log.info("a restore begins", source=caller.source, request_id=caller.request_id)
        command = RestoreChunk(
            request_id=caller.request_id,
            at=self._now(),
            number=request.number,
            piece=request.piece,
            key_ids=request.key_ids,
        )
        return self._progress(caller, verdict(await self._log.propose(command)))

    async def _commit(self, caller: Caller, request: CommitRestore, still: Callable[[], None]) -> RestoreProgress:
        if caller.request_id not in self._log.state.requests:  # not done already, with the tokens of before
            still()
        restoring = self._log.state.restoring
        if restoring is not None and restoring.request_id == caller.request_id:
            self._require_keys(restoring.key_ids)
        command = RestoreCommit(
            request_id=caller.request_id, at=self._now(), pieces=request.pieces, digest=request.digest
        )
        before = self._log.state.acl.tokens.keys()
        progress = self._progress(caller, verdict(await self._log.propose(command)))
        after = self._log.state.acl.tokens.keys()
        _log.info(
            "the cluster is restored",
            source=caller.source,
            request_id=caller.request_id,
            index=progress.index,
            tokens_back=len(set(after) - set(before)),
            tokens_gone=len(set(before) - set(after)),
        )
        return RestoreProgress(progress.index, done=True)

    async def _abort(self, caller: Caller) -> RestoreProgress:
        command = RestoreAbort(request_id=caller.request_id, at=self._now())
        outcome = verdict(await self._log.propose(command))
        if isinstance(outcome, Refused):  # there is nothing to forget: it is done, or nothing had come
            return _found(self._log.state, caller.request_id)
        return self._progress(caller, outcome)

    def _progress(self, caller: Caller, outcome: Verdict) -> RestoreProgress:
        match outcome:
            case Applied(index=index):
                return RestoreProgress(index)
            case Refused(reason=Reason.DUPLICATE_REQUEST):
                return _found(self._log.state, caller.request_id)
            case Refused(reason=Reason.RESTORE_IN_PROGRESS):
                raise Conflict(_BUSY)
            case Refused(reason=Reason.NO_SUCH_RESTORE):
                raise Conflict("the restore was given up before it was whole, nothing was changed; start it anew")
            case Refused() as refused:
                raise InvalidArchive(f"the snapshot cannot be restored, nothing was changed: {refused.detail}")
            case NotCommitted(reason=why):
                raise CommitFailed(f"the restore did not go on: {why}")
            case OutcomeUnknown(reason=why):
                raise CommitUnknown(f"outcome unknown, read before repeating: {why}")
            case _:
                assert_never(outcome)

    def _require_keys(self, key_ids: tuple[str, ...]) -> None:
        """InvalidArchive if a server that said so, or this one, could not open what is in the snapshot."""
        leadership = self._log.leadership
        held = {name: report.held for name, report in reports(leadership).items() if report is not None}
        held[leadership.node] = self._keyring.key_ids
        for name, keys in sorted(held.items()):
            missing = sorted(set(key_ids) - set(keys))
            if missing:
                raise InvalidArchive(
                    f"the snapshot holds secrets sealed with key {', '.join(missing)}, which {name} does not hold: list "
                    "that cluster_secret behind the current one on every server, restart them, and restore again"
                )

    def _now(self) -> int:
        return int(self._clock.now().timestamp())


def _found(state: CAState, request_id: str) -> RestoreProgress:
    """How far a restore is that may be over."""
    record = state.requests.get(request_id)
    return RestoreProgress(state.index) if record is None else RestoreProgress(record.index, done=True)
