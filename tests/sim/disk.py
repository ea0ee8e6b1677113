"""A disk whose process may die in the middle of any call, and that then keeps what a real one would keep.

``Platter`` is what lies in the machine and outlives processes; ``SimDisk`` is one process's handle on it (port ``Disk``).
Bytes that were appended and not synced survive the death of the process, but of a loss of power only a part: a prefix, of
which the last pages may never have been written.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import cast

from caserver.raft.data_dir import MARKER_FILE, Marker
from caserver.raft.journal import _MAGIC, JOURNAL_FILE, Entry, _Contents, _record_at
from caserver.raft.snapshot_file import SNAPSHOT_FILE
from caserver.raft.snapshot_file import decode as decode_snapshot


class Crash(BaseException):
    """The process died here."""


class Death(Enum):
    """How a process ends."""

    KILLED = "killed"  # the machine lives on: what was written is kept
    POWER = "power"  # the machine died: what was not synced is lost in part


@dataclass(slots=True)
class _File:
    content: bytearray = field(default_factory=bytearray)
    durable: int = 0  # bytes that are on the platter for certain


class Durable:
    """What the journal and the snapshot on the platter prove: kept up while the disk is written."""

    def __init__(self) -> None:
        self.contents = _Contents()
        self.snapshot: tuple[int, int] = (0, 0)  # index and term of the last entry in it
        self.voter = False
        self._read_to = 0

    def journal(self, content: bytearray, durable: int) -> None:
        """The journal grew on the platter."""
        start, whole = self._read_to, cast("bytes", content)  # which is only read, and grows too long to be copied
        while start < durable and (record := _record_at(whole, start)) is not None and record.end <= durable:
            self.contents.replay(replace(record, body=bytes(record.body)))
            start = record.end
        self._read_to = start

    def journal_replaced(self, content: bytearray) -> None:
        """The journal was made anew."""
        self.contents, self._read_to = _Contents(), len(_MAGIC)
        self.journal(content, len(content))

    def holds(self, index: int, term: int) -> bool:
        """Whether the entry cannot be lost any more on this platter."""
        if self.snapshot[0] >= index:
            return True
        entries = self.contents.entries
        position = index - entries[0][1] if entries else -1
        return 0 <= position < len(entries) and entries[position][2] == term


class Platter:
    """The files of one node."""

    def __init__(self) -> None:
        self.files: dict[str, _File] = {}
        self.durable = Durable()
        self.before_wipe = Durable()
        self.lost = False  # wiped, and not a voter again

    def after(self, death: Death, chance: random.Random) -> None:
        """Let the machine lose what it loses by such a death."""
        for name in sorted(self.files):
            file = self.files[name]
            if death is Death.POWER:
                _lose(file, chance)
            file.durable = len(file.content)
        self.reread()

    def wipe(self) -> None:
        """Somebody put in a new disk."""
        self.files, self.before_wipe, self.lost = {}, self.durable, True
        self.reread()

    def clear(self) -> None:
        """Somebody moved the files away, and knows why."""
        self.files = {}
        self.reread()

    def reread(self) -> None:
        """Look at everything as if for the first time."""
        self.durable = Durable()
        for name, file in self.files.items():
            self.replaced(name, file)

    def replaced(self, name: str, file: _File | None) -> None:
        """Take note of a file that was replaced as a whole."""
        if file is None:
            return
        if name == JOURNAL_FILE:
            self.durable.journal_replaced(file.content)
        elif name == SNAPSHOT_FILE:
            last: Entry = decode_snapshot(bytes(file.content)).last
            self.durable.snapshot = (last[1], last[2])
        elif name == MARKER_FILE:
            self.durable.voter = Marker.decode(bytes(file.content)).initialised
            self.lost = self.lost and not self.durable.voter


def _lose(file: _File, chance: random.Random) -> None:
    loose = len(file.content) - file.durable
    if not loose:
        return
    kept = chance.choice((0, loose, chance.randint(0, loose)))
    del file.content[file.durable + kept :]
    if kept and chance.random() < 0.3:  # the size was written before the pages
        hole = chance.randint(1, kept)
        start = file.durable + chance.randint(0, kept - hole)
        file.content[start : start + hole] = bytes(hole)


class SimDisk:
    """Satisfies ``raft.ports.Disk`` for one process."""

    def __init__(self, platter: Platter, *, chance: random.Random, note: Callable[[str], None]) -> None:
        self._platter, self._chance, self._note = platter, chance, note
        self._died: Callable[[], None] = lambda: None
        self._crash_in: int | None = None
        self._fail_in: int | None = None
        self.alive = True

    def crash_in(self, steps: int, died: Callable[[], None]) -> None:
        """Die in the middle of the change that lies ``steps`` ahead (1 = the next one)."""
        self._crash_in, self._died = steps, died

    def fail_in(self, steps: int) -> None:
        """From the change that lies ``steps`` ahead on, the device is full."""
        self._fail_in = steps

    def read(self, name: str) -> bytes | None:
        self._require_alive()
        file = self._platter.files.get(name)
        return None if file is None else bytes(file.content)

    def append(self, name: str, data: bytes) -> None:
        file = self._platter.files.setdefault(name, _File())
        crash = self._begin("append", name, len(data))
        written = len(data)
        if crash:
            written = self._chance.choice((0, written, self._chance.randint(0, written)))
        file.content += data[:written]
        self._end(crash=crash)

    def datasync(self, name: str) -> None:
        crash = self._begin("datasync", name)
        file = self._platter.files.setdefault(name, _File())
        if not crash or self._chance.random() < 0.5:
            file.durable = len(file.content)
            if name == JOURNAL_FILE:
                self._platter.durable.journal(file.content, file.durable)
        self._end(crash=crash)

    def replace(self, name: str, data: bytes | None) -> None:
        crash = self._begin("replace", name, 0 if data is None else len(data))
        if not crash or self._chance.random() < 0.5:
            if data is None:
                self._platter.files.pop(name, None)
                self._platter.reread()
            else:
                file = self._platter.files[name] = _File(bytearray(data), len(data))
                self._platter.replaced(name, file)
        self._end(crash=crash)

    def lock(self) -> None:
        self._require_alive()

    def close(self) -> None:
        """The process is gone: whatever is left of it writes nothing."""
        self.alive = False

    def _require_alive(self) -> None:
        if not self.alive:
            raise Crash

    def _begin(self, operation: str, name: str, size: int = 0) -> bool:
        """Note a change; whether the process dies in it."""
        self._require_alive()
        self._note(f"disk {operation} {name} {size}")
        if self._fail_in is not None:
            self._fail_in -= 1
            if self._fail_in <= 0:
                raise OSError(errno.ENOSPC, "no space left on the simulated device")
        if self._crash_in is None:
            return False
        self._crash_in -= 1
        return self._crash_in == 0

    def _end(self, *, crash: bool) -> None:
        if crash:
            self._died()
            raise Crash
