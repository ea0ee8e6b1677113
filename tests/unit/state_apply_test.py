"""What each command does and when it is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from caserver.internode.keyring import Sealed
from caserver.state.apply import apply
from caserver.state.codec import encode_state
from caserver.state.commands import (
    AbortChange,
    ActivateRoot,
    Applied,
    BeginChange,
    Bootstrap,
    Command,
    ExpireLeaves,
    LeafOrder,
    ProviderRetired,
    PruneRoots,
    Reason,
    RecordSerials,
    Refused,
    Reseal,
    SetConfiguration,
    SetIntermediate,
)
from caserver.state.model import (
    HISTORY_MAX,
    HOUR,
    REQUEST_IDS_KEPT,
    REQUEST_IDS_MIN,
    CAState,
    Index,
    RequestRecord,
    RootID,
)
from caserver.state.sealing import sealed_values
from tests.testkit.states import (
    CLUSTER_ID,
    DAY,
    HMAC_KEY,
    NOW,
    ROOT_IDS,
    YEARS,
    applied,
    bootstrapped,
    initialized,
    issue,
    new_root,
    order,
    restores,
    rotated,
    stored,
)

OLD, NEW, THIRD = map(RootID, ROOT_IDS)


def refused(state: CAState, command: Command) -> Refused:
    after, result = apply(state, command)

    assert after is state
    assert isinstance(result, Refused)
    return result


def begin(state: CAState, request_id: str = "r1", **changes: Any) -> BeginChange:
    assert state.configuration is not None
    command = BeginChange(request_id, NOW, state.configuration.modify_index, state.ca_epoch, stored())
    return replace(command, **changes)


def renewing(state: CAState, **changes: Any) -> CAState:
    """The state with a renewal of the active root's signing certificate announced."""
    assert state.configuration is not None
    return applied(state, begin(state, "r1", **{"configuration": state.configuration.stored, "renew": True, **changes}))


def renewal(state: CAState, backend: tuple[tuple[str, str], ...] = ()) -> SetIntermediate:
    assert state.active_root is not None
    return SetIntermediate("r1", NOW, state.ca_epoch, state.active_root.id, ("PEM",), "cc:dd", NOW + 10, backend)


def configure(state: CAState, request_id: str = "r1", **changes: Any) -> SetConfiguration:
    assert state.configuration is not None
    command = SetConfiguration(
        request_id, NOW, state.configuration.modify_index, state.ca_epoch, stored(given='{"a":1}')
    )
    return replace(command, **changes)


def secrets_in(state: CAState) -> set[bytes]:
    return {bytes(value) for value in sealed_values(state).values()}


class TestBootstrap:
    def test_fixes_cluster_id_and_configuration(self):
        state = bootstrapped()

        assert (state.trust_domain, state.index, state.roots_index) == (f"{CLUSTER_ID}.consul", 1, 1)
        assert state.configuration is not None
        assert (state.configuration.create_index, state.configuration.modify_index) == (1, 1)
        assert [entry.kind for entry in state.history] == ["bootstrap"]

    def test_happens_once(self):
        result = refused(bootstrapped(), Bootstrap(NOW, "another", stored(), HMAC_KEY))

        assert (result.reason, result.detail) == (Reason.ALREADY_BOOTSTRAPPED, f"the cluster id is {CLUSTER_ID}")

    def test_needs_a_cluster_id(self):
        assert refused(CAState(), Bootstrap(NOW, "", stored(), HMAC_KEY)).reason == Reason.INVALID


