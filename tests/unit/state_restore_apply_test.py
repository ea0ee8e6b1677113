"""A restore as the state machine sees it: piece by piece, then everything at once, and never back in index or epoch."""

from __future__ import annotations

from dataclasses import replace

import pytest

from caserver.internode.keyring import Sealed
from caserver.state.apply import apply
from caserver.state.codec import decode_state, encode_command, encode_state
from caserver.state.commands import Command, Reason, Refused, RestoreAbort, RestoreChunk, RestoreCommit
from caserver.state.lifecycle import GiveUpRestore, due, next_due
from caserver.state.model import HOUR, RESTORE_IDLE, CAState, Index
from caserver.state.sealing import erases, keys_in_command, keys_in_state
from tests.testkit.states import (
    CLUSTER_ID,
    NOW,
    ROOT_IDS,
    applied,
    archived,
    bootstrapped,
    check_invariants,
    initialized,
    issue,
    order,
    pieces_of,
    restores,
    rotated,
)


def refused(state: CAState, command: Command) -> Refused:
    after, result = apply(state, command)

    assert after is state
    assert isinstance(result, Refused)
    return result


def present() -> CAState:
    """A state with more behind it than the archived one, and a leaf that outlives what that one knows."""
    state = rotated(initialized(), ROOT_IDS[2])
    state = rotated(state, ROOT_IDS[1], sealed_key=b"another")
    return applied(state, issue(state, order("now", service="web", not_after=NOW + 100 * HOUR)))


def test_the_restored_state_takes_the_place_of_the_present_one():
    before, past = present(), archived()
    after = applied(before, *restores(past))

    check_invariants(after)
    assert [root.id for root in after.roots] == [root.id for root in past.roots]
    assert after.ledger == past.ledger
    assert (after.cluster_id, after.founding_id) == (past.cluster_id, before.founding_id)
    assert after.configuration is not None
    assert past.configuration is not None
    assert after.configuration.stored == past.configuration.stored
    assert after.history[-1].kind == "restore"
    assert after.restoring is None


@pytest.mark.parametrize(
    "before", [CAState(), bootstrapped(), present(), replace(present(), index=Index(9_999), ca_epoch=77)]
)
def test_neither_index_nor_epoch_goes_back(before: CAState):
    past = archived()
    after = applied(before, *restores(past))

    assert after.index > max(before.index, past.index)
    assert after.ca_epoch > max(before.ca_epoch, past.ca_epoch)
    assert after.configuration is not None
    touched = {after.roots_index, after.restored_index, after.configuration.modify_index}
    touched |= {root.modify_index for root in after.roots}
    assert touched == {after.index}


def test_a_restore_into_an_empty_state_founds_it():
    after = applied(CAState(), *restores(archived()))

    assert (after.cluster_id, after.founding_id) == (CLUSTER_ID, CLUSTER_ID)


def test_the_cluster_stays_what_it_was_founded_as():
    past = replace(archived(), cluster_id="another", founding_id="another")
    after = applied(bootstrapped(), *restores(past))

    assert (after.cluster_id, after.founding_id) == ("another", CLUSTER_ID)


def test_leaves_booked_since_keep_their_root():
    after = applied(present(), *restores(archived()))
    root = after.root(ROOT_IDS[1])

    assert root is not None
    assert root.leaf_not_after_max == NOW + 100 * HOUR
    assert root.leaf_ttl_max == 72 * HOUR


def test_no_booking_from_before_takes_effect_after():
    before = present()
    after = applied(before, *restores(archived()))

    assert refused(after, issue(before, order("late"))).reason == Reason.STALE_EPOCH


def test_a_change_under_way_belongs_to_its_past():
    past = archived()
    assert past.configuration is not None
    *begin, _ = _begun(present())
    before = applied(present(), *begin)
    with_change = applied(past, *_begun(past)[:1])
    after = applied(before, *restores(with_change))

    assert before.change is not None
    assert after.change is None


