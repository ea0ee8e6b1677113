"""What Raft nodes say to each other: one table of messages, and their frames.

A frame is a length (4 bytes, big-endian) and a payload. Those of the three messages that every commit or snapshot is made of
are binary, numbers big-endian, told apart by their first byte; all others are JSON objects:

    01 term commit_index prevLogIdx prevLogTerm count | count x (term u64, bytes u32) | commands     append_entries
    02 term next_node_idx flags (1 reset, 2 success)                                                next_node_idx
    03 term commit_index flags (1 first, 2 last, 4 nothing this time) | bytes                       append_entries

Whatever is not in the table, exactly, is refused: nothing here can carry a membership change, a foreign command kind or an
object to be revived. An entry's index follows from its place, so entries cannot leave a gap.

What each message is for is told in ``guard``.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from caserver.raft.ports import Message

# An append_entries holds up to 1 MiB of commands and one more of at most 256 KiB.
FRAME_BYTES_MAX = 8 << 20
LENGTH_BYTES = 4
_LENGTH = struct.Struct(">I")
_INT_MAX = (1 << 63) - 1
_TEXT_MAX = 256
_KEY_IDS_MAX = 32
# First byte of a command: an ordinary one, or a new leader's empty entry. Never pysyncobj's membership or version commands.
_COMMAND_KINDS = frozenset({b"\x00", b"\x01"})

Decoder = Callable[[Any], Any]


def _integer(given: Any) -> int:
    if type(given) is not int or not 0 <= given <= _INT_MAX:
        raise ValueError("needs a whole number, not negative")
    return given


def _boolean(given: Any) -> bool:
    if type(given) is not bool:
        raise ValueError("needs true or false")
    return given


def _text(given: Any) -> str:
    if type(given) is not str or len(given) > _TEXT_MAX:
        raise ValueError(f"needs a text of at most {_TEXT_MAX} characters")
    return given


def _key_ids(given: Any) -> list[str]:
    if type(given) is not list or len(given) > _KEY_IDS_MAX:
        raise ValueError(f"needs a list of at most {_KEY_IDS_MAX} key ids")
    return [_text(each) for each in given]


@dataclass(frozen=True, slots=True)
class _Kind:
    required: Mapping[str, Decoder]
    optional: Mapping[str, Decoder] = field(default_factory=dict)


_TERM = {"term": _integer}

KINDS: Mapping[str, _Kind] = {
    # pysyncobj's own, but for the binary ones; ``xfer``: the present leader asked for this campaign
    "request_vote": _Kind(_TERM | {"last_log_index": _integer, "last_log_term": _integer}, {"xfer": _boolean}),
    "response_vote": _Kind(_TERM),
    "timeout_now": _Kind(_TERM),
    # pre-vote and its answer: ``term`` is the one that the asker would campaign in; ``lli``, ``llt`` its last entry
    "pv": _Kind(_TERM | {"lli": _integer, "llt": _integer}),
    "pva": _Kind(_TERM),
    # ReadIndex and its answer: ``n`` numbers the round
    "ri": _Kind(_TERM | {"n": _integer}),
    "ria": _Kind(_TERM | {"n": _integer}),
    # the sender's term, for one who is behind
    "stale": _Kind(_TERM),
    # what a node says of itself, first on every link and then now and again; ``wall`` in milliseconds
    "standing": _Kind(
        {
            "standing": _text,
            "life": _text,
            "wall": _integer,
            "snapshot_index": _integer,
            "snapshot_hash": _text,
        }
    ),
    # which cluster secrets a node holds, current first, and which of them sealed what it stores
    "keys": _Kind({"held": _key_ids, "stored": _key_ids}),
}


def frame(message: Message) -> bytes:
    """Length and payload of one message; ValueError if it is too long, out of range or its type is not in use."""
    encode = _BINARY.get(message["type"])
    payload = _encode_json(message) if encode is None else encode(message)
    if len(payload) > FRAME_BYTES_MAX:
        raise ValueError(f"a {message['type']} of {len(payload)} bytes does not fit a frame of {FRAME_BYTES_MAX}")
    return _LENGTH.pack(len(payload)) + payload


def _encode_json(message: Message) -> bytes:
    if message["type"] not in KINDS:
        raise ValueError(f"no message of type {message['type']!r} is in use")
    return _ENCODER.encode(message).encode()


def _encode_append(message: Message) -> bytes:
    term, committed = message["term"], message["commit_index"]
    if "serialized" in message:
        if message["serialized"] is None:
            return _pack(_CHUNK, 3, term, committed, 4)
        piece, first, last = message["serialized"]
        return _pack(_CHUNK, 3, term, committed, first + 2 * last) + bytes(piece)
    entries, index = message["entries"], message["prevLogIdx"]
    if entries and (entries[0][1], entries[-1][1]) != (index + 1, index + len(entries)):
        raise ValueError("entries that do not follow their place")  # their indexes are not sent
    head = _pack(_PLACE, 1, term, committed, index, message["prevLogTerm"], len(entries))
    places = [_pack(_ENTRY, each_term, len(command)) for command, _, each_term in entries]
    return b"".join((head, *places, *(command for command, _, _ in entries)))


def _encode_answer(message: Message) -> bytes:
    return _pack(_ANSWER, 2, message["term"], message["next_node_idx"], message["reset"] + 2 * message["success"])


def _pack(layout: struct.Struct, *values: int) -> bytes:
    try:
        return layout.pack(*values)
    except struct.error as exc:
        raise ValueError("a message with a number out of range") from exc


_PLACE, _ENTRY = struct.Struct(">BQQQQI"), struct.Struct(">QI")
_ANSWER, _CHUNK = struct.Struct(">BQQB"), struct.Struct(">BQQB")
_BINARY: Mapping[str, Callable[[Message], bytes]] = {"append_entries": _encode_append, "next_node_idx": _encode_answer}


def payload_bytes(header: bytes, *, limit: int = FRAME_BYTES_MAX) -> int:
    """How many bytes follow a frame's length; ValueError if that is none or more than ``limit``."""
    (length,) = _LENGTH.unpack(header)
    if not 0 < length <= limit:
        raise ValueError(f"a frame of {length} bytes; 1 to {limit} are allowed")
    return int(length)


