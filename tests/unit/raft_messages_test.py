import json
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
    {**APPEND, "entries": [], "prevLogIdx": None, "prevLogTerm": None},
    CHUNK,
    {**CHUNK, "serialized": None},
    {"type": "next_node_idx", "term": 3, "next_node_idx": 8, "reset": False, "success": True},
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
    "name", ["apply_command", "apply_command_response", "membership", "", None, 3, ["request_vote"], {}]
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
    with pytest.raises(ValueError, match="reset needs true or false"):
        decode(payload(type="next_node_idx", term=1, next_node_idx=1, reset=value, success=True))


@pytest.mark.parametrize(
    "value",
    [
        None,
        "x",
        [3],
        [["AA==", 5]],
        [["AA==", 5, 2, 1]],
        [["not base64!", 5, 2]],
        [["", 5, 2]],  # no kind
        [["Ag==", 5, 2]],  # pysyncobj's membership command
        [["Aw==", 5, 2]],  # its version command
        [["AA==", "5", 2]],
        [["AA==", 6, 2]],  # not behind prevLogIdx
        [["AA==", 5, 2], ["AA==", 7, 2]],  # a gap
        [["AA==", 5, 2], ["AA==", 6, 1]],  # a term that goes back
        [["AA==", 5, 9]],  # later than its leader's
    ],
)
def test_entries_follow_each_other_from_their_place(value: Any) -> None:
    with pytest.raises(ValueError, match="append_entries"):
        decode(payload(type="append_entries", term=3, commit_index=1, prevLogIdx=4, prevLogTerm=1, entries=value))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"prevLogIdx": 1, "prevLogTerm": 1},
        {"serialized": None, "entries": []},
        {"prevLogIdx": None, "prevLogTerm": None, "entries": [["AA==", 5, 2]]},
    ],
)
def test_entries_come_with_their_place_and_without_a_snapshot(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="append_entries: "):
        decode(payload(type="append_entries", term=3, commit_index=1, **fields))


@pytest.mark.parametrize("value", [[], ["AA==", True], ["AA==", 1, False], ["%", True, True], "AA==", {"$b": "AA=="}])
def test_a_piece_of_a_snapshot_is_bytes_and_two_flags(value: Any) -> None:
    with pytest.raises(ValueError, match="append_entries: serialized"):
        decode(payload(type="append_entries", term=3, commit_index=1, serialized=value))


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