def _begun(state: CAState) -> list[Command]:
    from caserver.state.commands import AbortChange, BeginChange

    assert state.configuration is not None
    stored = state.configuration.stored
    return [
        BeginChange("underway", NOW, state.configuration.modify_index, state.ca_epoch, stored),
        AbortChange("underway", NOW, "never sent"),
    ]


def at_a_backend(state: CAState) -> CAState:
    """The state with something at a backend for each root, made under its epoch."""
    marked = (replace(root, backend=(("issuer", f"of {root.epoch}"),)) for root in state.roots)
    return replace(state, roots=tuple(marked))


def owed(state: CAState) -> set[tuple[str, int]]:
    return {(each.root_id, each.epoch) for each in state.retiring}


def test_what_was_made_at_a_backend_since_is_owed():
    past = at_a_backend(initialized())
    now = at_a_backend(rotated(past, ROOT_IDS[2], retire_not_before=NOW + 10))
    first, latest = past.active_root, now.active_root
    assert first is not None
    assert latest is not None
    assert owed(now) == {(first.id, first.epoch)}
    *begin, _ = _begun(now)
    during = applied(now, *begin)
    assert during.change is not None
    after = applied(during, *restores(past))

    check_invariants(after)
    # The first signs again: it is not owed any more. What may still be asked of the backend gets its time.
    assert owed(after) == {(latest.id, latest.epoch), ("", during.change.epoch)}
    assert {each.backend for each in after.retiring} == {latest.backend, ()}
    assert {each.not_before for each in after.retiring} == {NOW + 60}


def test_what_the_snapshot_owed_is_owed_still_and_what_both_owe_once():
    past = at_a_backend(rotated(at_a_backend(initialized()), ROOT_IDS[1], retire_not_before=NOW + 10))
    after = applied(past, *restores(past))

    assert owed(past)
    assert after.retiring == past.retiring


def test_what_another_cluster_made_is_not_owed():
    present = at_a_backend(initialized())
    past = replace(archived(), cluster_id="another", founding_id="another")

    assert applied(present, *restores(past)).retiring == past.retiring


def test_nothing_is_visible_before_the_commit():
    before = present()
    *chunks, _ = restores(archived())
    during = applied(before, *chunks)

    assert replace(during, restoring=None, index=before.index) == before


def test_what_was_brought_in_survives_a_snapshot_at_every_piece():
    state = present()
    for command in restores(archived()):
        state = applied(decode_state(b"".join(encode_state(state))), command)

    assert state == applied(present(), *restores(archived()))


def test_a_piece_that_comes_twice_is_taken_once():
    first, second, *rest = restores(archived())
    state = applied(present(), first, second)

    assert refused(state, first).reason == Reason.DUPLICATE_REQUEST
    assert refused(state, second).reason == Reason.DUPLICATE_REQUEST
    assert applied(state, *rest).restored_index


def test_a_missing_piece_is_noticed():
    first, _, third, *_, commit = restores(archived())
    state = applied(present(), first)

    assert refused(present(), third).reason == Reason.NO_SUCH_RESTORE
    assert refused(present(), commit).reason == Reason.NO_SUCH_RESTORE
    assert refused(state, third).reason == Reason.INVALID
    assert refused(state, commit).reason == Reason.INVALID


@pytest.mark.parametrize("piece", ["{}\n", "é\n", '["caserver-state",99,1]\n', '["caserver-state",1,1]\n{}\n[1]\n'])
def test_what_is_no_state_is_refused(piece: str):
    assert refused(present(), RestoreChunk("r", NOW, 0, piece, ())).reason == Reason.INVALID


def test_only_the_whole_of_what_is_meant_is_committed():
    *chunks, commit = restores(archived())
    state = applied(present(), *chunks)
    assert isinstance(commit, RestoreCommit)

    assert refused(state, replace(commit, digest="00")).reason == Reason.INVALID
    assert refused(state, replace(commit, pieces=commit.pieces - 1)).reason == Reason.INVALID
    assert refused(state, replace(commit, request_id="other")).reason == Reason.NO_SUCH_RESTORE


