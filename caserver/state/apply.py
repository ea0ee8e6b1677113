"""``apply``: one function per command, from a state to the next one and what there is to say about it.

Pure, deterministic and total: no clock, no randomness, no exception for any command that the codec can read. A refusal
returns the very state it was given. Whatever is applied moves ``index`` by exactly one, but for a restore, which moves it
beyond every index of either past.
"""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from immutables import Map

from caserver.state.acl_apply import apply_acl, without_expired
from caserver.state.acl_commands import (
    ACLBootstrap,
    ACLInitialize,
    DeletePolicy,
    DeleteToken,
    SetPolicy,
    SetToken,
)
from caserver.state.commands import (
    AbortChange,
    ActivateRoot,
    Applied,
    BeginChange,
    Bootstrap,
    Command,
    ExpireLeaves,
    IssueLeaves,
    LeafOrder,
    NewRoot,
    ProviderRetired,
    PruneRoots,
    Reason,
    RecordSerials,
    Refused,
    Reseal,
    RestoreAbort,
    RestoreChunk,
    RestoreCommit,
    Result,
    SetConfiguration,
    SetIntermediate,
)
from caserver.state.ledger import book, expired, with_serials, without, without_roots
from caserver.state.lifecycle import hour_is_over, kept_until, may_prune
from caserver.state.model import (
    HISTORY_MAX,
    CARoot,
    CAState,
    Change,
    Configuration,
    HistoryEntry,
    Index,
    RequestRecord,
    Retiring,
    RootID,
    StoredConfiguration,
)
from caserver.state.repeats import next_index as _next_index
from caserver.state.repeats import recent as _recent
from caserver.state.repeats import refuse_duplicate as _refuse_duplicate
from caserver.state.repeats import with_request as _with_request
from caserver.state.restore_apply import apply_restore
from caserver.state.sealing import sealed_values, with_sealed_values, without_secrets_of

Step = tuple[CAState, Result]


def apply(state: CAState, command: Command) -> Step:
    """The state after ``command`` and its result; the same state if it is refused."""
    match command:
        case IssueLeaves():
            return issue_leaves(state, command)
        case RecordSerials():
            return record_serials(state, command)
        case ExpireLeaves():
            return expire_leaves(state, command)
        case PruneRoots():
            return prune_roots(state, command)
        case ProviderRetired():
            return provider_retired(state, command)
        case ACLInitialize() | ACLBootstrap() | SetToken() | DeleteToken() | SetPolicy() | DeletePolicy():
            return apply_acl(state, command)
        case RestoreChunk() | RestoreCommit() | RestoreAbort():
            return apply_restore(state, command)
        case _:
            return _apply_change(state, command)


def _apply_change(
    state: CAState,
    command: Bootstrap | BeginChange | ActivateRoot | SetConfiguration | SetIntermediate | AbortChange | Reseal,
) -> Step:
    match command:
        case Bootstrap():
            return bootstrap(state, command)
        case BeginChange():
            return begin_change(state, command)
        case ActivateRoot():
            return activate_root(state, command)
        case SetConfiguration():
            return set_configuration(state, command)
        case SetIntermediate():
            return set_intermediate(state, command)
        case AbortChange():
            return abort_change(state, command)
        case Reseal():
            return reseal(state, command)
        case _:
            assert_never(command)


def bootstrap(state: CAState, command: Bootstrap) -> Step:
    """Give the cluster its id and first configuration, once."""
    if state.cluster_id is not None:
        return state, Refused(Reason.ALREADY_BOOTSTRAPPED, f"the cluster id is {state.cluster_id}")
    if not command.cluster_id:
        return state, Refused(Reason.INVALID, "the cluster id is empty")
    index = _next_index(state)
    return replace(
        state,
        index=index,
        cluster_id=command.cluster_id,
        founding_id=state.founding_id or command.cluster_id,
        sealed_hmac_key=command.sealed_hmac_key,
        configuration=Configuration(command.configuration, create_index=index, modify_index=index),
        roots_index=index,
        history=_with_history(state, HistoryEntry(index, command.at, "bootstrap", None, command.configuration)),
    ), Applied(index)


