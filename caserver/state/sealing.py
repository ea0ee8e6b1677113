"""Where sealed values sit in the state, by stable names: for changing the sealing key and for erasing secrets.

Names: ``hmac``; ``configuration/<modify index>/<key>``; ``root/<id>``; ``change/<request id>/<key>``;
``retiring/<root id>/<epoch>/<key>``; ``history/<index>/<key>``. A name never means another secret later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import assert_never

from caserver.internode.keyring import Sealed, sealed_key_id
from caserver.state.acl_commands import (
    ACLBootstrap,
    ACLInitialize,
    DeletePolicy,
    DeleteToken,
    SetPolicy,
    SetToken,
)
from caserver.state.codec import decode_command
from caserver.state.commands import (
    AbortChange,
    ActivateRoot,
    BeginChange,
    Bootstrap,
    Command,
    ExpireLeaves,
    IssueLeaves,
    ProviderRetired,
    PruneRoots,
    RecordSerials,
    Reseal,
    RestoreAbort,
    RestoreChunk,
    RestoreCommit,
    SetConfiguration,
    SetIntermediate,
)
from caserver.state.model import CAState, Change, Configuration, HistoryEntry, Retiring, RootID, StoredConfiguration

Holder = Configuration | Change | Retiring | HistoryEntry
_FREQUENT = (b'["issue_leaves"', b'["record_serials"', b'["expire_leaves"')  # most of any log; they seal nothing


def sealed_values(state: CAState) -> dict[str, Sealed]:
    """Every sealed value of the state by its name."""
    holders: list[Holder] = [*state.retiring, *state.history]
    holders += [each for each in (state.configuration, state.change) if each is not None]
    found = {f"{_place(holder)}/{key}": value for holder in holders for key, value in _stored(holder).secrets}
    found |= {f"root/{root.id}": root.sealed_key for root in state.roots if root.sealed_key is not None}
    if state.sealed_hmac_key is not None:
        found["hmac"] = state.sealed_hmac_key
    return found


def with_sealed_values(state: CAState, values: Mapping[str, Sealed]) -> CAState:
    """The state with the named values replaced; names that are not there are passed over."""

    def renewed(holder: Holder) -> StoredConfiguration:
        stored, place = _stored(holder), _place(holder)
        return replace(stored, secrets=tuple((key, values.get(f"{place}/{key}", old)) for key, old in stored.secrets))

    configuration, change = state.configuration, state.change
    return replace(
        state,
        sealed_hmac_key=None if state.sealed_hmac_key is None else values.get("hmac", state.sealed_hmac_key),
        configuration=None if configuration is None else replace(configuration, stored=renewed(configuration)),
        change=None if change is None else replace(change, configuration=renewed(change)),
        retiring=tuple(replace(each, configuration=renewed(each)) for each in state.retiring),
        history=tuple(replace(each, configuration=renewed(each)) for each in state.history),
        roots=tuple(
            root
            if root.sealed_key is None
            else replace(root, sealed_key=values.get(f"root/{root.id}", root.sealed_key))
            for root in state.roots
        ),
    )


def erases(before: CAState, after: CAState) -> bool:
    """Whether a sealed value of ``before`` is nowhere in ``after``; quick for what happens often, which touches none."""
    if before.restoring is not None and after.restoring is None:
        return True  # the log holds the pieces of another state, and after a commit it holds what that one replaced
    if _holders(before) == _holders(after):
        return False
    return not set(sealed_values(before).values()) <= set(sealed_values(after).values())


def _holders(state: CAState) -> tuple[int, ...]:
    """What holds sealed values in the state, by identity."""
    parts = (state.configuration, state.change, state.retiring, state.history, state.sealed_hmac_key)
    return tuple(map(id, (*parts, *(root.sealed_key for root in state.roots))))


def keys_in_state(state: CAState) -> frozenset[str]:
    """Ids of the keys that sealed something in the state."""
    received = () if state.restoring is None else state.restoring.key_ids
    return frozenset((*received, *(sealed_key_id(value) for value in sealed_values(state).values())))


def keys_in_command(command: bytes) -> frozenset[str]:
    """Ids of the keys that sealed something in an encoded command; Corrupt for bytes that this build cannot read."""
    if command.startswith(_FREQUENT):
        return frozenset()
    decoded = decode_command(command)
    if isinstance(decoded, RestoreChunk):  # cut anywhere, so that it cannot be looked into
        return frozenset(decoded.key_ids)
    return frozenset(sealed_key_id(value) for value in _carried(decoded))


def _carried(command: Command) -> tuple[Sealed, ...]:
    """The sealed values that ride in a command."""
    match command:
        case Bootstrap():
            return (command.sealed_hmac_key, *(value for _, value in command.configuration.secrets))
        case BeginChange() | SetConfiguration():
            return tuple(value for _, value in command.configuration.secrets)
        case ActivateRoot(root=root):
            return () if root.sealed_key is None else (root.sealed_key,)
        case Reseal(values=values):
            return tuple(value for _, value in values)
        case SetIntermediate() | AbortChange() | ProviderRetired() | PruneRoots():
            return ()
        case IssueLeaves() | RecordSerials() | ExpireLeaves():
            return ()
        case ACLInitialize() | ACLBootstrap() | SetToken() | DeleteToken() | SetPolicy() | DeletePolicy():
            return ()  # hashes, not secrets
        case RestoreChunk() | RestoreCommit() | RestoreAbort():
            return ()
        case _:
            assert_never(command)


def without_secrets_of(history: tuple[HistoryEntry, ...], pruned: frozenset[RootID]) -> tuple[HistoryEntry, ...]:
    """The history without the secrets of configurations that stood for a pruned root, or for none that was active yet."""
    return tuple(
        replace(entry, configuration=replace(entry.configuration, secrets=()))
        if entry.active_root_id is None or entry.active_root_id in pruned
        else entry
        for entry in history
    )


def _stored(holder: Holder) -> StoredConfiguration:
    return holder.stored if isinstance(holder, Configuration) else holder.configuration


def _place(holder: Holder) -> str:
    match holder:
        case Configuration():
            return f"configuration/{holder.modify_index}"
        case Change():
            return f"change/{holder.request_id}"
        case Retiring():
            return f"retiring/{holder.root_id}/{holder.epoch}"
        case HistoryEntry():
            return f"history/{holder.index}"
        case _:
            assert_never(holder)
