"""The bytes of commands and states: what they keep, what they refuse, that they can be paused."""

from __future__ import annotations

import dataclasses
import json
from typing import get_args

import pytest
from hypothesis import given, settings

from caserver.errors import Corrupt
from caserver.state import codec
from caserver.state.codec import decode_command, decode_state, encode_command, encode_state
from caserver.state.commands import AbortChange, BeginChange, Command, ExpireLeaves, IssueLeaves, LeafOrder
from caserver.state.model import HOUR, CAState, Index, RootID
from tests.testkit import states
from tests.testkit.states import NOW, ROOT_IDS, applied, initialized, issue, order, rotated

GOLDEN_BATCH = (
    b'["issue_leaves",1,[1800000000,"0a:0a",1,[["i1","web","7",-60,259200],["i2","d\\u00e9",null,-60,259200]]]]'
)


def test_every_command_survives_its_bytes_and_every_member_has_a_place():
    seen = set[type[Command]]()

    @given(states.commands)
    @settings(max_examples=300)
    def survives(command: Command) -> None:
        data = encode_command(command)
        assert decode_command(data) == command
        if not isinstance(command, IssueLeaves):  # the hot one is a row
            assert set(json.loads(data)[2]) == {field.name for field in dataclasses.fields(command)}
        seen.add(type(command))

    survives()

    assert seen == {kind for kind, _ in codec._OPERATIONS.values()} == set(get_args(Command))


def test_the_format_of_the_hot_command_stands():
    command = IssueLeaves(NOW, RootID("0a:0a"), 1, (order(), order("i2", service="dé", serial=None)))

    assert encode_command(command) == GOLDEN_BATCH
    assert decode_command(GOLDEN_BATCH) == command


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff",
        b"null",
        b"[]",
        b'["expire_leaves",1]',
        b'["expire_leaves",1,{}]',
        b'["expire_leaves",1,{"at":"x"}]',
        b'["expire_leaves",1,{"at":true}]',
        b'["expire_leaves",1,{"at":1.5}]',
        b'["expire_leaves",1,{"at":1,"more":2}]',
        b'["issue_leaves",1,[1,"r",1,[[1,2,3]]]]',
        b'["issue_leaves",1,[1,"r",1,[["i","s","zz",1,2]]]]',
        b'["issue_leaves",1,[1,"r",1,7]]',
        b'["issue_leaves",1,{}]',
        b'["reseal",1,{"at":1,"expect_index":1,"values":[["x","no base64"]]}]',
        b"[" * 100_000,
    ],
)
def test_damaged_commands_are_corrupt(data: bytes):
    with pytest.raises(Corrupt):
        decode_command(data)


@pytest.mark.parametrize("data", [b'["paint_it_black",1,{}]', b'["expire_leaves",2,{"at":1}]'])
def test_commands_of_a_later_build_name_what_they_need(data: bytes):
    with pytest.raises(Corrupt, match="run the caserver version that wrote it"):
        decode_command(data)


@pytest.mark.parametrize(
    ("command", "member"),
    [
        (BeginChange("r1", NOW, Index(3), 1, states.stored()), "force"),
        (AbortChange("r1", NOW, "vault is sealed"), "kind"),
    ],
)
def test_what_was_written_before_a_member_was_added_can_be_read(command: Command, member: str):
    operation, version, body = json.loads(encode_command(command))
    del body[member]
    assert decode_command(json.dumps([operation, version, body]).encode()) == command
    del body["request_id"]
    with pytest.raises(Corrupt):
        decode_command(json.dumps([operation, version, body]).encode())


@pytest.mark.parametrize(
    "command",
    [
        ExpireLeaves(1.5),  # type: ignore[arg-type]
        ExpireLeaves(True),
        IssueLeaves(NOW, RootID("r"), 1, (LeafOrder("i", "s", None, NOW, NOW + 0.5),)),  # type: ignore[arg-type]
    ],
)
def test_what_no_node_could_read_is_not_written(command: Command):
    with pytest.raises(ValueError, match=r"expected|other types"):
        encode_command(command)


def test_serials_of_any_length_survive():
    state = initialized()
    huge = 10**6000
    command = issue(state, order(serial=huge))

    decoded = decode_command(encode_command(command))
    assert isinstance(decoded, IssueLeaves)
    assert decoded.orders[0].serial == huge
    assert decode_state(b"".join(encode_state(applied(state, command)))) == applied(state, command)


def full_state(leaves: int) -> CAState:
    state = rotated(initialized(), ROOT_IDS[1], retire_not_before=NOW)
    batch = [order(f"i{n}", service=f"s{n % 700}", not_after=NOW + HOUR * (1 + n % 2)) for n in range(leaves)]
    return applied(state, issue(state, *batch))


def test_a_state_survives_its_bytes_in_small_slices():
    state = full_state(2500)
    slices = list(encode_state(state))

    assert decode_state(b"".join(slices)) == state
    assert max(map(len, slices)) < 200_000


def test_emptied_hours_survive():
    state = initialized(max_rows=1)
    state = applied(state, issue(state, order("a", not_after=NOW + HOUR)), issue(state, order("b")))

    assert decode_state(b"".join(encode_state(state))) == state


@pytest.mark.parametrize("cut", [1, 50, 1000])
def test_a_snapshot_cut_short_is_corrupt(cut: int):
    data = b"".join(encode_state(full_state(20)))

    with pytest.raises(Corrupt):
        decode_state(data[:-cut])


def test_a_snapshot_that_lacks_a_line_is_corrupt():
    lines = b"".join(encode_state(full_state(20))).split(b"\n")
    del lines[3]

    with pytest.raises(Corrupt, match="cut short"):
        decode_state(b"\n".join(lines))


@pytest.mark.parametrize("data", [b"", b"\n", b'["caserver-state",1,5]\n', b"\x80\x02pickle\n\n\n\n"])
def test_other_bytes_are_no_snapshot(data: bytes):
    with pytest.raises(Corrupt):
        decode_state(data)


def test_a_snapshot_of_a_later_build_names_what_it_needs():
    data = b"".join(encode_state(CAState())).replace(b'["caserver-state",1', b'["caserver-state",2')

    with pytest.raises(Corrupt, match="run the caserver version that wrote it"):
        decode_state(data)


def test_a_line_of_unknown_kind_is_corrupt():
    data = b"".join(encode_state(CAState())).replace(b'["uses",', b'["misuses",')

    with pytest.raises(Corrupt, match="unknown kind"):
        decode_state(data)


def test_snapshots_are_json_lines():
    lines = b"".join(encode_state(full_state(5))).splitlines()

    assert all(json.loads(line) for line in lines)