def begin_change(state: CAState, command: BeginChange) -> Step:
    """Announce a provider change; from here on it is completed or aborted, by whoever leads."""
    refusal = _refuse_write(state, command.request_id, command.expect_index, command.expect_epoch)
    if refusal is not None:
        return state, refusal
    if command.renew and state.active_root is None:
        return state, Refused(Reason.NO_SUCH_ROOT, "no root is active")
    index = _next_index(state)
    epoch = max(state.ca_epoch, state.epoch_given) + 1
    change = Change(
        request_id=command.request_id,
        begun_at=command.at,
        configuration=command.configuration,
        epoch=epoch,
        begun_index=index,
        force=command.force,
        renew=command.renew,
    )
    return replace(state, index=index, change=change, epoch_given=epoch), Applied(index)


def activate_root(state: CAState, command: ActivateRoot) -> Step:
    """Complete the change: the one step in which everything of a rotation becomes visible."""
    change, configuration = state.change, state.configuration
    refusal = _refuse_duplicate(state, command.request_id) or _refuse_completion(state, command)
    if refusal is not None or change is None or configuration is None:
        return state, refusal or Refused(Reason.NO_SUCH_CHANGE)
    index = _next_index(state)
    kind = "bootstrap" if state.active_root is None else "rotate"
    entry = HistoryEntry(index, command.at, kind, command.root.id, change.configuration)
    return replace(
        state,
        index=index,
        ca_epoch=change.epoch,
        configuration=_succeeded(configuration, change.configuration, index),
        roots=_with_active(state, command, change, index),
        roots_index=index,
        change=None,
        retiring=_with_retiring(state, command),
        history=_with_history(state, entry),
        requests=_with_request(state, command.request_id, RequestRecord(command.at, index, "activated")),
    ), Applied(index)


def set_configuration(state: CAState, command: SetConfiguration) -> Step:
    """Store a configuration; roots stay as they are."""
    refusal = _refuse_write(state, command.request_id, command.expect_index, command.expect_epoch)
    if refusal is not None or state.configuration is None:
        return state, refusal or Refused(Reason.NOT_BOOTSTRAPPED)
    index = _next_index(state)
    active = state.active_root
    active_id = None if active is None else active.id
    longest = command.configuration.effective.leaf_ttl
    return replace(
        state,
        index=index,
        configuration=Configuration(command.configuration, state.configuration.create_index, index),
        roots=tuple(
            replace(root, leaf_ttl_max=max(root.leaf_ttl_max, longest)) if root.active else root for root in state.roots
        ),
        roots_index=index,
        history=_with_history(state, HistoryEntry(index, command.at, "configure", active_id, command.configuration)),
        requests=_with_request(state, command.request_id, RequestRecord(command.at, index, "configured")),
    ), Applied(index)


def set_intermediate(state: CAState, command: SetIntermediate) -> Step:
    """Give the active root a new chain and signing certificate; signing under the former one is fenced off."""
    change, configuration = state.change, state.configuration
    refusal = _refuse_duplicate(state, command.request_id) or _refuse_renewal(state, command)
    root = state.root(command.root_id)
    if refusal is not None or change is None or configuration is None or root is None:
        return state, refusal or Refused(Reason.NO_SUCH_CHANGE)
    index = _next_index(state)
    succeeded = _succeeded(configuration, change.configuration, index)
    renewed = replace(
        root,
        intermediates=command.intermediates,
        signing_key_id=command.signing_key_id,
        backend=command.backend,
        epoch=change.epoch,
        leaf_ttl_max=max(root.leaf_ttl_max, change.configuration.effective.leaf_ttl),
        modify_index=index,
    )
    former = Retiring(configuration.stored, root.id, command.retire_not_before, root.epoch, root.backend)
    history = state.history
    if succeeded is not configuration:
        history = _with_history(state, HistoryEntry(index, command.at, "configure", root.id, change.configuration))
    return replace(
        state,
        index=index,
        ca_epoch=change.epoch,
        configuration=succeeded,
        roots=_with_root(state.roots, renewed),
        roots_index=index,
        change=None,
        retiring=(*state.retiring, former),
        history=history,
        requests=_with_request(state, command.request_id, RequestRecord(command.at, index, "renewed")),
    ), Applied(index)


