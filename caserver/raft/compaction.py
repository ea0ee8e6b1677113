"""Snapshots on their way: made in slices, sent in chunks with a window, received and handed over whole.

None of this blocks: a snapshot is made from the immutable state in slices between which the log goes on, and chunks go
out only as earlier ones are answered, so that a laggard never holds up the others.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from caserver.raft.seam import Entry

CHUNK_BYTES = 256 << 10
_WINDOW = 4  # chunks under way to one peer
_PATIENCE = 2.0  # seconds without any answer after which a snapshot is sent anew; twice as long every time
RECEIVE_BYTES_MAX = 1 << 30


class Making:
    """A snapshot of the state after ``last``, being made; ``previous`` is the entry before it, ``seals`` the keys in it."""

    def __init__(
        self, slices: Iterator[bytes], *, previous: Entry, last: Entry, seals: frozenset[str] = frozenset()
    ) -> None:
        self.previous, self.last, self.seals = previous, last, seals
        self.writing = False  # its file is being written: nothing else may write it now
        self._slices, self._made, self._hash = slices, list[bytes](), hashlib.sha256()
        self.advance()  # the first slice at once: it may be what takes hold of the state

    @property
    def index(self) -> int:
        """Index of the last entry in it."""
        return self.last[1]

    def advance(self) -> bool:
        """Make one more slice; False when there are no more."""
        piece = next(self._slices, None)
        if piece is None:
            return False
        self._made.append(piece)
        self._hash.update(piece)
        return True

    @property
    def size(self) -> int:
        """Bytes made so far."""
        return sum(map(len, self._made))

    @property
    def slices(self) -> list[bytes]:
        """What was made so far."""
        return self._made

    @property
    def state_hash(self) -> str:
        """SHA-256 of the slices so far, hex."""
        return self._hash.hexdigest()


@dataclass(slots=True)
class Sending:
    """A snapshot file on its way to one peer."""

    content: bytes
    heard_at: float  # monotonic instant of the last answer, or of the beginning
    position: int = 0
    under_way: int = 0
    done: bool = False
    patience: float = _PATIENCE

    def chunks(self, now: float) -> Iterator[tuple[bytes, bool, bool]]:
        """The chunks that may leave now: bytes, first, last.

        Answers come on another link and get lost with that one, while the chunks' own link may be well.
        """
        if now - self.heard_at > self.patience:
            self.heard_at, self.patience = now, 2 * self.patience
            self.position, self.under_way, self.done = 0, 0, False
        while self.under_way < _WINDOW and not self.done:
            piece = self.content[self.position : self.position + CHUNK_BYTES]
            first = self.position == 0
            self.position += len(piece)
            self.done = self.position >= len(self.content)
            self.under_way += 1
            yield piece, first, self.done

    def answered(self, now: float) -> None:
        """One chunk arrived."""
        self.heard_at = now
        self.under_way = max(0, self.under_way - 1)


@dataclass(slots=True)
class Receiving:
    """A snapshot file arriving from the leader."""

    pieces: list[bytes] = field(default_factory=list)
    size: int = 0
    open: bool = False

    def take(self, piece: bytes, *, first: bool, last: bool) -> bytes | None:
        """Add a piece; the whole content after the last one."""
        if first:
            self.pieces, self.size, self.open = [], 0, True
        if not self.open:
            return None
        self.pieces.append(piece)
        self.size += len(piece)
        if self.size > RECEIVE_BYTES_MAX:
            self.drop()
            return None
        if not last:
            return None
        content = b"".join(self.pieces)
        self.drop()
        return content

    def drop(self) -> None:
        """Forget what has arrived."""
        self.pieces, self.size, self.open = [], 0, False