def decode(payload: bytes) -> Message:
    """Read one payload against the table; ValueError says what is wrong, without repeating what was sent."""
    read = _READERS.get(payload[0]) if payload else None
    if read is not None:
        try:
            return read(payload)
        except struct.error as exc:
            raise ValueError("a message that is cut short") from exc
    given = read_object(payload)
    name = given.pop("type", None)
    kind = KINDS.get(name) if type(name) is str else None
    if kind is None:
        raise ValueError("a message of an unknown type")
    message: Message = {"type": name}
    for key, value in given.items():
        decoder = kind.required.get(key) or kind.optional.get(key)
        if decoder is None:
            raise ValueError(f"{name}: a field that it does not have")
        try:
            message[key] = decoder(value)
        except ValueError as exc:
            raise ValueError(f"{name}: {key} {exc}") from exc
    missing = kind.required.keys() - message.keys()
    if missing:
        raise ValueError(f"{name}: {', '.join(sorted(missing))} missing")
    return message


def _read_entries(payload: bytes) -> Message:
    """Entries that follow each other and their place in the log, none of a term before the one before it or above ``term``."""
    _, term, committed, index, before, count = _PLACE.unpack_from(payload)
    position = _PLACE.size + count * _ENTRY.size
    _check(position <= len(payload) and max(term, committed, index + count) <= _INT_MAX, "append_entries: out of range")
    place, latest, entries = index, before, []
    for each_term, length in _ENTRY.iter_unpack(payload[_PLACE.size : position]):
        command = payload[position : position + length]
        position += length
        index += 1
        _check(command[:1] in _COMMAND_KINDS, "append_entries: a command of a kind that is not in use")
        _check(each_term >= latest, "append_entries: entries out of order")
        latest = each_term
        entries.append((command, index, each_term))
    _check(latest <= term, "append_entries: entries out of order")
    _check(position == len(payload), "append_entries: not as long as its entries")
    head = {"type": "append_entries", "term": term, "commit_index": committed}
    return head | {"prevLogIdx": place, "prevLogTerm": before, "entries": entries}


def _read_answer(payload: bytes) -> Message:
    _, term, following, flags = _ANSWER.unpack(payload)
    _check(max(term, following) <= _INT_MAX and flags <= 3, "next_node_idx: out of range")  # noqa: PLR2004  # two flags
    answer = {"type": "next_node_idx", "term": term, "next_node_idx": following}
    return answer | {"reset": bool(flags & 1), "success": bool(flags & 2)}


def _read_chunk(payload: bytes) -> Message:
    """A piece of a snapshot: bytes, whether it is the first, whether it is the last; or none this time."""
    _, term, committed, flags = _CHUNK.unpack_from(payload)
    _check(max(term, committed) <= _INT_MAX and flags <= 4, "append_entries: out of range")  # noqa: PLR2004  # flags above
    piece = payload[_CHUNK.size :]
    _check(not (piece and flags == 4), "append_entries: a snapshot's piece that is none")  # noqa: PLR2004
    chunk = None if flags == 4 else (piece, bool(flags & 1), bool(flags & 2))  # noqa: PLR2004
    return {"type": "append_entries", "term": term, "commit_index": committed, "serialized": chunk}


def _check(fulfilled: bool, otherwise: str) -> None:  # noqa: FBT001  # reads as an assertion
    if not fulfilled:
        raise ValueError(otherwise)


_READERS: Mapping[int, Callable[[bytes], Message]] = {1: _read_entries, 2: _read_answer, 3: _read_chunk}


def read_object(payload: bytes) -> dict[str, Any]:
    """A JSON object with finite numbers; ValueError otherwise."""
    try:
        given = _DECODER.decode(payload.decode())
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc
    if type(given) is not dict:
        raise ValueError("not a JSON object")
    return given


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


# Made once: json.dumps and json.loads make a new one at every call with options, which costs as much as an answer does.
_ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
