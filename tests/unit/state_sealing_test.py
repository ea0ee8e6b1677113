from __future__ import annotations

from hypothesis import given, settings

from caserver.internode.keyring import sealed_key_id
from caserver.state.codec import encode_command
from caserver.state.commands import ActivateRoot, BeginChange, Bootstrap, Command, Reseal, SetConfiguration
from caserver.state.sealing import keys_in_command
from tests.testkit.states import commands


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
