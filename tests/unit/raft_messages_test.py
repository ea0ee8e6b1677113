import json
import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caserver.raft import messages
from caserver.raft.messages import FRAME_BYTES_MAX, KINDS, LENGTH_BYTES, decode, frame, payload_bytes

ENTRIES = [(b"\x01", 5, 2), (b"\x00\xff command", 6, 2), (b"\x00", 7, 3)]
APPEND = {
    "type": "append_entries",
    "term": 3,
    "commit_index": 4,
    "entries": ENTRIES,
    "prevLogIdx": 4,
    "prevLogTerm": 1,
}
CHUNK = {"type": "append_entries", "term": 3, "commit_index": 4, "serialized": (b"\x80piece", True, False)}
EXAMPLES: list[dict[str, Any]] = [
    {"type": "request_vote", "term": 3, "last_log_index": 9, "last_log_term": 2},
    {"type": "request_vote", "term": 3, "last_log_index": 9, "last_log_term": 2, "xfer": True},
    {"type": "response_vote", "term": 3},
    {"type": "timeout_now", "term": 3},
    APPEND,
    {**APPEND, "entries": []},
    CHUNK,
    {**CHUNK, "serialized": (b"", True, True)},
    {**CHUNK, "serialized": (b"x", False, True)},
    {**CHUNK, "serialized": None},
    {"type": "next_node_idx", "term": 3, "next_node_idx": 8, "reset": False, "success": True},
    {"type": "next_node_idx", "term": (1 << 63) - 1, "next_node_idx": 1, "reset": True, "success": False},
    {"type": "keys", "held": ["aa", "bb"], "stored": []},
]
INTEGERS = st.integers(0, (1 << 63) - 1)


def payload(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: message["type"])
def test_a_message_arrives_as_it_was_sent(message: dict[str, Any]) -> None:
    data = frame(message)
    header, body = data[:LENGTH_BYTES], data[LENGTH_BYTES:]

    assert payload_bytes(header) == len(body)
    assert decode(body) == message


@given(st.lists(st.binary(max_size=50), max_size=5), INTEGERS)
def test_any_commands_arrive_as_they_were_sent(commands: list[bytes], term: int) -> None:
    entries = [(b"\x00" + command, 5 + at, term) for at, command in enumerate(commands)]
    message = {**APPEND, "term": term, "prevLogTerm": 0, "entries": entries}

    assert decode(frame(message)[LENGTH_BYTES:]) == message


@pytest.mark.parametrize("name", KINDS)
def test_a_message_needs_every_field_of_its_type(name: str) -> None:
    with pytest.raises(ValueError, match="missing"):
        decode(payload(type=name))


@pytest.mark.parametrize("name", KINDS)
def test_a_message_has_no_other_fields(name: str) -> None:
    with pytest.raises(ValueError, match="does not have"):
        decode(payload(type=name, request_id=1))


@pytest.mark.parametrize(
    "name",
    ["apply_command", "membership", "append_entries", "next_node_idx", "", None, 3, ["request_vote"], {}],
)
def test_other_types_do_not_exist(name: Any) -> None:
    with pytest.raises(ValueError, match="unknown type"):
        decode(payload(type=name))


@pytest.mark.parametrize("value", [-1, 1.0, True, "3", None, [], 1 << 63, 10**400])
def test_a_number_is_a_whole_number_of_64_bits(value: Any) -> None:
    with pytest.raises(ValueError, match=r"response_vote: term needs|digits"):
        decode(payload(type="response_vote", term=value))


@pytest.mark.parametrize("value", [0, 1, "true", None])
def test_a_flag_is_true_or_false(value: Any) -> None:
    with pytest.raises(ValueError, match="xfer needs true or false"):
        decode(payload(type="request_vote", term=1, last_log_index=1, last_log_term=1, xfer=value))


def entries_payload(
    *entries: tuple[int, bytes], place: int = 4, before: int = 1, term: int = 3, count: int | None = None
) -> bytes:
    """An append_entries by hand: entries of term and command."""
    head = struct.pack(">BQQQQI", 1, term, 1, place, before, len(entries) if count is None else count)
    places = b"".join(struct.pack(">QI", each, len(command)) for each, command in entries)
    return head + places + b"".join(command for _, command in entries)


GOOD = entries_payload((2, b"\x00a"), (3, b"\x01"))


def test_entries_made_by_hand_are_read() -> None:
    assert decode(GOOD)["entries"] == [(b"\x00a", 5, 2), (b"\x01", 6, 3)]