class TestChange:
    def test_is_remembered_until_it_is_activated(self):
        state = initialized()
        begun = applied(state, begin(state, "r1"))

        assert begun.change is not None
        assert (begun.change.request_id, begun.change.epoch) == ("r1", state.ca_epoch + 1)
        assert begun.roots == state.roots
        assert begun.configuration == state.configuration
        assert rotated(state, NEW).change is None

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"expect_index": Index(99)}, Reason.STALE_INDEX),
            ({"expect_epoch": 99}, Reason.STALE_EPOCH),
            ({"request_id": ""}, Reason.INVALID),
        ],
    )
    def test_decided_on_something_else_is_refused(self, changes: dict[str, Any], reason: Reason):
        state = initialized()

        assert refused(state, begin(state, **changes)).reason == reason

    def test_before_bootstrap_is_refused(self):
        command = BeginChange("r1", NOW, Index(0), 0, stored())

        assert refused(CAState(), command).reason == Reason.NOT_BOOTSTRAPPED

    def test_keeps_every_other_change_out(self):
        state = initialized()
        busy = applied(state, begin(state, "r1"))
        root = OLD
        later = NOW + 30 * DAY

        reasons = {
            refused(busy, begin(busy, "r2")).reason,
            refused(busy, begin(busy, "r1")).reason,
            refused(busy, configure(busy, "r3")).reason,
            refused(busy, PruneRoots(later, busy.ca_epoch, (root,))).reason,
        }

        assert reasons == {Reason.CHANGE_IN_PROGRESS}

    def test_does_not_stop_leaves(self):
        state = initialized()
        busy = applied(state, begin(state))

        assert applied(busy, issue(busy, order())).ledger.row_count == 1

    def test_abort_gives_it_up_and_remembers_why(self):
        state = initialized()
        aborted = applied(state, begin(state, "r1"), AbortChange("r1", NOW, "vault is sealed"))

        assert aborted.change is None
        assert aborted.requests["r1"].result == "aborted: vault is sealed"
        assert aborted.roots_index == state.roots_index

    def test_abort_of_another_change_is_refused(self):
        state = initialized()
        busy = applied(state, begin(state, "r1"))

        assert refused(busy, AbortChange("r2", NOW, "")).reason == Reason.NO_SUCH_CHANGE
        assert refused(state, AbortChange("r1", NOW, "")).reason == Reason.NO_SUCH_CHANGE


