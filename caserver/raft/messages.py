"""What Raft nodes say to each other: one table of messages, and their frames.

A frame is a length (4 bytes, big-endian) and a JSON object, bytes in base64. Whatever is not in the table, exactly, is
refused: nothing here can carry a membership change, a foreign command kind or an object to be revived.

What each message is for is told in ``guard``.
"""

from __future__ import annotations

import binascii
import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NoReturn

from caserver.raft.ports import Message

# An append_entries holds up to 1 MiB of commands and one more of at most 256 KiB; base64 and numbers add less than half.
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


def _integer_or_none(given: Any) -> int | None:
    return None if given is None else _integer(given)


def _boolean(given: Any) -> bool:
    if type(given) is not bool:
        raise ValueError("needs true or false")
    return given


def _text(given: Any) -> str:
    if type(given) is not str or len(given) > _TEXT_MAX:
        raise ValueError(f"needs a text of at most {_TEXT_MAX} characters")
    return given


def _bytes(given: Any) -> bytes:
    if type(given) is not str:
        raise ValueError("needs base64")
    try:
        return binascii.a2b_base64(given, strict_mode=True)
    except ValueError as exc:
        raise ValueError("needs base64") from exc


def _key_ids(given: Any) -> list[str]:
    if type(given) is not list or len(given) > _KEY_IDS_MAX:
        raise ValueError(f"needs a list of at most {_KEY_IDS_MAX} key ids")
    return [_text(each) for each in given]


def _entry(given: Any) -> tuple[bytes, int, int]:
    if type(given) is not list or len(given) != 3:  # noqa: PLR2004  # command, index, term
        raise ValueError("needs entries of command, index and term")
    command = _bytes(given[0])
    if command[:1] not in _COMMAND_KINDS:
        raise ValueError("holds a command of a kind that is not in use")
    return command, _integer(given[1]), _integer(given[2])


def _entries(given: Any) -> list[tuple[bytes, int, int]]:
    if type(given) is not list:
        raise ValueError("needs a list of entries")
    return [_entry(each) for each in given]


def _chunk(given: Any) -> tuple[bytes, bool, bool] | None:
    """A piece of a snapshot: bytes, whether it is the first, whether it is the last."""
    if given is None:
        return None
    if type(given) is not list or len(given) != 3:  # noqa: PLR2004  # bytes, first, last
        raise ValueError("needs bytes, first and last")
    return _bytes(given[0]), _boolean(given[1]), _boolean(given[2])


@dataclass(frozen=True, slots=True)
class _Kind:
    required: Mapping[str, Decoder]
    optional: Mapping[str, Decoder] = field(default_factory=dict)


_TERM = {"term": _integer}
_PLACE = {"prevLogIdx": _integer_or_none, "prevLogTerm": _integer_or_none, "entries": _entries}

KINDS: Mapping[str, _Kind] = {
    # pysyncobj's own; ``xfer``: the present leader asked for this campaign
    "request_vote": _Kind(_TERM | {"last_log_index": _integer, "last_log_term": _integer}, {"xfer": _boolean}),
    "response_vote": _Kind(_TERM),
    "timeout_now": _Kind(_TERM),
    "append_entries": _Kind(_TERM | {"commit_index": _integer}, _PLACE | {"serialized": _chunk}),
    "next_node_idx": _Kind(_TERM | {"next_node_idx": _integer, "reset": _boolean, "success": _boolean}),
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
    """Length and payload of one message; ValueError if it is too long or its type is not in the table."""
    if message["type"] not in KINDS:
        raise ValueError(f"no message of type {message['type']!r} is in use")
    payload = _ENCODER.encode(message).encode()
    if len(payload) > FRAME_BYTES_MAX:
        raise ValueError(f"a {message['type']} of {len(payload)} bytes does not fit a frame of {FRAME_BYTES_MAX}")
    return _LENGTH.pack(len(payload)) + payload


def payload_bytes(header: bytes, *, limit: int = FRAME_BYTES_MAX) -> int:
    """How many bytes follow a frame's length; ValueError if that is none or more than ``limit``."""
    (length,) = _LENGTH.unpack(header)
    if not 0 < length <= limit:
        raise ValueError(f"a frame of {length} bytes; 1 to {limit} are allowed")
    return int(length)


def decode(payload: bytes) -> Message:
    """Read one payload against the table; ValueError says what is wrong, without repeating what was sent."""
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
    if name == "append_entries":
        _check_append(message)
    return message


def read_object(payload: bytes) -> dict[str, Any]:
    """A JSON object with finite numbers; ValueError otherwise."""
    try:
        given = _DECODER.decode(payload.decode())
    except RecursionError as exc:
        raise ValueError("nested too deeply") from exc
    if type(given) is not dict:
        raise ValueError("not a JSON object")
    return given


def _check_append(message: Message) -> None:
    """Either a snapshot's piece, or entries that follow each other and their place in the log."""
    place = _PLACE.keys() & message.keys()
    if "serialized" in message:
        if place:
            raise ValueError("append_entries: both a snapshot and entries")
        return
    if len(place) != len(_PLACE):
        raise ValueError("append_entries: neither a snapshot nor entries with their place")
    entries, index, term = message["entries"], message["prevLogIdx"], message["prevLogTerm"]
    if index is None or term is None:
        if entries:
            raise ValueError("append_entries: entries without their place")
        return
    for before, after in pairwise([(b"", index, term), *entries, (b"", index + len(entries) + 1, message["term"])]):
        if after[1] != before[1] + 1 or after[2] < before[2]:
            raise ValueError("append_entries: entries out of order")


def _encode_bytes(value: object) -> str:
    if isinstance(value, bytes | bytearray):
        return binascii.b2a_base64(value, newline=False).decode()
    raise TypeError(f"a message cannot hold a {type(value).__name__}")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


# Made once: json.dumps and json.loads make a new one at every call with options, which costs as much as an answer does.
_ENCODER = json.JSONEncoder(default=_encode_bytes, separators=(",", ":"), allow_nan=False)
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
