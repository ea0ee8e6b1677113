"""The snapshot beside the log: the whole state after one entry, in one file that proves itself.

    magic (8) | length of the header u32 | header, JSON | state | SHA-256 of all before it (32)

The header names the last entry that the state contains and the one before it, with which the shortened log begins, and
the hash of the state, which the nodes compare. The same bytes go to a node that is too far behind.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from caserver.errors import Corrupt
from caserver.raft.journal import Damaged, Entry
from caserver.raft.ports import Disk

SNAPSHOT_FILE = "snapshot"
FORMAT = 1
_MAGIC = b"CASNAP01"
_LENGTH = struct.Struct(">I")
_DIGEST_BYTES = 32


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A verified snapshot; ``state`` is what the state machine dumped after ``last``."""

    previous: Entry
    last: Entry
    state: bytes = field(repr=False)
    state_hash: str  # SHA-256 of ``state``, hex


def encode(*, previous: Entry, last: Entry, slices: Iterable[bytes]) -> bytes:
    """The bytes of a snapshot file."""
    state = b"".join(slices)
    header = json.dumps(
        {
            "format": FORMAT,
            "previous": _encode_entry(previous),
            "last": _encode_entry(last),
            "state_hash": hashlib.sha256(state).hexdigest(),
        },
        separators=(",", ":"),
    ).encode()
    content = b"".join((_MAGIC, _LENGTH.pack(len(header)), header, state))
    return content + hashlib.sha256(content).digest()


def write(disk: Disk, *, previous: Entry, last: Entry, slices: Iterable[bytes]) -> None:
    """Store a snapshot, durable on return, in place of the one before; OSError leaves that one as it was."""
    disk.replace(SNAPSHOT_FILE, encode(previous=previous, last=last, slices=slices))


def read(disk: Disk) -> Snapshot | None:
    """The stored snapshot, verified; None if there is none. Damaged if it is not as it was written."""
    content = disk.read(SNAPSHOT_FILE)
    if content is None:
        return None
    try:
        return decode(content)
    except Corrupt as exc:
        raise Damaged(str(exc)) from exc


def decode(content: bytes) -> Snapshot:
    """Verify the bytes of a snapshot file, from the disk or from the leader; Corrupt unless all of it is as written."""
    if not content.startswith(_MAGIC) or len(content) < len(_MAGIC) + _LENGTH.size + _DIGEST_BYTES:
        raise Corrupt("the snapshot is empty, cut short or not a caserver snapshot")
    body = memoryview(content)[:-_DIGEST_BYTES]
    if hashlib.sha256(body).digest() != content[-_DIGEST_BYTES:]:
        raise Corrupt("the snapshot is damaged: its checksum does not fit")
    start = len(_MAGIC) + _LENGTH.size
    (length,) = _LENGTH.unpack_from(content, len(_MAGIC))
    try:
        header = json.loads(bytes(body[start : start + length]))
        if header["format"] != FORMAT:
            raise Corrupt(f"the snapshot has format {header['format']}, this release reads {FORMAT}: use a later one")
        previous, last = _decode_entry(header["previous"]), _decode_entry(header["last"])
        state_hash = header["state_hash"]
    except (ValueError, KeyError, TypeError) as exc:
        raise Corrupt(f"the snapshot's header cannot be read ({exc})") from exc
    state = bytes(body[start + length :])
    if last[1] != previous[1] + 1 or hashlib.sha256(state).hexdigest() != state_hash:
        raise Corrupt("the snapshot contradicts itself")
    return Snapshot(previous=previous, last=last, state=state, state_hash=state_hash)


def _encode_entry(entry: Entry) -> list[Any]:
    command, index, term = entry
    return [base64.b64encode(command).decode(), index, term]


def _decode_entry(given: Any) -> Entry:
    command, index, term = given
    return base64.b64decode(command, validate=True), int(index), int(term)
