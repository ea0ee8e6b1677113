"""Any commands in any order: the machine stays whole, deterministic and readable by every node."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings

from caserver.errors import Corrupt
from caserver.state.apply import apply
from caserver.state.codec import decode_command, encode_command
from caserver.state.commands import Applied, Command
from caserver.state.ledger import by_expiry
from caserver.state.machine import CAStateMachine
from caserver.state.model import CAState
from tests.testkit import states
from tests.testkit.states import (
    NOW,
    ROOT_IDS,
    initialized,
    issue,
    order,
    rotated,
)


@given(states.commands)
@settings(max_examples=150, deadline=None)
def test_no_command_makes_apply_raise_on_an_empty_or_a_full_state(command: Command):
    full = rotated(initialized(), ROOT_IDS[1], retire_not_before=NOW)
    for state in (CAState(), full):
        after, result = apply(state, decode_command(encode_command(command)))

        assert after.index == state.index + isinstance(result, Applied)


def test_dump_is_of_the_instant_it_was_asked_for():
    machine = CAStateMachine(initialized())
    before = machine.state
    slices = machine.dump()
    machine.apply(machine.encode(issue(before, order())))
    restored = CAStateMachine()

    restored.load(b"".join(slices))

    assert restored.state == before


def test_a_damaged_snapshot_leaves_the_state_alone():
    machine = CAStateMachine(initialized())
    before = machine.state

    with pytest.raises(Corrupt):
        machine.load(b"rubbish")

    assert machine.state is before


def test_equal_states_have_equal_bytes_however_they_came_about():
    state = initialized()
    orders = [order(f"i{n}", service=f"s{n}") for n in range(50)]
    one = states.applied(state, issue(state, *orders))
    totals = one.ledger.uses
    shuffled = type(totals)(sorted(totals.items(), key=lambda item: item[0][::-1], reverse=True))
    other = replace(one, ledger=replace(one.ledger, uses=shuffled, uses_by_expiry=by_expiry(shuffled)))

    assert b"".join(CAStateMachine(one).dump()) == b"".join(CAStateMachine(other).dump())
