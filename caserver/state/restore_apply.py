"""``apply`` for the commands of a restore: another state arrives in pieces and takes the place of the present one at once.

The pieces are read as they come, a few milliseconds' work each, so that the commit, which every node applies, holds up
nobody. What is being brought in is part of the replicated state: it survives a change of leader, and a node that is fed
a snapshot in between has it too. Until the commit nothing else looks at it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from typing import assert_never

from caserver.errors import Corrupt
from caserver.state.codec import read_on, state_of
from caserver.state.commands import (
    Applied,
    Reason,
    Refused,
    RestoreAbort,
    RestoreChunk,
    RestoreCommand,
    RestoreCommit,
    Result,
)
from caserver.state.lifecycle import is_idle
from caserver.state.model import (
    HISTORY_MAX,
    CARoot,
    CAState,
    Configuration,
    HistoryEntry,
    Index,
    Reading,
    RequestRecord,
    Restoring,
    Retiring,
    RootID,
)
from caserver.state.repeats import next_index, refuse_duplicate, with_request

Step = tuple[CAState, Result]
OWED_AFTER = 60  # seconds from a restore to the first clean-up: what was asked of a backend may still arrive there
NOTHING_YET = ""  # the digest before the first piece


def next_digest(digest: str, piece: str) -> str:
    """The digest of all pieces up to and with ``piece``; ``digest`` is that of the ones before."""
    return hashlib.sha256(f"{digest}{piece}".encode("utf-8", "surrogatepass")).hexdigest()


def apply_restore(state: CAState, command: RestoreCommand) -> Step:
    """The state after ``command`` and its result; the same state if it is refused."""
    match command:
        case RestoreChunk():
            return restore_chunk(state, command)
        case RestoreCommit():
            return restore_commit(state, command)
        case RestoreAbort():
            return restore_abort(state, command)
        case _:
            assert_never(command)


def restore_chunk(state: CAState, command: RestoreChunk) -> Step:
    """Read one piece more; a piece that is there already changes nothing."""
    refusal = refuse_duplicate(state, command.request_id)
    if refusal is not None:
        return state, refusal
    restoring = _continued(state.restoring, command)
    if isinstance(restoring, Refused):
        return state, restoring
    try:
        *lines, tail = (restoring.tail + command.piece).encode("ascii").split(b"\n")
        reading = read_on(restoring.reading, lines)
    except (Corrupt, UnicodeEncodeError) as exc:
        return state, Refused(Reason.INVALID, f"piece {command.number} cannot be read: {exc}")
    following = replace(
        restoring,
        at=command.at,
        pieces=restoring.pieces + 1,
        digest=next_digest(restoring.digest, command.piece),
        tail=tail.decode(),
        reading=reading,
    )
    index = next_index(state)
    return replace(state, index=index, restoring=following), Applied(index)


def _continued(restoring: Restoring | None, command: RestoreChunk) -> Restoring | Refused:
    """What the piece is added to."""
    if restoring is not None and restoring.request_id == command.request_id:
        if command.number < restoring.pieces:
            return Refused(Reason.DUPLICATE_REQUEST, f"piece {command.number} is there")
        if command.number > restoring.pieces:
            return Refused(Reason.INVALID, f"piece {restoring.pieces} is missing")
        return restoring
    if command.number != 0:
        return Refused(Reason.NO_SUCH_RESTORE, "its earlier pieces are not here (any more)")
    if restoring is not None and not is_idle(restoring, command.at):
        return Refused(Reason.RESTORE_IN_PROGRESS, f"request {restoring.request_id} is in progress")
    return Restoring(
        request_id=command.request_id,
        at=command.at,
        pieces=0,
        digest=NOTHING_YET,
        key_ids=command.key_ids,
        tail="",
        reading=Reading(),
    )


def restore_commit(state: CAState, command: RestoreCommit) -> Step:
    """Let the state that was brought in take the place of this one."""
    refusal = refuse_duplicate(state, command.request_id)
    if refusal is not None:
        return state, refusal
    restoring = state.restoring
    if restoring is None or restoring.request_id != command.request_id:
        return state, Refused(Reason.NO_SUCH_RESTORE, "its pieces are not here (any more)")
    if (restoring.pieces, restoring.digest) != (command.pieces, command.digest) or restoring.tail:
        return state, Refused(Reason.INVALID, f"{restoring.pieces} pieces are here, and not those that are meant")
    try:
        restored = state_of(restoring.reading)
    except Corrupt as exc:
        return state, Refused(Reason.INVALID, f"the pieces make no state: {exc}")
    if restored.active_root is None:
        return state, Refused(Reason.INVALID, "the state in the pieces holds no CA")
    return _restored(state, restored, command)


def _restored(state: CAState, restored: CAState, command: RestoreCommit) -> Step:
    # Clients compare indexes with those that they have seen in the present past: all that they may wait for, or write
    # with a condition on, gets an index beyond both.
    index = Index(max(state.index, restored.index) + 1)
    epoch = max(state.ca_epoch, state.epoch_given, restored.ca_epoch, restored.epoch_given) + 1
    held = restored.configuration
    active = restored.active_root
    history = restored.history
    if held is not None:
        entry = HistoryEntry(index, command.at, "restore", None if active is None else active.id, held.stored)
        history = (*history, entry)[-HISTORY_MAX:]
    return replace(
        restored,
        founding_id=state.founding_id or restored.cluster_id,
        index=index,
        restored_index=index,
        # No signature that was decided on before is given out after.
        ca_epoch=epoch,
        epoch_given=epoch,
        configuration=None if held is None else Configuration(held.stored, held.create_index, index),
        roots=tuple(_as_now(root, state.root(root.id), index) for root in restored.roots),
        roots_index=index,
        # Neither past's change in progress is one of this: nothing of it was ever visible.
        change=None,
        retiring=_owed(state, restored, command.at + OWED_AFTER),
        history=history,
        requests=with_request(state, command.request_id, RequestRecord(command.at, index, "restored")),
        # Whoever comes first may make the first management token of a past that had none; here it was made.
        acl=replace(
            restored.acl, index=index, bootstrap_index=restored.acl.bootstrap_index or state.acl.bootstrap_index
        ),
        restoring=None,
    ), Applied(index)


def _owed(state: CAState, restored: CAState, not_before: int) -> tuple[Retiring, ...]:
    """What either past owed, and what the present one made at a backend since; but for what signs from here on.

    Names at a backend derive from cluster and epoch: what another cluster made cannot be named after its id is gone.
    """
    owed = {(each.root_id, each.epoch): each for each in restored.retiring}
    if state.cluster_id == restored.cluster_id:
        present = (*state.retiring, *_made(state, not_before))
        owed = {(each.root_id, each.epoch): each for each in present} | owed
    signing = {root.epoch for root in restored.roots if root.active}
    return tuple(each for each in owed.values() if each.epoch not in signing)


def _made(state: CAState, not_before: int) -> Iterator[Retiring]:
    """What stands at a backend: for what signs leaves, and for a change in progress."""
    active, held, change = state.active_root, state.configuration, state.change
    if active is not None and held is not None and active.backend:
        yield Retiring(held.stored, active.id, not_before, active.epoch, active.backend)
    if change is not None:
        yield Retiring(change.configuration, RootID(""), not_before, change.epoch)


def _as_now(root: CARoot, present: CARoot | None, index: Index) -> CARoot:
    """A restored root; leaves that were booked under it since the snapshot keep it as long as they live."""
    if present is None:
        return replace(root, modify_index=index)
    return replace(
        root,
        modify_index=index,
        leaf_not_after_max=max(root.leaf_not_after_max, present.leaf_not_after_max),
        leaf_ttl_max=max(root.leaf_ttl_max, present.leaf_ttl_max),
    )


def restore_abort(state: CAState, command: RestoreAbort) -> Step:
    """Forget what was brought in."""
    restoring = state.restoring
    if restoring is None or restoring.request_id != command.request_id:
        return state, Refused(Reason.NO_SUCH_RESTORE, "there is nothing to forget")
    index = next_index(state)
    return replace(state, index=index, restoring=None), Applied(index)
