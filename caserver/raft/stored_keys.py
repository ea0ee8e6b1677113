"""Which cluster secrets sealed what this node has on its disk, and how the former ones leave it.

A secret that is being replaced is needed for as long as anything under it lies anywhere: in the state, in the journal
behind it, in the snapshot. Each node tells the others what it still has (``KeyReport``), refuses to start if it holds
something that it could not open, and compacts its log once the state has been sealed anew.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from caserver.errors import Corrupt
from caserver.internode.keyring import Keyring
from caserver.raft.engine import Engine
from caserver.raft.journal import Entry, Journal
from caserver.raft.ports import KeyReport, Seals, StateMachine
from caserver.raft.seam import COMMAND

State = TypeVar("State")
LOOK_EVERY = 1.0  # seconds


class StoredKeys(Generic[State]):
    """Keeps count of the keys on the disk of one node; lives on the Raft thread."""

    def __init__(
        self,
        engine: Engine,
        journal: Journal,
        machine: StateMachine[Any, State, Any],
        *,
        keyring: Keyring,
        seals: Seals[State],
    ) -> None:
        self._engine, self._journal, self._machine, self._seals = engine, journal, machine, seals
        self._held = keyring.key_ids
        self._scanned = (0, 0)  # index and term of the last entry that was read
        self._found: dict[int, frozenset[str]] = {}  # by index, of entries that hold something sealed

    def require_held(self) -> None:
        """Corrupt if the disk holds a secret that none of the configured keys opens."""
        missing = sorted(self._on_disk() - set(self._held))
        if missing:
            raise Corrupt(
                f"the data directory holds secrets sealed with key {', '.join(missing)}, which is not among the "
                f"configured cluster_secret keys ({', '.join(self._held)}): list the former secret behind the new one "
                "until `caserver operator keyring status` says that it may go"
            )

    def look(self) -> bool:
        """Renew this node's report; whether the log should be compacted to forget a key that seals nothing any more."""
        on_disk = self._on_disk()
        self._engine.keys = KeyReport(self._held, tuple(sorted(on_disk)))
        return not on_disk <= self._in_state() | {self._held[0]}

    def _on_disk(self) -> frozenset[str]:
        return self._in_state() | self._engine.snapshot_seals | self._in_journal()

    def _in_state(self) -> frozenset[str]:
        return self._seals.of_state(self._machine.state)

    def _in_journal(self) -> frozenset[str]:
        journal = self._journal
        if not len(journal):
            return frozenset()
        first = journal[0][1]
        index, term = self._scanned
        behind = index - first + 1
        # An entry with the same index and term has the same entries before it.
        if not 0 < behind <= len(journal) or journal[behind - 1][1:] != (index, term):
            self._found, behind = {}, 0
        self._found = {at: keys for at, keys in self._found.items() if at > first}
        for entry in (journal[0], *journal[behind:]):
            if keys := self._keys_of(entry):
                self._found[entry[1]] = keys
        self._scanned = journal.last
        return frozenset[str]().union(*self._found.values())

    def _keys_of(self, entry: Entry) -> frozenset[str]:
        command = entry[0]
        return self._seals.of_command(command[1:]) if command[:1] == COMMAND else frozenset()
