"""The state machine that the log replicates: holds the current state and swaps it."""

from __future__ import annotations

from collections.abc import Iterator

from caserver.state.apply import apply
from caserver.state.codec import decode_command, decode_state, encode_command, encode_state
from caserver.state.commands import Command, Result
from caserver.state.model import CAState


class CAStateMachine:
    """Implements ``raft.ports.StateMachine``; all members but ``state`` belong to the Raft thread."""

    def __init__(self, state: CAState | None = None) -> None:
        self._state = CAState() if state is None else state

    @property
    def state(self) -> CAState:
        """The state after the last applied command: an immutable value, safe to read from any thread."""
        return self._state

    def encode(self, command: Command) -> bytes:
        """Versioned bytes of a command."""
        return encode_command(command)

    def apply(self, command: bytes) -> Result:
        """Apply one committed command; Corrupt for bytes that this build cannot read."""
        self._state, result = apply(self._state, decode_command(command))
        return result

    def dump(self) -> Iterator[bytes]:
        """Bytes of the state as it is at this call, in slices made while iterating."""
        return encode_state(self._state)

    def load(self, snapshot: bytes) -> None:
        """Replace the state; Corrupt if the bytes cannot be read, and then the state stays."""
        self._state = decode_state(snapshot)
