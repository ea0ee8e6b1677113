"""The Raft log, the current term and the vote, durable in one append-only file of a ``Disk``.

The engine sees a list. Every change of it is a record appended to the file, so nothing is ever overwritten in place:

    magic (8) | record*        record = length u32 | CRC-32 u32 | durable u64 | kind (1) | body

``durable`` is the offset up to which the file was known to be on the disk when the record was made. That is what tells
a torn tail from damage: bytes that cannot be read and that no later record vouches for were never acknowledged to anyone
and are cut off; bytes that one vouches for were, and a node without them must not run.

    E index term command    an entry             T index    entries from here on are gone
    V term and vote         JSON                 C          all entries are gone
    I index                 a hint how far the log is committed

Records gather in memory until ``sync``, which writes and flushes all of them at once (group commit). The engine calls it
before any promise that rests on them leaves the node. An I/O error is final: ``on_fault`` is told, and every later call
raises ``JournalFailed``, because after a failed flush nobody knows what the disk holds.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import overload

from pysyncobj import journal as pysyncobj_journal

from caserver.errors import Corrupt
from caserver.raft.ports import Disk

Entry = tuple[bytes, int, int]  # command, index, term: the engine compares and unpacks plain tuples

JOURNAL_FILE = "raft.log"
_MAGIC = b"CARAFT01"
_FRAME = struct.Struct("<II")  # bytes that follow, their CRC-32
_HEAD = struct.Struct("<Qc")  # durable offset, kind
_ENTRY = struct.Struct("<QQ")  # index, term
_INDEX = struct.Struct("<Q")
_KINDS = b"ETVCI"
REMEDY = (
    "this node must not run on it: move the files of its data directory away and start it with -rejoin, "
    "while a majority of the other nodes is up"
)


class Damaged(Corrupt):
    """Files of a node cannot be trusted; the text tells a node of a cluster what to do, a single node must be told else."""

    def __init__(self, problem: str) -> None:
        super().__init__(f"{problem}; {REMEDY}")
        self.problem = problem


class JournalFailed(Exception):
    """The disk refused a write or a flush; the node must stop and promise nothing more."""


@dataclass(frozen=True, slots=True)
class _Record:
    end: int  # offset behind it
    durable: int
    kind: bytes
    body: bytes


def _encode(kind: bytes, body: bytes, *, durable: int) -> bytes:
    payload = _HEAD.pack(durable, kind) + body
    return _FRAME.pack(len(payload), zlib.crc32(payload)) + payload


def _record_at(content: bytes, offset: int) -> _Record | None:
    """The intact record that starts at ``offset``, if there is one."""
    start = offset + _FRAME.size
    if start + _HEAD.size > len(content):
        return None
    length, checksum = _FRAME.unpack_from(content, offset)
    end = start + length
    if length < _HEAD.size or end > len(content):
        return None
    durable, kind = _HEAD.unpack_from(content, start)
    # The cheap tests come first: looking for a record at every offset of a long file must not add up checksums.
    if kind not in _KINDS or durable > offset or zlib.crc32(content[start:end]) != checksum:
        return None
    return _Record(end=end, durable=durable, kind=kind, body=content[start + _HEAD.size : end])


@dataclass(slots=True)
class _Contents:
    """What the records of a file add up to."""

    entries: list[Entry] = field(default_factory=list)
    term: int = 0
    vote: str | None = None
    commit: int = 1  # the engine counts the first, empty entry as committed

    def replay(self, record: _Record) -> None:
        body = record.body
        match record.kind:
            case b"E":
                self._add((body[_ENTRY.size :], *_ENTRY.unpack_from(body)))
            case b"T":
                (index,) = _INDEX.unpack(body)
                del self.entries[max(0, index - self.entries[0][1]) if self.entries else 0 :]
            case b"V":
                given = json.loads(body)
                self.term, self.vote = given["term"], given["vote"]
            case b"C":
                self.entries.clear()
            case _:
                self.commit = max(self.commit, *_INDEX.unpack(body))

    def _add(self, entry: Entry) -> None:
        if self.entries and entry[1] != self.entries[-1][1] + 1:
            raise ValueError(f"entry {entry[1]} follows entry {self.entries[-1][1]}")
        self.entries.append(entry)

    def records(self) -> Iterator[tuple[bytes, bytes]]:
        """Kind and body of the records that make exactly this; the last one is of no consequence if it is lost."""
        yield b"V", _vote_body(self.term, self.vote)
        for command, index, term in self.entries:
            yield b"E", _ENTRY.pack(index, term) + command
        yield b"I", _INDEX.pack(self.commit)

    def encode(self) -> bytes:
        """A whole file; each record vouches for all before it, as the file is durable before it has its name."""
        content = bytearray(_MAGIC)
        for kind, body in self.records():
            content += _encode(kind, body, durable=len(content))
        return bytes(content)


def _vote_body(term: int, vote: str | None) -> bytes:
    return json.dumps({"term": term, "vote": vote}, separators=(",", ":")).encode()


def _read(content: bytes) -> tuple[_Contents, int]:
    """What a file holds, and the offset behind its last intact record."""
    if not content.startswith(_MAGIC):
        raise Damaged(f"{JOURNAL_FILE} is empty, cut short or not a caserver journal")
    contents, offset = _Contents(), len(_MAGIC)
    while offset < len(content):
        record = _record_at(content, offset)
        if record is None:
            _require_torn(content, offset)
            break
        try:
            contents.replay(record)
        except (ValueError, KeyError, TypeError, struct.error) as exc:
            raise Damaged(f"{JOURNAL_FILE}: the record at byte {offset} makes no sense ({exc})") from exc
        offset = record.end
    if offset == len(_MAGIC):  # every file begins with term and vote, made whole under its name
        raise Damaged(f"{JOURNAL_FILE} is cut short")
    return contents, offset


def _require_torn(content: bytes, damaged: int) -> None:
    """Corrupt if an intact record behind ``damaged`` says that the bytes there were durable."""
    for offset in range(damaged + 1, len(content) - _FRAME.size):
        record = _record_at(content, offset)
        if record is not None and record.durable > damaged:
            raise Damaged(
                f"{JOURNAL_FILE}: byte {damaged} of {len(content)} was durable and is damaged now "
                "(a failing disk, or an edited file)"
            )


def replace_file(disk: Disk, *, entries: Sequence[Entry], term: int) -> None:
    """Put a journal of committed ``entries`` in place of whatever is there, atomically and durably, without a vote. OSError."""
    contents = _Contents(entries=list(entries), term=term, commit=entries[-1][1])
    disk.replace(JOURNAL_FILE, contents.encode())


class Journal(pysyncobj_journal.Journal):  # type: ignore[misc]  # pysyncobj ships no types
    """The engine's log over a ``Disk``; lives on the Raft thread. Corrupt if the file cannot be trusted, OSError if unreadable.

    The methods in mixed case are those that pysyncobj calls.
    """

    def __init__(self, disk: Disk, *, on_fault: Callable[[OSError], None]) -> None:
        self._disk = disk
        self._on_fault = on_fault
        self._failure: OSError | None = None
        content = disk.read(JOURNAL_FILE)
        self._fresh = content is None
        if content is None:
            content = _Contents().encode()
            disk.replace(JOURNAL_FILE, content)  # at once and whole: an empty or short file is damage, never "new"
        self._contents, intact = _read(content)
        self._torn_bytes = len(content) - intact
        if self._torn_bytes:
            disk.replace(JOURNAL_FILE, content[:intact])
        # A killed process leaves bytes that only the page cache holds; what is read must be durable before it is promised.
        disk.datasync(JOURNAL_FILE)
        self._durable_bytes = intact
        self._pending = bytearray()
        self._hinted_commit = self._contents.commit
        self._visible: int | None = None  # length of the list while one message of the leader is being handled
        self._require_committed()

    @property
    def fresh(self) -> bool:
        """Whether there was no journal and this one was made."""
        return self._fresh

    @property
    def torn_bytes(self) -> int:
        """How much of an unfinished last write was cut off at the start."""
        return self._torn_bytes

    @property
    def last(self) -> tuple[int, int]:
        """Index and term of the last entry; zeros if there is none."""
        entries = self._contents.entries
        return (entries[-1][1], entries[-1][2]) if entries else (0, 0)

    @property
    def dirty(self) -> bool:
        """Whether something awaits ``sync``."""
        return bool(self._pending)

    def sync(self) -> None:
        """Return when all changes so far are durable; one write and one flush, however many they are."""
        if self._failure is not None:
            raise JournalFailed(f"the journal stopped: {self._failure}") from self._failure
        if not self._pending:
            return
        self._require_committed()
        data = bytes(self._pending)
        self._attempt(lambda: self._append(data))
        self._pending.clear()
        self._durable_bytes += len(data)

    def rewrite(self, entries: Sequence[Entry]) -> None:
        """Make ``entries`` the whole log, atomically and durably; term, vote and commit hint stay."""
        contents = self._contents
        if self._failure is not None:
            raise JournalFailed(f"the journal stopped: {self._failure}") from self._failure
        contents.entries = list(entries)
        self._visible = None
        self._require_committed()
        content = contents.encode()
        self._attempt(lambda: self._disk.replace(JOURNAL_FILE, content))
        self._pending.clear()
        self._durable_bytes = len(content)
        self._hinted_commit = contents.commit

    def heal(self, snapshot: tuple[Entry, Entry] | None) -> None:
        """Bring a journal that was just opened in line with the snapshot beside it, before the engine sees either.

        ``snapshot`` holds the last two entries that the snapshot contains, in order. The journal then starts with
        exactly these two. A crash between writing a snapshot and shortening the log, or between installing a leader's
        snapshot and clearing the log, is mended; Corrupt if the two cannot belong together.
        """
        entries = self._contents.entries
        if snapshot is None:
            if entries and entries[0][1] != 1:
                raise Damaged(f"{JOURNAL_FILE} starts at {entries[0][1]} and there is no snapshot")
            return
        if self._fresh:
            raise Damaged(f"there is a snapshot and no {JOURNAL_FILE}: term and vote are lost")
        tail = self._behind(snapshot[1])
        if (*snapshot, *tail) != tuple(entries):
            self.rewrite([*snapshot, *tail])

    def _behind(self, last: Entry) -> list[Entry]:
        """The entries that continue a snapshot which ends with ``last``."""
        _, index, term = last
        entries, commit = self._contents.entries, self._contents.commit
        if not entries or entries[-1][1] < index:
            return []
        if entries[0][1] > index:
            raise Damaged(f"the snapshot ends at {index}, {JOURNAL_FILE} starts at {entries[0][1]}")
        position = index - entries[0][1]
        if entries[position][2] == term:
            return entries[position + 1 :]
        if commit >= index:
            raise Damaged(f"snapshot and {JOURNAL_FILE} contradict each other at committed entry {index}")
        return []  # never committed: a snapshot installed from the leader took their place

    # --- what pysyncobj calls

    def __len__(self) -> int:
        return len(self._contents.entries) if self._visible is None else self._visible

    @overload
    def __getitem__(self, position: int) -> Entry: ...
    @overload
    def __getitem__(self, position: slice) -> list[Entry]: ...
    def __getitem__(self, position: int | slice) -> Entry | list[Entry]:
        entries, length = self._contents.entries, self._visible
        if length is None:
            return entries[position]
        if isinstance(position, slice):
            return [entries[at] for at in range(*position.indices(length))]
        at = position + length if position < 0 else position
        if not 0 <= at < length:
            raise IndexError(position)
        return entries[at]

    def add(self, command: bytes, idx: int, term: int) -> None:
        """Append an entry; inside a leader's message, an entry that is there already is merely shown again.

        Corrupt if it contradicts what is committed here, or follows no entry of the log.
        """
        entry = (bytes(command), idx, term)
        if self._visible is not None:
            if self._shows_again(entry):
                return
            self._cut(self._visible)
            self._visible = None
        entries = self._contents.entries
        if entries and idx != entries[-1][1] + 1:
            raise Corrupt(f"entry {idx} cannot follow entry {entries[-1][1]}")
        entries.append(entry)
        self._put(b"E", _ENTRY.pack(idx, term) + entry[0])

    def deleteEntriesFrom(self, position: int) -> None:  # noqa: N802  # pysyncobj's name
        """Hide the entries from ``position`` on until the message ends.

        pysyncobj deletes whatever lies behind a message's place in the log, though a late or repeated message proves
        nothing about it: that loses acknowledged entries. Raft deletes only on a real conflict, and ``add`` sees those.
        """
        self._visible = position

    def end_of_message(self) -> None:
        """Show all entries again; to be called after every message that the engine has handled, also a failed one."""
        self._visible = None

    def deleteEntriesTo(self, position: int) -> None:  # noqa: N802  # pysyncobj's name
        """Drop the entries before ``position``, which a durable snapshot holds; atomic and durable."""
        self.rewrite(self._contents.entries[position:])

    def clear(self) -> None:
        """Drop all entries; term, vote and commit hint stay."""
        self._contents.entries.clear()
        self._visible = None
        self._put(b"C", b"")

    def setCurrentTerm(self, term: int, vote: str | None) -> None:  # noqa: N802  # pysyncobj's name
        """Record term and vote, durable on return; ValueError for a second vote in one term or a step back."""
        contents = self._contents
        if (term, vote) == (contents.term, contents.vote):
            return
        if term < contents.term or (term == contents.term and contents.vote is not None):
            raise ValueError(
                f"term {term} with vote {vote} must not replace term {contents.term} with vote {contents.vote}"
            )
        contents.term, contents.vote = term, vote
        self._put(b"V", _vote_body(term, vote))
        self.sync()

    def getCurrentTerm(self) -> int:  # noqa: N802  # pysyncobj's name
        """The recorded term; that of the last entry may be higher (an installed snapshot)."""
        return self._contents.term

    def getVotedForNodeId(self) -> str | None:  # noqa: N802  # pysyncobj's name
        """Whom this node voted for in the term in which it starts."""
        return self._contents.vote if self._contents.term >= self.last[1] else None

    def setRaftCommitIndex(self, index: int) -> None:  # noqa: N802  # pysyncobj's name
        """Remember how far the log is committed; what was committed once stays so."""
        self._contents.commit = max(self._contents.commit, index)

    def getRaftCommitIndex(self) -> int:  # noqa: N802  # pysyncobj's name
        """How far the log is known to be committed; at the start that may be a little behind."""
        return self._contents.commit

    def onOneSecondTimer(self) -> None:  # noqa: N802  # pysyncobj's name
        """Put the commit hint into the file if it moved; it makes a lost tail noticed at the next start."""
        if self._contents.commit != self._hinted_commit:
            self._hinted_commit = self._contents.commit
            self._put(b"I", _INDEX.pack(self._hinted_commit))

    def _destroy(self) -> None:
        if self._failure is None:
            self.sync()

    def _shows_again(self, entry: Entry) -> bool:
        position = self._visible or 0
        entries = self._contents.entries
        if position >= len(entries) or entries[position][1:] != entry[1:]:
            return False
        if entries[position] != entry:
            raise Corrupt(f"entry {entry[1]} of term {entry[2]} is not what this node's log holds under that number")
        self._visible = position + 1
        return True

    def _cut(self, position: int) -> None:
        entries = self._contents.entries
        if position >= len(entries):
            return
        index = entries[position][1]
        if index <= self._contents.commit:
            raise Damaged(f"the leader contradicts entry {index}, which is committed here")
        self._put(b"T", _INDEX.pack(index))
        del entries[position:]

    def _put(self, kind: bytes, body: bytes) -> None:
        self._pending += _encode(kind, body, durable=self._durable_bytes)

    def _append(self, data: bytes) -> None:
        self._disk.append(JOURNAL_FILE, data)
        self._disk.datasync(JOURNAL_FILE)

    def _attempt(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as exc:
            self._failure = exc
            self._on_fault(exc)
            raise JournalFailed(
                f"the journal cannot be written: {exc}; nothing that was acknowledged is lost: make room, or mend or "
                "replace the disk, and start the node again"
            ) from exc

    def _require_committed(self) -> None:
        entries, commit = self._contents.entries, self._contents.commit
        if entries and entries[-1][1] < commit:
            raise Damaged(
                f"entry {commit} is committed, but {JOURNAL_FILE} ends at {entries[-1][1]}: a part of it is lost"
            )