@pytest.mark.parametrize(
    "body",
    [
        entries_payload((2, b"")),  # no kind
        entries_payload((2, b"\x02")),  # pysyncobj's membership command
        entries_payload((2, b"\x03")),  # its version command
        entries_payload((2, b"\x00"), (1, b"\x00")),  # a term that goes back
        entries_payload((0, b"\x00")),  # before that of its place
        entries_payload((9, b"\x00")),  # later than its leader's
        entries_payload(before=4),
        entries_payload((2, b"\x00"), count=2),
        entries_payload((2, b"\x00"), count=0),
        entries_payload((2, b"\x00"), count=(1 << 32) - 1),
        entries_payload((3, b"\x00"), place=(1 << 63) - 1),
        entries_payload(term=1 << 63),
        GOOD + b"\x00",
    ],
)
def test_entries_follow_each_other_from_their_place(body: bytes) -> None:
    with pytest.raises(ValueError, match="append_entries"):
        decode(body)


@pytest.mark.parametrize("message", EXAMPLES, ids=lambda message: message["type"])
def test_a_message_that_is_cut_short_or_too_long_is_not_another_one(message: dict[str, Any]) -> None:
    body = frame(message)[LENGTH_BYTES:]
    piece = len(body) if message.get("serialized") is None else struct.calcsize(">BQQB")
    for length in range(1, piece):
        with pytest.raises(ValueError):
            decode(body[:length])
    if message.get("serialized") is None:  # else it is the piece that is longer
        with pytest.raises(ValueError):
            decode(body + b"\x00")


@pytest.mark.parametrize(
    "body",
    [
        struct.pack(">BQQB", 2, 1 << 63, 1, 1),
        struct.pack(">BQQB", 2, 1, 1 << 63, 1),
        struct.pack(">BQQB", 2, 1, 1, 4),
        struct.pack(">BQQB", 3, 1 << 63, 1, 1),
        struct.pack(">BQQB", 3, 1, 1, 5),
        struct.pack(">BQQB", 3, 1, 1, 4) + b"a piece that is none",
        b"\x04" + bytes(17),
    ],
)
def test_numbers_and_flags_have_bounds(body: bytes) -> None:
    with pytest.raises(ValueError):
        decode(body)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"\xff\xfe",
        b'{"type":"response_vote","term":NaN}',
        b'{"type":"response_vote","term":Infinity}',
        b"[" * 100_000,
        b"\x80\x04\x95\x00.",
    ],
    ids=["empty", "null", "list", "open", "not UTF-8", "NaN", "Infinity", "deep", "pickle"],
)
def test_what_is_no_json_object_of_finite_numbers_is_refused(body: bytes) -> None:
    with pytest.raises(ValueError):
        decode(body)


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_no_bytes_raise_anything_but_value_error(body: bytes) -> None:
    try:
        decode(body)
    except ValueError:
        return


@pytest.mark.parametrize("header", [b"\0\0\0\0", (FRAME_BYTES_MAX + 1).to_bytes(4), b"\xff\xff\xff\xff"])
def test_a_frame_has_a_length_within_bounds(header: bytes) -> None:
    with pytest.raises(ValueError, match="are allowed"):
        payload_bytes(header)


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"type": "apply_command", "command": b""}, ValueError),
        ({**CHUNK, "serialized": (bytes(FRAME_BYTES_MAX), True, True)}, ValueError),
        ({"type": "response_vote", "term": float("nan")}, ValueError),
        ({"type": "response_vote", "term": object()}, TypeError),
        ({"type": "next_node_idx", "term": -1, "next_node_idx": 1, "reset": True, "success": True}, ValueError),
        ({**APPEND, "prevLogIdx": 5}, ValueError),
        ({**APPEND, "entries": [ENTRIES[0], ENTRIES[2]]}, ValueError),
    ],
)
def test_what_no_peer_would_take_is_not_framed(message: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        frame(message)


def test_errors_do_not_repeat_what_was_sent() -> None:
    shown: list[str] = []
    attempts: list[Callable[[], object]] = [
        lambda: decode(payload(type="hunter2")),
        lambda: decode(payload(type="response_vote", term="hunter2")),
        lambda: decode(payload(type="response_vote", hunter2=1)),
    ]
    for attempt in attempts:
        with pytest.raises(ValueError) as caught:
            attempt()
        shown.append(str(caught.value))

    assert not any("hunter2" in text for text in shown)
    assert messages.KINDS["response_vote"].required.keys() == {"term"}
