from __future__ import annotations

import pytest
from hypothesis import given, settings

from caserver.internode.keyring import Sealed, sealed_key_id
from caserver.state.apply import apply
from caserver.state.codec import encode_command
from caserver.state.commands import (
    AbortChange,
    ActivateRoot,
    BeginChange,
    Bootstrap,
    Command,
    ExpireLeaves,
    ProviderRetired,
    PruneRoots,
    Reseal,
    SetConfiguration,
)
from caserver.state.model import CAState, Index, RootID
from caserver.state.sealing import erases, keys_in_command
from tests.testkit.states import (
    DAY,
    NOW,
    ROOT_IDS,
    applied,
    commands,
    initialized,
    issue,
    new_root,
    order,
    rotated,
    stored,
)


@settings(max_examples=40)
@given(commands)
def test_the_keys_of_everything_sealed_in_a_command_are_found(command: Command) -> None:
    match command:
        case Bootstrap():
            values = [command.sealed_hmac_key, *(value for _, value in command.configuration.secrets)]
        case BeginChange() | SetConfiguration():
            values = [value for _, value in command.configuration.secrets]
        case ActivateRoot():
            values = [value for value in (command.root.sealed_key,) if value is not None]
        case Reseal():
            values = [value for _, value in command.values]
        case _:
            values = []

    assert keys_in_command(encode_command(command)) == {sealed_key_id(value) for value in values}


SECRET = b"sealed-operator-key"


def with_operator_key() -> CAState:
    """A second root of an operator's key, in force; the first is on its way out."""
    return rotated(
        initialized(),
        ROOT_IDS[1],
        configuration=stored(secret=SECRET, given='{"a": 1}'),
        retire_not_before=NOW + 10,
        sealed_key=b"sealed-second-root-key",
    )


def begun(state: CAState) -> CAState:
    assert state.configuration is not None
    index = state.configuration.modify_index
    return applied(state, BeginChange("x", NOW, index, state.ca_epoch, stored(secret=b"sealed-other-key")))


LATER = NOW + 30 * DAY


@pytest.mark.parametrize(
    ("state", "command", "erased"),
    [
        (with_operator_key(), PruneRoots(LATER, 2, (RootID(ROOT_IDS[0]),)), True),
        (with_operator_key(), PruneRoots(LATER, 2, (RootID(ROOT_IDS[1]),)), False),  # refused
        (with_operator_key(), ProviderRetired(NOW + 20, RootID(ROOT_IDS[0]), 1), False),  # the history has it still
        (with_operator_key(), ExpireLeaves(LATER), False),
        (with_operator_key(), issue(with_operator_key(), order()), False),
        (begun(with_operator_key()), AbortChange("x", NOW, "no"), True),
        (begun(with_operator_key()), ActivateRoot("x", NOW, 2, new_root(ROOT_IDS[2]), None), False),
        (with_operator_key(), Reseal(NOW, Index(5), (("hmac", Sealed(b"sealed-anew")),)), True),
    ],
)
def test_it_is_known_when_a_sealed_value_leaves_the_state(state: CAState, command: Command, *, erased: bool) -> None:
    after, result = apply(state, command)
    assert erases(state, after) == erased, result
