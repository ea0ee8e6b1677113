"""What a leader sends to bring its followers to the end of the log: entries in batches, or the snapshot in chunks."""

from __future__ import annotations

from collections.abc import Callable

from caserver.environment import Clock
from caserver.errors import Corrupt
from caserver.raft.compaction import Sending
from caserver.raft.ports import Disk, Message
from caserver.raft.seam import Core
from caserver.raft.snapshot_file import SNAPSHOT_FILE

_BATCH_BYTES = 1 << 20  # of one append_entries
_BATCHES = 4  # to one peer in one go; its answer asks for more


class Feeder:
    """Sans-IO but for reading the snapshot's file; one per engine, in use while it leads."""

    def __init__(self, core: Core, *, disk: Disk, clock: Clock, send: Callable[[str, Message], bool]) -> None:
        self._core, self._disk, self._clock, self._send = core, disk, clock, send
        self._sending: dict[str, Sending] = {}  # snapshots under way
        self._batch: Message = {}
        self._batch_of: tuple[int, ...] = ()
        self._hungry: set[str] = set()  # peers whose answer leaves room for more
        self.progress: dict[str, int] = {}  # index of the entry that a peer, also one that does not count, wants next

    def feed(self, peer: str) -> None:
        """Send what ``peer`` lacks, or a heartbeat."""
        core = self._core
        if core.next_index(peer) <= core.first()[1]:
            self._feed_snapshot(peer)
            return
        self._sending.pop(peer, None)
        for _ in range(_BATCHES):
            following = core.next_index(peer)
            batch = self._batch_from(following, peer)
            if not self._send(peer, batch):
                return
            if batch["entries"]:
                core.set_next_index(peer, batch["entries"][-1][1] + 1)
            if core.next_index(peer) > core.last()[1]:
                return

    def _batch_from(self, following: int, peer: str) -> Message:
        """The entries from ``following`` on; the same object for every peer that lacks the same."""
        core = self._core
        what = (following, core.last()[1], core.term(), core.commit_index())
        if what != self._batch_of:
            place = core.entry(following - 1)
            if place is None:
                raise Corrupt(f"the log ends before entry {following - 1}, which {peer} was said to have")
            entries = core.entries(following, _BATCH_BYTES)
            self._batch = self._message(prevLogIdx=place[1], prevLogTerm=place[2], entries=entries)
            self._batch_of = what
        return self._batch

    def _message(self, **fields: object) -> Message:
        head = {"type": "append_entries", "term": self._core.term(), "commit_index": self._core.commit_index()}
        return head | fields

    def _feed_snapshot(self, peer: str) -> None:
        sending = self._sending.get(peer)
        if sending is None:
            content = self._disk.read(SNAPSHOT_FILE)
            if content is None:
                raise Corrupt("the log is shortened, but its snapshot is gone from the data directory")
            sending = self._sending[peer] = Sending(content, self._clock.monotonic())
        chunks = list(sending.chunks(self._clock.monotonic()))
        for chunk in chunks:
            self._send(peer, self._message(serialized=chunk))
        if not chunks:
            self._send(peer, self._message(serialized=None))  # a heartbeat: it is busy with what it has

    def answered(self, peer: str, message: Message) -> None:
        """Note a valid answer."""
        if message["success"]:
            self.progress[peer] = message["next_node_idx"]
        if message["success"] or message["reset"]:
            self._sending.pop(peer, None)
        elif peer in self._sending:
            self._sending[peer].answered(self._clock.monotonic())
        if self._core.next_index(peer) <= self._core.last()[1]:
            self._hungry.add(peer)

    def is_hungry(self, peer: str) -> bool:
        """Whether the last answer of ``peer`` leaves room for more."""
        return peer in self._hungry

    def feed_hungry(self) -> None:
        """Send more to those who took what they got."""
        if self._hungry:
            for peer in sorted(self._hungry):
                self.feed(peer)
            self._hungry.clear()

    def lost(self, peer: str) -> None:
        """The link to ``peer`` changed: what was under way on it does not count."""
        self._sending.pop(peer, None)

    def forget(self) -> None:
        """A new term begins."""
        self._sending.clear()
        self.progress.clear()