def abort_change(state: CAState, command: AbortChange) -> Step:
    """Give up the change in progress and remember why; what it may have left at a backend is to be cleaned up."""
    change = state.change
    refusal = _refuse_duplicate(state, command.request_id) or _refuse_other_change(state, command.request_id)
    if refusal is not None or change is None:
        return state, refusal or Refused(Reason.NO_SUCH_CHANGE)
    index = _next_index(state)
    record = RequestRecord(command.at, index, f"{f'aborted {command.kind}'.rstrip()}: {command.reason}")
    owed = state.retiring
    if command.retire_not_before is not None:
        owed = (*owed, Retiring(change.configuration, RootID(""), command.retire_not_before, change.epoch))
    requests = _with_request(state, command.request_id, record)
    return replace(state, index=index, change=None, retiring=owed, requests=requests), Applied(index)


def provider_retired(state: CAState, command: ProviderRetired) -> Step:
    """Strike the clean-up owed for a root and an epoch, and with it the retired provider's secrets."""
    if command.request_id and (refusal := _refuse_duplicate(state, command.request_id)) is not None:
        return state, refusal
    done = (command.root_id, command.epoch)
    left = tuple(each for each in state.retiring if (each.root_id, each.epoch) != done)
    if len(left) == len(state.retiring):
        owed = f"no clean-up is owed for {command.root_id or 'a change'} of epoch {command.epoch}"
        return state, Refused(Reason.NO_SUCH_ROOT, owed)
    index = _next_index(state)
    requests = state.requests
    if command.request_id:
        requests = _with_request(state, command.request_id, RequestRecord(command.at, index, "forgotten"))
    return replace(state, index=index, retiring=left, requests=requests), Applied(index)


def prune_roots(state: CAState, command: PruneRoots) -> Step:
    """Drop roots that nothing needs, their keys, and the secrets of their configurations in the history."""
    refusal = _refuse_busy(state, command.expect_epoch) or _refuse_prune(state, command)
    if refusal is not None:
        return state, refusal
    index = _next_index(state)
    gone = frozenset(command.root_ids)
    return replace(
        state,
        index=index,
        # Consul writes the list of roots anew, so each one left gets the new index.
        roots=tuple(replace(root, modify_index=index) for root in state.roots if root.id not in gone),
        roots_index=index,
        ledger=without_roots(state.ledger, [root for root in state.roots if root.id in gone]),
        history=without_secrets_of(state.history, gone),
    ), Applied(index)


def issue_leaves(state: CAState, command: IssueLeaves) -> Step:
    """Book a batch of leaves under the active root, all or none."""
    active = state.active_root
    if active is None:
        return state, Refused(Reason.NO_SUCH_ROOT, "no root is active")
    if command.ca_epoch != state.ca_epoch:
        return state, _stale_epoch(state, command.ca_epoch)
    if command.root_id != active.id:
        return state, Refused(Reason.ROOT_NOT_ACTIVE, f"{command.root_id} does not sign, {active.id} does")
    if not command.orders or not all(_is_sound(order, active) for order in command.orders):
        return state, Refused(Reason.INVALID, "an order names no service or outlives its root")
    index = _next_index(state)
    ledger, booked = book(state.ledger, command.orders, active.id, index)
    live = active.live_by_hour.mutate()
    for hour, _, _ in booked:
        live[hour] = live.get(hour, 0) + 1
    latest = max(order.not_after for order in command.orders)
    root = replace(active, live_by_hour=live.finish(), leaf_not_after_max=max(active.leaf_not_after_max, latest))
    return replace(state, index=index, ledger=ledger, roots=_with_root(state.roots, root)), Applied(index, booked)


def record_serials(state: CAState, command: RecordSerials) -> Step:
    """Bind serials to booked leaves; rows that are gone or have a serial are passed over."""
    if not command.serials or any(serial <= 0 for _, _, serial in command.serials):
        return state, Refused(Reason.INVALID, "a serial is missing or not positive")
    if command.restored_index != state.restored_index:
        return state, Refused(
            Reason.STALE_INDEX, f"the leaves were booked before the restore at {state.restored_index}"
        )
    index = _next_index(state)
    return replace(state, index=index, ledger=with_serials(state.ledger, command.serials)), Applied(index)