class TestActivateRoot:
    def test_first_root_leaves_the_bootstrap_configuration_at_its_index(self):
        state = initialized()

        assert state.configuration is not None
        assert state.configuration.modify_index == 1
        assert state.active_root is not None
        assert (state.active_root.create_index, state.ca_epoch, state.roots_index) == (3, 1, 3)
        assert [(entry.kind, entry.active_root_id) for entry in state.history] == [
            ("bootstrap", None),
            ("bootstrap", OLD),
        ]

    def test_rotates_everything_in_one_step(self):
        before = initialized()
        wanted = stored(given='{"RootCert":"x"}')
        after = rotated(before, NEW, at=NOW + 5, configuration=wanted, retire_not_before=NOW + 15)

        old, new = after.root(OLD), after.root(NEW)
        assert old is not None
        assert new is not None
        assert (old.active, old.rotated_out_at, old.create_index) == (False, NOW + 5, 3)
        assert (new.active, new.rotated_out_at, new.create_index) == (True, None, after.index)
        assert {root.modify_index for root in after.roots} == {after.index}
        assert after.configuration is not None
        assert (after.configuration.stored, after.configuration.create_index) == (wanted, 1)
        assert after.configuration.modify_index == after.roots_index == after.index
        assert after.ca_epoch == before.ca_epoch + 1
        assert [(each.root_id, each.not_before, each.epoch) for each in after.retiring] == [
            (OLD, NOW + 15, before.ca_epoch)
        ]
        assert after.history[-1].kind == "rotate"
        assert old.sealed_key is not None

    def test_roots_are_listed_by_id(self):
        state = rotated(rotated(initialized(), THIRD), NEW)

        assert [root.id for root in state.roots] == [OLD, NEW, THIRD]

    def test_rotating_back_keeps_what_is_known_of_the_root(self):
        first = initialized()
        booked = applied(first, issue(first, order(not_after=NOW + HOUR)))
        away = rotated(booked, NEW, retire_not_before=NOW + 10)
        back = rotated(away, OLD, at=NOW + 5, retire_not_before=NOW + 15, sealed_key=None)

        root = back.active_root
        assert root is not None
        assert (root.id, root.create_index, root.leaf_not_after_max) == (OLD, 3, NOW + HOUR)
        assert root.sealed_key == first.roots[0].sealed_key
        assert dict(root.live_by_hour) == {(NOW + HOUR) // HOUR: 1}
        assert [(each.root_id, each.epoch) for each in back.retiring] == [(OLD, 1), (NEW, 2)]
        assert len(back.roots) == 2

    def test_needs_the_change_it_completes(self):
        state = initialized()
        busy = applied(state, begin(state, "r1"))

        assert refused(state, ActivateRoot("r1", NOW, 1, new_root(NEW), None)).reason == Reason.NO_SUCH_CHANGE
        assert refused(busy, ActivateRoot("r2", NOW, 1, new_root(NEW), None)).reason == Reason.NO_SUCH_CHANGE
        assert refused(busy, ActivateRoot("r1", NOW, 0, new_root(NEW), None)).reason == Reason.STALE_EPOCH
        assert refused(busy, ActivateRoot("r1", NOW, 1, new_root(""), None)).reason == Reason.INVALID


def with_requests(state: CAState, count: int) -> CAState:
    """The state after so many later changes, as far as their ids go."""
    records = {
        f"later-{number}": RequestRecord(NOW, Index(state.index + number + 1), "configured") for number in range(count)
    }
    return replace(state, index=Index(state.index + count), requests=state.requests.update(records))


class TestRequests:
    def test_repeated_id_reports_the_first_record(self):
        state = initialized()
        done = applied(state, configure(state, "r1"))
        result = refused(done, configure(done, "r1"))

        assert result.reason == Reason.DUPLICATE_REQUEST
        assert result.record == done.requests["r1"]
        assert result.detail == f"configured at index {done.index}"

    def test_repeated_id_is_found_whatever_the_command(self):
        done = rotated(initialized(), NEW)
        name = next(iter(done.requests))

        reasons = {
            refused(done, begin(done, name)).reason,
            refused(done, configure(done, name)).reason,
            refused(done, AbortChange(name, NOW, "")).reason,
            refused(done, ActivateRoot(name, NOW, done.ca_epoch, new_root(), None)).reason,
            refused(done, SetIntermediate(name, NOW, done.ca_epoch, NEW, (), "s", NOW)).reason,
        }

        assert reasons == {Reason.DUPLICATE_REQUEST}

    def test_the_earlier_ones_of_many_ids_are_forgotten_after_ten_minutes(self):
        done = with_requests(applied(initialized(), configure(initialized(), "r1")), REQUEST_IDS_MIN)

        assert "r1" in applied(done, ExpireLeaves(NOW + REQUEST_IDS_KEPT)).requests
        assert "r1" not in applied(done, ExpireLeaves(NOW + REQUEST_IDS_KEPT + 1)).requests
        assert "r1" not in applied(done, configure(done, "r2", at=NOW + REQUEST_IDS_KEPT + 1)).requests

    def test_a_clock_that_was_set_forward_makes_nobody_forget_the_latest_ids(self):
        done = with_requests(applied(initialized(), configure(initialized(), "r1")), REQUEST_IDS_MIN - 2)
        far = NOW + 365 * DAY
        later = applied(applied(done, configure(done, "r2", at=far)), ExpireLeaves(far))

        assert refused(later, configure(later, "r1", at=far)).reason == Reason.DUPLICATE_REQUEST


class TestConfiguration:
    def test_moves_the_roots_index_and_no_root(self):
        state = initialized()
        done = applied(state, configure(state))

        assert done.configuration is not None
        assert (done.configuration.create_index, done.configuration.modify_index) == (1, done.index)
        assert done.roots_index == done.index
        assert done.roots == state.roots
        assert done.ca_epoch == state.ca_epoch

    def test_longer_leaves_are_remembered_by_the_active_root(self):
        state = initialized(leaf_ttl=72 * HOUR)
        longer = applied(state, configure(state, "r1", configuration=stored(leaf_ttl=100 * HOUR)))
        shorter = applied(longer, configure(longer, "r2", configuration=stored(leaf_ttl=HOUR)))

        assert shorter.active_root is not None
        assert shorter.active_root.leaf_ttl_max == 100 * HOUR

    def test_history_is_bounded(self):
        state = initialized()
        for number in range(HISTORY_MAX + 5):
            state = applied(state, configure(state, f"r{number}"))

        assert len(state.history) == HISTORY_MAX
        assert state.history[-1].index == state.index


class TestIntermediate:
    def test_a_renewed_intermediate_fences_the_former_and_owes_its_clean_up(self):
        state = renewing(initialized())
        former = state.ca_epoch
        done = applied(state, renewal(state, backend=(("issuer", "i2"),)))

        assert done.active_root is not None
        assert (done.active_root.intermediates, done.active_root.signing_key_id) == (("PEM",), "cc:dd")
        assert done.active_root.backend == (("issuer", "i2"),)
        assert done.ca_epoch == state.epoch_given > former
        assert done.change is None
        assert done.configuration == state.configuration
        assert refused(done, issue(state, order())).reason == Reason.STALE_EPOCH
        assert [(each.root_id, each.epoch, each.not_before) for each in done.retiring] == [(OLD, former, NOW + 10)]
        assert done.requests["r1"].result == "renewed"

    def test_a_renewal_may_bring_another_configuration_into_force(self):
        wanted = stored(leaf_ttl=100 * HOUR)
        state = renewing(initialized(), configuration=wanted)
        done = applied(state, renewal(state))

        assert done.configuration is not None
        assert (done.configuration.stored, done.configuration.modify_index) == (wanted, done.index)
        assert done.active_root is not None
        assert done.active_root.leaf_ttl_max == 100 * HOUR
        assert (done.history[-1].kind, done.history[-1].configuration) == ("configure", wanted)

    def test_a_renewal_is_of_the_active_root_and_as_announced(self):
        state = renewing(rotated(initialized(), NEW))
        rotating = applied(rotated(initialized(), NEW), begin(rotated(initialized(), NEW), "r1"))

        assert refused(state, replace(renewal(state), root_id=RootID(OLD))).reason == Reason.ROOT_NOT_ACTIVE
        assert refused(state, replace(renewal(state), root_id=RootID(THIRD))).reason == Reason.NO_SUCH_ROOT
        assert refused(state, replace(renewal(state), expect_epoch=1)).reason == Reason.STALE_EPOCH
        assert refused(state, replace(renewal(state), request_id="r2")).reason == Reason.NO_SUCH_CHANGE
        assert refused(rotating, renewal(rotating)).reason == Reason.NO_SUCH_CHANGE
        assert refused(state, ActivateRoot("r1", NOW, 2, new_root(THIRD), None)).reason == Reason.NO_SUCH_CHANGE
        assert refused(bootstrapped(), replace(begin(bootstrapped()), renew=True)).reason == Reason.NO_SUCH_ROOT


class TestIssueLeaves:
    def test_books_each_leaf_and_returns_its_row(self):
        state = initialized()
        after, result = apply(state, issue(state, order("i1"), order("i2", service="db"), order("i3", serial=9)))

        hour = (NOW + 72 * HOUR) // HOUR
        assert isinstance(result, Applied)
        assert [(where, number, row.issue_id) for where, number, row in result.rows] == [
            (hour, 0, "i1"),
            (hour, 1, "i2"),
            (hour, 2, "i3"),
        ]
        assert after.active_root is not None
        assert after.active_root.live_by_hour[hour] == 3
        assert after.active_root.leaf_not_after_max == NOW + 72 * HOUR
        assert after.ledger.uses[OLD, "web"].count == 2
        assert after.ledger.uses[OLD, "web"].last_serial == 9
        assert (after.roots_index, after.index) == (state.roots_index, state.index + 1)

    def test_fence(self):
        state = rotated(initialized(), NEW)
        good = issue(state, order())

        assert refused(state, replace(good, ca_epoch=1)).reason == Reason.STALE_EPOCH
        assert refused(state, replace(good, root_id=OLD)).reason == Reason.ROOT_NOT_ACTIVE
        assert refused(bootstrapped(), good).reason == Reason.NO_SUCH_ROOT

    @pytest.mark.parametrize(
        "bad",
        [
            order(""),
            order(service=""),
            order(serial=0),
            order(not_after=NOW - 60),
            order(not_after=NOW + YEARS + 1),
        ],
    )
    def test_one_unsound_order_refuses_the_batch(self, bad: LeafOrder):
        state = initialized()

        assert refused(state, issue(state, order(), bad)).reason == Reason.INVALID

    def test_empty_batch_is_refused(self):
        state = initialized()

        assert refused(state, issue(state)).reason == Reason.INVALID

    def test_ledger_keeps_to_its_bound_dropping_what_expires_first(self):
        state = initialized(max_rows=3)
        early, late = NOW + HOUR, NOW + 2 * HOUR
        state = applied(state, issue(state, order("a", not_after=late), order("b", not_after=early)))
        state = applied(state, issue(state, order("c", not_after=early), order("d", not_after=late)))
        state = applied(state, issue(state, order("e", not_after=late)))

        kept = [row.issue_id for hour in state.ledger.hours.values() for row in hour.rows.values()]
        assert sorted(kept) == ["a", "d", "e"]
        assert state.active_root is not None
        assert sum(state.active_root.live_by_hour.values()) == 5

    def test_numbers_are_never_given_twice(self):
        state = initialized(max_rows=1)
        state = applied(state, issue(state, order("a")), issue(state, order("b")))
        _, result = apply(state, issue(state, order("c")))

        assert isinstance(result, Applied)
        assert result.rows[0][1] == 2


class TestSerials:
    def test_bind_once(self):
        state = initialized()
        hour = (NOW + 72 * HOUR) // HOUR
        state = applied(state, issue(state, order(serial=None)))
        state = applied(
            state, RecordSerials(NOW, ((hour, 0, 77),), Index(0)), RecordSerials(NOW, ((hour, 0, 78),), Index(0))
        )

        assert state.ledger.hours[hour].rows[0].serial == 77
        assert state.ledger.uses[OLD, "web"].last_serial == 77

    def test_of_rows_that_are_gone_are_passed_over(self):
        state = initialized()

        assert applied(state, RecordSerials(NOW, ((1, 2, 3),), Index(0))).ledger == state.ledger

    def test_of_leaves_from_before_a_restore_are_refused(self):
        state = initialized()
        hour = (NOW + 72 * HOUR) // HOUR
        state = applied(state, *restores(state))
        state = applied(state, issue(state, order(serial=None)))
        refusal = refused(state, RecordSerials(NOW, ((hour, 0, 77),), Index(0)))

        assert refusal.reason == Reason.STALE_INDEX
        state = applied(state, RecordSerials(NOW, ((hour, 0, 77),), state.restored_index))
        assert state.ledger.hours[hour].rows[0].serial == 77

    def test_must_be_positive(self):
        assert refused(initialized(), RecordSerials(NOW, ((1, 2, 0),), Index(0))).reason == Reason.INVALID


class TestTotals:
    def test_are_bounded_and_those_that_expire_first_go_first(self):
        state = initialized(max_rows=3)
        for number in range(5):
            name, until = f"s{number}", NOW + HOUR + number
            state = applied(state, issue(state, order(name, service=name, not_after=until)))

        assert set(state.ledger.uses) == {(OLD, "s2"), (OLD, "s3"), (OLD, "s4")}

    def test_a_service_that_renews_outlasts_one_that_does_not(self):
        state = initialized(max_rows=2)
        for name, until in (("web", HOUR), ("db", HOUR + 1), ("web", 2 * HOUR), ("new", 2 * HOUR)):
            state = applied(state, issue(state, order(f"{name}-{until}", service=name, not_after=NOW + until)))

        assert {service: use.count for (_, service), use in state.ledger.uses.items()} == {"web": 2, "new": 1}


class TestExpiry:
    def test_forgets_hours_that_are_over(self):
        state = initialized()
        state = applied(
            state, issue(state, order("a", not_after=NOW + 10), order("b", service="db", not_after=NOW + HOUR))
        )
        during, over = applied(state, ExpireLeaves(NOW + HOUR - 1)), applied(state, ExpireLeaves(NOW + HOUR))

        assert during.ledger.row_count == 2
        assert over.ledger.row_count == 1
        assert set(over.ledger.uses) == {(OLD, "db")}
        assert over.active_root is not None
        assert set(over.active_root.live_by_hour) == {NOW // HOUR + 1}


class TestPrune:
    def scene(self) -> CAState:
        """The old root carries an operator's key; one leaf under it lives for three days."""
        first = bootstrapped(stored(secret=b"operator-key-1"))
        first = rotated(first, OLD, sealed_key=b"root-key-1")
        first = applied(first, issue(first, order(not_after=NOW + 72 * HOUR)))
        return rotated(first, NEW, configuration=stored(secret=b"operator-key-2"), sealed_key=b"root-key-2")

    def test_waits_for_twice_the_longest_lifetime(self):
        state = self.scene()
        last = NOW + 2 * 72 * HOUR

        result = refused(state, PruneRoots(last, state.ca_epoch, (OLD,)))

        assert result.reason == Reason.ROOT_STILL_NEEDED
        assert str(last) in result.detail
        assert [root.id for root in applied(state, PruneRoots(last + 1, state.ca_epoch, (OLD,))).roots] == [NEW]

    def test_waits_for_the_last_leaf(self):
        state = initialized(leaf_ttl=HOUR)
        state = rotated(applied(state, issue(state, order(not_after=NOW + 9 * DAY))), NEW)

        assert refused(state, PruneRoots(NOW + 9 * DAY, 2, (OLD,))).reason == Reason.ROOT_STILL_NEEDED
        assert applied(state, PruneRoots(NOW + 9 * DAY + 1, 2, (OLD,))).ledger.row_count == 0

    def test_erases_the_keys_everywhere(self):
        before = self.scene()
        after = applied(before, PruneRoots(NOW + 7 * DAY, before.ca_epoch, (OLD,)))

        assert {b"operator-key-1", b"root-key-1"} <= secrets_in(before)
        assert secrets_in(after) == {b"operator-key-2", b"root-key-2", bytes(HMAC_KEY)}
        assert len(after.history) == len(before.history)

    def test_gives_the_roots_left_a_new_index(self):
        before = self.scene()
        after = applied(before, PruneRoots(NOW + 7 * DAY, before.ca_epoch, (OLD,)))

        assert after.active_root is not None
        assert after.active_root.modify_index == after.roots_index == after.index
        assert after.ca_epoch == before.ca_epoch

    def test_refusals(self):
        state = self.scene()
        late = NOW + YEARS

        assert refused(state, PruneRoots(late, 2, (NEW,))).reason == Reason.ROOT_STILL_NEEDED
        assert refused(state, PruneRoots(late, 2, (OLD, THIRD))).reason == Reason.NO_SUCH_ROOT
        assert refused(state, PruneRoots(late, 1, (OLD,))).reason == Reason.STALE_EPOCH
        assert refused(state, PruneRoots(late, 2, ())).reason == Reason.INVALID


class TestRetiring:
    def test_is_struck_when_done(self):
        state = rotated(initialized(), NEW, retire_not_before=NOW + 10)

        assert applied(state, ProviderRetired(NOW, OLD, 1)).retiring == ()
        assert refused(state, ProviderRetired(NOW, NEW, 1)).reason == Reason.NO_SUCH_ROOT
        assert refused(state, ProviderRetired(NOW, OLD, 2)).reason == Reason.NO_SUCH_ROOT

    def test_a_change_that_was_given_up_owes_what_it_may_have_made_and_its_epoch_is_never_given_again(self):
        state = initialized()
        wanted = stored(secret=b"token")
        given_up = applied(
            state, begin(state, "r1", configuration=wanted), AbortChange("r1", NOW, "no", retire_not_before=NOW)
        )
        (owed,) = given_up.retiring
        again = applied(given_up, begin(given_up, "r2"))

        assert (owed.root_id, owed.epoch, owed.configuration) == ("", state.ca_epoch + 1, wanted)
        assert given_up.ca_epoch == state.ca_epoch
        assert again.change is not None
        assert again.change.epoch == owed.epoch + 1
        assert applied(again, ProviderRetired(NOW, RootID(""), owed.epoch)).retiring == ()

    def test_what_an_operator_gives_up_is_struck_once_and_the_retry_finds_that(self):
        state = rotated(initialized(), NEW, retire_not_before=NOW + 10)
        forgotten = ProviderRetired(NOW, OLD, 1, request_id="r7")
        after = applied(state, forgotten)

        assert after.retiring == ()
        assert after.requests["r7"].result == "forgotten"
        assert refused(after, forgotten).reason == Reason.DUPLICATE_REQUEST
        assert refused(after, replace(forgotten, request_id="r8")).reason == Reason.NO_SUCH_ROOT


class TestReseal:
    def test_replaces_every_value_by_its_name(self):
        state = rotated(bootstrapped(stored(secret=b"s0")), OLD, configuration=stored(secret=b"s1"))
        state = rotated(state, NEW, configuration=stored(secret=b"s2"), retire_not_before=NOW)
        state = applied(state, begin(state, "r9", configuration=stored(secret=b"s3")))
        values = tuple((where, Sealed(b"new " + value)) for where, value in sorted(sealed_values(state).items()))
        after = applied(state, Reseal(NOW, state.roots_index, values))

        assert sealed_values(after) == dict(values)
        assert all(value.startswith(b"new ") for value in secrets_in(after))
        assert b"".join(encode_state(replace(after, index=state.index))) != b"".join(encode_state(state))

    def test_is_refused_once_the_state_moved(self):
        state = initialized()

        assert (
            refused(state, Reseal(NOW, Index(state.roots_index - 1), (("hmac", Sealed(b"")),))).reason
            == Reason.STALE_INDEX
        )
        assert refused(state, Reseal(NOW, state.roots_index, (("root/ff", Sealed(b"")),))).reason == Reason.STALE_INDEX