@pytest.mark.parametrize("past", [CAState(), bootstrapped()])
def test_a_past_without_a_ca_is_refused(past: CAState):
    *chunks, commit = restores(past)

    assert refused(applied(present(), *chunks), commit).reason == Reason.INVALID


def test_a_repeated_commit_finds_the_first():
    commands = restores(archived())
    state = applied(present(), *commands)
    again = refused(state, commands[-1])

    assert again.reason == Reason.DUPLICATE_REQUEST
    assert again.record is not None
    assert (again.record.result, again.record.index) == ("restored", state.index)
    assert refused(state, commands[0]).reason == Reason.DUPLICATE_REQUEST


def test_one_restore_at_a_time_until_it_is_idle():
    first, *_ = restores(archived(), request_id="first")
    second = restores(archived(), request_id="second", at=NOW + RESTORE_IDLE - 1)
    late = restores(archived(), request_id="second", at=NOW + RESTORE_IDLE)
    state = applied(present(), first)

    assert refused(state, second[0]).reason == Reason.RESTORE_IN_PROGRESS
    assert applied(state, *late).restoring is None
    ahead = restores(archived(), request_id="second", at=NOW - RESTORE_IDLE)  # by a clock that is right again
    assert applied(state, *ahead).restoring is None
    assert due(state, NOW - RESTORE_IDLE) == GiveUpRestore("first")
    assert next_due(state, NOW - RESTORE_IDLE) == 0


def test_an_interrupted_restore_is_given_up_and_leaves_nothing():
    before = present()
    first, second, *_ = restores(archived(), request_id="first")
    state = applied(before, first, second)

    assert due(state, NOW + RESTORE_IDLE - 1) != GiveUpRestore("first")
    assert next_due(state, NOW + RESTORE_IDLE - 1) == 1
    assert due(state, NOW + RESTORE_IDLE) == GiveUpRestore("first")
    after = applied(state, RestoreAbort("first", NOW))
    assert replace(after, index=before.index) == before
    assert refused(after, RestoreAbort("first", NOW)).reason == Reason.NO_SUCH_RESTORE
    assert refused(state, RestoreAbort("second", NOW)).reason == Reason.NO_SUCH_RESTORE


def test_keys_of_what_is_brought_in_count_and_its_pieces_leave_the_log():
    first, *rest = restores(archived())
    state = applied(present(), first)

    assert keys_in_command(encode_command(first)) == {"aa"}
    assert "aa" in keys_in_state(state)
    assert erases(state, applied(state, RestoreAbort("restore", NOW)))
    assert erases(applied(state, *rest[:-1]), applied(state, *rest))
    assert not erases(present(), state)


def test_a_piece_shows_nothing_of_itself():
    assert "canary" not in repr(RestoreChunk("r", NOW, 0, "canary", ()))


def test_sealed_values_come_back_as_they_were():
    past = archived()
    after = applied(present(), *restores(past))

    assert after.root(ROOT_IDS[1]) is not None
    assert [root.sealed_key for root in after.roots] == [Sealed(b"sealed-root-key")] * 2
    assert after.sealed_hmac_key == past.sealed_hmac_key


def test_pieces_are_what_the_codec_wrote():
    assert "".join(pieces_of(archived())).encode() == b"".join(encode_state(archived()))


@pytest.mark.parametrize(("then", "kept"), [(0, 7), (4, 4)])
def test_a_past_before_the_first_management_token_does_not_let_strangers_make_one(then: int, kept: int):
    before, past = present(), archived()
    before = replace(before, acl=replace(before.acl, bootstrap_index=7))
    past = replace(past, acl=replace(past.acl, index=then, bootstrap_index=then))

    assert applied(before, *restores(past)).acl.bootstrap_index == kept