def expire_leaves(state: CAState, command: ExpireLeaves) -> Step:
    """Forget hours of the ledger that are over, services without a live leaf, expired tokens, request ids of long ago."""
    index = _next_index(state)
    return replace(
        state,
        index=index,
        ledger=expired(state.ledger, command.at),
        roots=tuple(_without_hours(root, command.at) for root in state.roots),
        requests=_recent(state.requests, command.at),
        acl=without_expired(state.acl, command.at),
    ), Applied(index)


def reseal(state: CAState, command: Reseal) -> Step:
    """Replace sealed values by name; ``expect_index`` is the state's ``roots_index``."""
    if command.expect_index != state.roots_index:
        return state, Refused(Reason.STALE_INDEX, f"roots or configuration changed at {state.roots_index}")
    held = sealed_values(state)
    missing = sorted({where for where, _ in command.values} - held.keys())
    if missing or not command.values:
        return state, Refused(Reason.STALE_INDEX, f"nothing is sealed at {', '.join(missing) or 'the places named'}")
    index = _next_index(state)
    return replace(with_sealed_values(state, dict(command.values)), index=index), Applied(index)


# Refusals -------------------------------------------------------------------------------------------------------------


def _refuse_busy(state: CAState, expect_epoch: int) -> Refused | None:
    if state.change is not None:
        return Refused(Reason.CHANGE_IN_PROGRESS, f"request {state.change.request_id} is in progress")
    return None if expect_epoch == state.ca_epoch else _stale_epoch(state, expect_epoch)


def _refuse_write(state: CAState, request_id: str, expect_index: Index, expect_epoch: int) -> Refused | None:
    """What stands against a write of the configuration."""
    if state.configuration is None:
        return Refused(Reason.NOT_BOOTSTRAPPED)
    refusal = _refuse_duplicate(state, request_id) or _refuse_busy(state, expect_epoch)
    if refusal is not None:
        return refusal
    if expect_index != state.configuration.modify_index:
        detail = f"decided on {expect_index}, the configuration is at {state.configuration.modify_index}"
        return Refused(Reason.STALE_INDEX, detail)
    return None


def _refuse_other_change(state: CAState, request_id: str) -> Refused | None:
    if state.change is None:
        return Refused(Reason.NO_SUCH_CHANGE, "no change is in progress")
    if state.change.request_id != request_id:
        return Refused(Reason.NO_SUCH_CHANGE, f"request {state.change.request_id} is in progress")
    return None


def _refuse_completion(state: CAState, command: ActivateRoot) -> Refused | None:
    refusal = _refuse_announced(state, command.request_id, command.expect_epoch, renew=False)
    if refusal is not None:
        return refusal
    root = command.root
    if not (root.id and root.pem and root.not_before < root.not_after):
        return Refused(Reason.INVALID, "the new root lacks its id, its certificate or a lifetime")
    return None


def _refuse_renewal(state: CAState, command: SetIntermediate) -> Refused | None:
    refusal = _refuse_announced(state, command.request_id, command.expect_epoch, renew=True)
    if refusal is not None:
        return refusal
    root = state.root(command.root_id)
    if root is None:
        return Refused(Reason.NO_SUCH_ROOT, f"{command.root_id} is not listed")
    return None if root.active else Refused(Reason.ROOT_NOT_ACTIVE, f"{command.root_id} was rotated out")


def _refuse_announced(state: CAState, request_id: str, expect_epoch: int, *, renew: bool) -> Refused | None:
    """What stands against completing the change of ``request_id``, as a renewal or as a rotation."""
    refusal = _refuse_other_change(state, request_id)
    if refusal is not None:
        return refusal
    if state.change is not None and state.change.renew != renew:
        return Refused(Reason.NO_SUCH_CHANGE, f"request {request_id} is a {'rotation' if renew else 'renewal'}")
    return None if expect_epoch == state.ca_epoch else _stale_epoch(state, expect_epoch)


