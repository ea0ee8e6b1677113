"""What falls due, when, and over which time leaves move to a new root."""

from __future__ import annotations

from dataclasses import replace

import pytest

from caserver.raft.ports import Leadership
from caserver.state.commands import AbortChange, BeginChange, ExpireLeaves, ProviderRetired, PruneRoots
from caserver.state.lifecycle import (
    IDLE,
    Expire,
    Prune,
    RetireProvider,
    due,
    epoch,
    kept_until,
    leader_of,
    live_services,
    may_prune,
    next_due,
    renew_at,
    renew_window,
    roots_index,
)
from caserver.state.model import HOUR, REQUEST_IDS_KEPT, REQUEST_IDS_MIN, CAState, Effective, Index, RequestRecord
from tests.testkit.states import (
    DAY,
    NOW,
    ROOT_IDS,
    applied,
    bootstrapped,
    initialized,
    issue,
    order,
    rotated,
    stored,
)

OLD, NEW = ROOT_IDS[:2]
LEADERSHIP = Leadership(node="a", leader="b", term=3, is_leader=False)


def quiet(state: CAState) -> CAState:
    """The state with its request ids forgotten, which would otherwise fall due first."""
    return replace(state, requests=type(state.requests)())


def test_an_empty_state_owes_nothing():
    assert due(CAState(), NOW) is None
    assert next_due(CAState(), NOW) == IDLE


def test_a_replaced_provider_is_retired_first():
    state = quiet(rotated(initialized(), NEW, retire_not_before=NOW + 10))

    assert due(state, NOW + 9) is None
    assert next_due(state, NOW) == 10
    found = due(state, NOW + 30 * DAY)
    assert isinstance(found, RetireProvider)
    assert found.retiring.root_id == OLD
    assert isinstance(
        due(applied(state, ProviderRetired(NOW, found.retiring.root_id, found.retiring.epoch)), NOW + 30 * DAY), Prune
    )


def test_a_root_is_pruned_when_nothing_needs_it():
    state = quiet(rotated(initialized(leaf_ttl=72 * HOUR), NEW))
    last = NOW + 2 * 72 * HOUR

    assert due(state, last) is None
    assert due(state, last + 1) == Prune((state.roots[0].id,))
    assert next_due(state, last - 9) == 10
    assert due(applied(state, PruneRoots(last + 1, state.ca_epoch, (state.roots[0].id,))), last + 1) is None


def test_a_change_in_progress_puts_pruning_off():
    state = quiet(rotated(initialized(), NEW))
    assert state.configuration is not None
    busy = applied(state, BeginChange("r", NOW, state.configuration.modify_index, state.ca_epoch, stored()))

    assert due(busy, NOW + 30 * DAY) is None
    assert next_due(busy, NOW + 30 * DAY) == IDLE
    assert isinstance(due(applied(busy, AbortChange("r", NOW + 30 * DAY, "")), NOW + 30 * DAY), Prune)


def test_the_longest_lifetime_counts_and_the_last_leaf():
    state = initialized(leaf_ttl=HOUR)
    active = state.roots[0]
    out = replace(active, active=False, rotated_out_at=NOW)

    assert kept_until(active) is None
    assert not may_prune(active, NOW + 10**9)
    assert kept_until(out) == NOW + 2 * HOUR
    assert kept_until(replace(out, leaf_not_after_max=NOW + DAY)) == NOW + DAY
    assert may_prune(out, NOW + 2 * HOUR + 1)
    assert not may_prune(out, NOW + 2 * HOUR)


def test_leaves_expire_by_the_hour():
    state = quiet(applied(initialized(), issue(initialized(), order(not_after=NOW + 10))))

    assert due(state, NOW + HOUR - 1) is None
    assert due(state, NOW + HOUR) == Expire()
    assert next_due(state, NOW + HOUR - 5) == 5
    assert due(applied(state, ExpireLeaves(NOW + HOUR)), NOW + HOUR) is None


def test_request_ids_expire_when_there_are_many_later_ones():
    few = initialized()
    records = {f"r{number}": RequestRecord(NOW, Index(100 + number), "configured") for number in range(REQUEST_IDS_MIN)}
    state = replace(few, requests=few.requests.update(records))

    assert due(few, NOW + REQUEST_IDS_KEPT + 1) is None
    assert due(state, NOW + REQUEST_IDS_KEPT) is None
    assert next_due(state, NOW) == REQUEST_IDS_KEPT + 1
    assert due(state, NOW + REQUEST_IDS_KEPT + 1) == Expire()
    assert due(applied(state, ExpireLeaves(NOW + REQUEST_IDS_KEPT + 1)), NOW + DAY) is None


@pytest.mark.parametrize("advance", [0, 5, 600, HOUR, 3 * DAY, 7 * DAY])
def test_waiting_as_told_finds_something_to_do_or_nothing_at_all(advance: int):
    state = rotated(
        applied(initialized(), issue(initialized(), order(not_after=NOW + HOUR))), NEW, retire_not_before=NOW
    )
    now = NOW + advance
    wait = next_due(state, now)

    assert (due(state, now) is not None) == (wait == 0)
    assert wait == IDLE or due(state, now + int(wait)) is not None


def test_renewals_spread_over_the_time_that_the_limit_takes():
    names = [order(f"i{n}", service=f"s{n}") for n in range(200)]
    state = applied(initialized(), issue(initialized(), *names, order("old", service="gone", not_after=NOW + 1)))

    def limited(rate: float) -> CAState:
        assert state.configuration is not None
        changed = replace(state.configuration.stored, effective=Effective(csr_max_per_second=rate))
        return replace(state, configuration=replace(state.configuration, stored=changed))

    assert live_services(state, NOW + 5) == 200
    assert renew_window(limited(2.0), NOW + 5) == 100.0
    assert renew_window(limited(50.0), NOW + 5) == 30.0
    assert renew_window(limited(0.0), NOW + 5) == 30.0
    assert renew_window(CAState(), NOW) == 30.0


def test_leaves_renew_between_60_and_90_percent_of_their_life():
    assert renew_at(1000, 2000, 0.0, now=1060) == pytest.approx(1600)
    assert renew_at(1000, 2000, 0.5, now=1060) == pytest.approx(1750)
    assert renew_at(1000, 2000, 1.0, now=1060) == pytest.approx(1900)


def test_a_leaf_that_is_short_lived_from_the_start_is_not_renewed_at_once():
    assert renew_at(1000, 1080, 0.0, now=1060.5) == pytest.approx(1065.5)


def test_selectors():
    state = bootstrapped()

    assert (roots_index(state, LEADERSHIP), epoch(state, LEADERSHIP), leader_of(state, LEADERSHIP)) == (1, 0, "b")