def _refuse_prune(state: CAState, command: PruneRoots) -> Refused | None:
    if not command.root_ids:
        return Refused(Reason.INVALID, "no root is named")
    for root_id in command.root_ids:
        root = state.root(root_id)
        if root is None:
            return Refused(Reason.NO_SUCH_ROOT, f"{root_id} is not listed")
        if not may_prune(root, command.at):
            return Refused(Reason.ROOT_STILL_NEEDED, f"{root_id} is needed {_needed_until(root)}")
    return None


def _needed_until(root: CARoot) -> str:
    last = kept_until(root)
    return "as long as it is active" if last is None else f"until {last} (epoch seconds)"


def _stale_epoch(state: CAState, decided_on: int) -> Refused:
    return Refused(Reason.STALE_EPOCH, f"decided on epoch {decided_on}, the CA is at {state.ca_epoch}")


def _is_sound(order: LeafOrder, root: CARoot) -> bool:
    return bool(
        order.issue_id
        and order.service
        and order.not_before < order.not_after <= root.not_after
        and (order.serial is None or order.serial > 0)
    )


# Parts of the next state ----------------------------------------------------------------------------------------------


def _succeeded(current: Configuration, stored: StoredConfiguration, index: Index) -> Configuration:
    """The configuration in force after a change; one that is the same word for word keeps its index."""
    return current if stored == current.stored else Configuration(stored, current.create_index, index)


def _with_history(state: CAState, entry: HistoryEntry) -> tuple[HistoryEntry, ...]:
    return (*state.history, entry)[-HISTORY_MAX:]


def _with_root(roots: tuple[CARoot, ...], changed: CARoot) -> tuple[CARoot, ...]:
    return tuple(changed if root.id == changed.id else root for root in roots)


def _with_active(state: CAState, command: ActivateRoot, change: Change, index: Index) -> tuple[CARoot, ...]:
    """All roots after a rotation, sorted by id, each with the new index (Consul writes the list as a whole)."""
    known = state.root(command.root.id)
    others = [
        replace(
            root,
            active=False,
            rotated_out_at=command.at if root.active else root.rotated_out_at,
            modify_index=index,
        )
        for root in state.roots
        if root.id != command.root.id
    ]
    return tuple(sorted([*others, _activated(command.root, known, change, index)], key=lambda root: root.id))


def _activated(new: NewRoot, known: CARoot | None, change: Change, index: Index) -> CARoot:
    """The new active root; one that was listed before keeps what is known of its leaves, its key and its create index."""
    leaf_ttl = change.configuration.effective.leaf_ttl
    return CARoot(
        id=new.id,
        name=new.name,
        pem=new.pem,
        serial=new.serial,
        not_before=new.not_before,
        not_after=new.not_after,
        key_type=new.key_type,
        key_bits=new.key_bits,
        signing_key_id=new.signing_key_id,
        provider=new.provider,
        intermediates=new.intermediates,
        sealed_key=new.sealed_key if new.sealed_key is not None or known is None else known.sealed_key,
        active=True,
        rotated_out_at=None,
        leaf_not_after_max=0 if known is None else known.leaf_not_after_max,
        leaf_ttl_max=leaf_ttl if known is None else max(leaf_ttl, known.leaf_ttl_max),
        live_by_hour=Map() if known is None else known.live_by_hour,
        create_index=index if known is None else known.create_index,
        modify_index=index,
        backend=new.backend,
        epoch=change.epoch,
    )


def _with_retiring(state: CAState, command: ActivateRoot) -> tuple[Retiring, ...]:
    """Clean-up owed after a rotation, of what the former epoch made; a root may go and come back and owe it twice."""
    previous = state.active_root
    if command.retire_not_before is None or previous is None or state.configuration is None:
        return state.retiring
    former = Retiring(
        state.configuration.stored, previous.id, command.retire_not_before, previous.epoch, previous.backend
    )
    return (*state.retiring, former)


def _without_hours(root: CARoot, now: int) -> CARoot:
    over = [hour for hour in root.live_by_hour if hour_is_over(hour, now)]
    return replace(root, live_by_hour=without(root.live_by_hour, over)) if over else root
