"""Our own bytes for commands and states: JSON with explicit names and versions, never pickle.

A command is ``[operation, version, body]``. A state is lines: a header with everything that is small, then the ledger
in slices, then a line that counts them. Both are canonical: equal values have equal bytes on every node, whatever the
order in which they came to be, so that nodes can compare hashes.

The tables below are the format. A field is added by a new version of the command (old ones stay readable), or to the
state with a default under a new ``_STATE_VERSION``. Bytes that do not fit raise ``Corrupt``.
"""

from __future__ import annotations

import binascii
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, TypeVar

from immutables import Map

from caserver.errors import Corrupt
from caserver.state import acl_codec
from caserver.state import commands as c
from caserver.state import model as m
from caserver.state.ledger import by_expiry, merged
from caserver.state.shapes import FLAG as _FLAG
from caserver.state.shapes import INT as _INT
from caserver.state.shapes import NUMBER as _NUMBER
from caserver.state.shapes import SEALED as _SEALED
from caserver.state.shapes import SERIAL as _SERIAL
from caserver.state.shapes import TEXT as _TEXT
from caserver.state.shapes import Shape as _Shape
from caserver.state.shapes import exactly as _exactly
from caserver.state.shapes import many as _many
from caserver.state.shapes import optional as _optional
from caserver.state.shapes import record as _record
from caserver.state.shapes import row_of as _row_of
from caserver.state.shapes import sorted_map as _sorted_map
from caserver.state.shapes import tuple_of as _tuple_of

T = TypeVar("T")
R = TypeVar("R")

_COMMAND_VERSION = 1
_STATE_FORMAT = "caserver-state"
_STATE_VERSION = 1
_ROWS_PER_SLICE = 500  # some 5 ms of work between two pauses
_USES_PER_BUCKET = 400

_dumps = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


_EFFECTIVE = _record(
    m.Effective,
    leaf_ttl=_INT,
    intermediate_ttl=_INT,
    root_ttl=_INT,
    rotation_period=_INT,
    csr_max_per_second=_NUMBER,
    csr_max_concurrent=_INT,
    private_key_type=_TEXT,
    private_key_bits=_INT,
)
_STORED = _record(
    m.StoredConfiguration,
    provider=_TEXT,
    given=_TEXT,
    secrets=_many(_tuple_of(_TEXT, _SEALED)),
    effective=_EFFECTIVE,
    root_cert=_optional(_TEXT),
    force_without_cross_signing=_FLAG,
)
_BACKEND = _many(_tuple_of(_TEXT, _TEXT))
_CERTIFICATE: dict[str, _Shape[Any]] = {
    "id": _TEXT,
    "name": _TEXT,
    "pem": _TEXT,
    "serial": _SERIAL,
    "not_before": _INT,
    "not_after": _INT,
    "key_type": _TEXT,
    "key_bits": _INT,
    "signing_key_id": _TEXT,
    "provider": _TEXT,
    "intermediates": _many(_TEXT),
    "sealed_key": _optional(_SEALED),
    "backend": _BACKEND,
}
_ROOT = _record(
    m.CARoot,
    frozenset({"backend", "epoch"}),
    **_CERTIFICATE,
    active=_FLAG,
    rotated_out_at=_optional(_INT),
    leaf_not_after_max=_INT,
    leaf_ttl_max=_INT,
    live_by_hour=_sorted_map(_INT, _INT),
    create_index=_INT,
    modify_index=_INT,
    epoch=_INT,
)
_CONFIGURATION = _record(m.Configuration, stored=_STORED, create_index=_INT, modify_index=_INT)
_CHANGE = _record(
    m.Change,
    frozenset({"force", "renew"}),
    request_id=_TEXT,
    begun_at=_INT,
    configuration=_STORED,
    epoch=_INT,
    begun_index=_INT,
    force=_FLAG,
    renew=_FLAG,
)
_RETIRING = _record(
    m.Retiring,
    frozenset({"backend"}),
    configuration=_STORED,
    root_id=_TEXT,
    not_before=_INT,
    epoch=_INT,
    backend=_BACKEND,
)
_HISTORY = _record(
    m.HistoryEntry, index=_INT, at=_INT, kind=_TEXT, active_root_id=_optional(_TEXT), configuration=_STORED
)
_REQUEST = _record(m.RequestRecord, at=_INT, index=_INT, result=_TEXT)

# Operation -> shape of version 1. The leaf batch, which is the hot one, has its own below.
_OPERATIONS: dict[str, tuple[type[Any], _Shape[Any]]] = {
    "bootstrap": (
        c.Bootstrap,
        _record(c.Bootstrap, at=_INT, cluster_id=_TEXT, configuration=_STORED, sealed_hmac_key=_SEALED),
    ),
    "begin_change": (
        c.BeginChange,
        _record(
            c.BeginChange,
            frozenset({"force", "renew"}),
            request_id=_TEXT,
            at=_INT,
            expect_index=_INT,
            expect_epoch=_INT,
            configuration=_STORED,
            force=_FLAG,
            renew=_FLAG,
        ),
    ),
    "activate_root": (
        c.ActivateRoot,
        _record(
            c.ActivateRoot,
            request_id=_TEXT,
            at=_INT,
            expect_epoch=_INT,
            root=_record(c.NewRoot, frozenset({"backend"}), **_CERTIFICATE),
            retire_not_before=_optional(_INT),
        ),
    ),
    "set_configuration": (
        c.SetConfiguration,
        _record(
            c.SetConfiguration, request_id=_TEXT, at=_INT, expect_index=_INT, expect_epoch=_INT, configuration=_STORED
        ),
    ),
    "set_intermediate": (
        c.SetIntermediate,
        _record(
            c.SetIntermediate,
            request_id=_TEXT,
            at=_INT,
            expect_epoch=_INT,
            root_id=_TEXT,
            intermediates=_many(_TEXT),
            signing_key_id=_TEXT,
            retire_not_before=_INT,
            backend=_BACKEND,
        ),
    ),
    "abort_change": (
        c.AbortChange,
        _record(
            c.AbortChange,
            frozenset({"kind", "retire_not_before"}),
            request_id=_TEXT,
            at=_INT,
            reason=_TEXT,
            kind=_TEXT,
            retire_not_before=_optional(_INT),
        ),
    ),
    "provider_retired": (
        c.ProviderRetired,
        _record(c.ProviderRetired, frozenset({"request_id"}), at=_INT, root_id=_TEXT, epoch=_INT, request_id=_TEXT),
    ),
    "prune_roots": (c.PruneRoots, _record(c.PruneRoots, at=_INT, expect_epoch=_INT, root_ids=_many(_TEXT))),
    "record_serials": (
        c.RecordSerials,
        _record(
            c.RecordSerials,
            at=_INT,
            serials=_many(_tuple_of(_INT, _INT, _SERIAL)),
            restored_index=_INT,
        ),
    ),
    "expire_leaves": (c.ExpireLeaves, _record(c.ExpireLeaves, at=_INT)),
    "restore_chunk": (
        c.RestoreChunk,
        _record(c.RestoreChunk, request_id=_TEXT, at=_INT, number=_INT, piece=_TEXT, key_ids=_many(_TEXT)),
    ),
    "restore_commit": (
        c.RestoreCommit,
        _record(c.RestoreCommit, request_id=_TEXT, at=_INT, pieces=_INT, digest=_TEXT),
    ),
    "restore_abort": (c.RestoreAbort, _record(c.RestoreAbort, request_id=_TEXT, at=_INT)),
    "reseal": (c.Reseal, _record(c.Reseal, at=_INT, expect_index=_INT, values=_many(_tuple_of(_TEXT, _SEALED)))),
}


def _pack_leaves(command: c.IssueLeaves) -> list[Any]:
    """Instants of an order are packed as distances from ``at``."""
    at = command.at
    return [*_BATCH.pack((at, command.root_id, command.ca_epoch)), [_pack_order(order, at) for order in command.orders]]


def _pack_order(order: c.LeafOrder, at: int) -> list[Any]:
    serial = None if order.serial is None else format(order.serial, "x")
    return _checked_order([order.issue_id, order.service, serial, order.not_before - at, order.not_after - at])


def _unpack_leaves(value: Any) -> c.IssueLeaves:
    *batch, orders = value
    at, root_id, ca_epoch = _BATCH.unpack(batch)
    return c.IssueLeaves(at, root_id, ca_epoch, tuple([_unpack_order(each, at) for each in orders]))


def _unpack_order(value: Any, at: int) -> c.LeafOrder:
    issue_id, service, serial, not_before, not_after = _checked_order(value)
    return c.LeafOrder(issue_id, service, None if serial is None else int(serial, 16), not_before + at, not_after + at)


def _checked_order(order: Any) -> list[Any]:
    issue_id, service, serial, not_before, not_after = order
    texts = type(issue_id) is str and type(service) is str and (serial is None or type(serial) is str)
    if not (texts and type(not_before) is int and type(not_after) is int and type(order) is list):
        raise ValueError("a leaf order has members of other types")
    return order


_BATCH = _tuple_of(_INT, _TEXT, _INT)
_OPERATIONS |= acl_codec.OPERATIONS
_OPERATIONS["issue_leaves"] = (c.IssueLeaves, _Shape(_pack_leaves, _unpack_leaves))
_NAMES = {kind: operation for operation, (kind, _) in _OPERATIONS.items()}


def encode_command(command: c.Command) -> bytes:
    """Bytes of a command."""
    operation = _NAMES[type(command)]
    return _dumps([operation, _COMMAND_VERSION, _OPERATIONS[operation][1].pack(command)]).encode()


def decode_command(data: bytes) -> c.Command:
    """The command in ``data``; Corrupt if it is none, or of an operation or version that this build does not know."""
    operation, version, body = _opened(
        "a log entry", data, _tuple_of(_TEXT, _INT, _Shape(lambda it: it, lambda it: it))
    )
    if operation not in _OPERATIONS or version != _COMMAND_VERSION:
        raise Corrupt(
            f'the log holds the command "{operation}" version {version}, this build knows '
            f"{', '.join(sorted(_OPERATIONS))} version {_COMMAND_VERSION}; run the caserver version that wrote it"
        )
    command: c.Command = _fitting(f'the command "{operation}"', _OPERATIONS[operation][1], body)
    return command


_HEADER = _record(
    m.CAState,
    frozenset({"epoch_given"}),
    cluster_id=_optional(_TEXT),
    founding_id=_optional(_TEXT),
    restored_index=_INT,
    index=_INT,
    ca_epoch=_INT,
    sealed_hmac_key=_optional(_SEALED),
    configuration=_optional(_CONFIGURATION),
    roots=_many(_ROOT),
    roots_index=_INT,
    change=_optional(_CHANGE),
    retiring=_many(_RETIRING),
    history=_many(_HISTORY),
    requests=_sorted_map(_TEXT, _REQUEST),
    epoch_given=_INT,
)
_ROW = _row_of(
    m.LedgerRow,
    issue_id=_TEXT,
    root_id=_TEXT,
    service=_TEXT,
    serial=_optional(_SERIAL),
    not_before=_INT,
    not_after=_INT,
    index=_INT,
)
_USE = _row_of(m.ServiceUse, count=_INT, latest_not_after=_INT, last_serial=_optional(_SERIAL))
_READING = _record(m.Reading, lines=_INT, head=_TEXT, acl=_many(_TEXT), ended=_FLAG)
_RESTORING = _record(
    m.Restoring, request_id=_TEXT, at=_INT, pieces=_INT, digest=_TEXT, key_ids=_many(_TEXT), tail=_TEXT
)
_RESTORING_LINE = _tuple_of(_RESTORING, _READING, _INT)
_RESTORING_MARK, _END = b'["restoring",', b'["end",'
_ACL_MARKS = tuple(f'["{kind}",'.encode() for kind in sorted(acl_codec.LINE_KINDS))
_CUT_SHORT = "the snapshot is cut short; remove this node's data directory and let it rejoin the others"
_HOUR_LINE = _tuple_of(_INT, _INT, _INT, _many(_tuple_of(_INT, _ROW)))
_LINE = _tuple_of(_TEXT, _exactly(list))
_USES_LINE = _many(_tuple_of(_TEXT, _TEXT, _USE))


def encode_state(state: m.CAState) -> Iterator[bytes]:
    """Bytes of ``state`` in slices of a few milliseconds' work each, ASCII; some slices are empty."""
    lines = 2
    yield _line([_STATE_FORMAT, _STATE_VERSION, state.ledger.max_rows])
    yield _line(_HEADER.pack(state))
    for kind, body in acl_codec.lines(state.acl):
        lines += 1
        yield _line([kind, body])
    for line in _ledger_lines(state.ledger):
        lines += bool(line)
        yield line
    if state.restoring is not None:
        for line in _restoring_lines(state.restoring):
            lines += bool(line)
            yield line
    yield _line(["end", lines])


def decode_state(data: bytes) -> m.CAState:
    """The state in ``data``; Corrupt if it cannot be read whole."""
    *lines, tail = data.split(b"\n")
    if tail:
        raise Corrupt(_CUT_SHORT)
    place = next((at for at, line in enumerate(lines) if line.startswith(_RESTORING_MARK)), None)
    if place is None:
        return state_of(read_on(m.Reading(), lines))
    reading = read_on(m.Reading(), lines[:place])
    reading = read_on(replace(reading, lines=len(lines) - 1), lines[-1:])
    return replace(state_of(reading), restoring=_read_restoring(lines[place:-1]))


def read_on(reading: m.Reading, lines: Sequence[bytes]) -> m.Reading:
    """The reading after some more lines of an encoded state; Corrupt if they cannot be such."""
    if not lines:
        return reading
    if reading.ended:
        raise Corrupt("a snapshot goes on behind its end")
    waiting, ledger, head = list(lines), reading.ledger, reading.head
    if reading.lines == 0:
        ledger = replace(ledger, max_rows=_read_format(waiting.pop(0)))
    if reading.lines <= 1 and waiting:
        head = waiting.pop(0).decode("ascii", "replace")
    total = reading.lines + len(lines)
    ended = bool(waiting) and waiting[-1].startswith(_END)
    if ended and waiting.pop() != _line(["end", total - 1]).rstrip():
        raise Corrupt(_CUT_SHORT)
    acl = tuple(line.decode("ascii", "replace") for line in waiting if line.startswith(_ACL_MARKS))
    more = _read_ledger(line for line in waiting if not line.startswith(_ACL_MARKS))
    ledger = _checked("a snapshot", lambda: merged(ledger, more))
    return m.Reading(lines=total, head=head, acl=reading.acl + acl, ledger=ledger, ended=ended)


def state_of(reading: m.Reading) -> m.CAState:
    """The state that was read; Corrupt if it is not whole."""
    if not reading.ended:
        raise Corrupt(_CUT_SHORT)
    state = _opened("the head of a snapshot", reading.head.encode(), _HEADER)
    acl = [_opened("a line of a snapshot", line.encode(), _LINE) for line in reading.acl]
    return replace(
        state,
        ledger=reading.ledger,
        acl=_checked("the tokens and policies of a snapshot", lambda: acl_codec.read_lines(acl)),
    )


def _read_format(line: bytes) -> int:
    """The bound of the ledger; Corrupt if this build does not read what follows."""
    name, version, max_rows = _opened("a snapshot", line, _tuple_of(_TEXT, _INT, _INT))
    if name != _STATE_FORMAT or version != _STATE_VERSION:
        raise Corrupt(
            f'the snapshot is "{name}" version {version}, this build reads "{_STATE_FORMAT}" '
            f"version {_STATE_VERSION}; run the caserver version that wrote it"
        )
    found: int = max_rows
    return found


def _restoring_lines(restoring: m.Restoring) -> Iterator[bytes]:
    """What is being brought in: a line of its own, then its ledger as far as it has come."""
    ledger = restoring.reading.ledger
    yield _line(["restoring", [_RESTORING.pack(restoring), _READING.pack(restoring.reading), ledger.max_rows]])
    yield from _ledger_lines(ledger)


def _read_restoring(lines: Sequence[bytes]) -> m.Restoring:
    _, body = _opened("a line of a snapshot", lines[0], _LINE)
    restoring: m.Restoring
    restoring, reading, max_rows = _fitting("what is being restored", _RESTORING_LINE, body)
    ledger = replace(_read_ledger(lines[1:]), max_rows=max_rows)
    return replace(restoring, reading=replace(reading, ledger=ledger))


def _ledger_lines(ledger: m.Ledger) -> Iterator[bytes]:
    for hour in sorted(ledger.hours):
        within = ledger.hours[hour]
        numbers = iter(range(within.first, within.next))
        packed = [hour, within.first, within.next]
        some = list(islice(numbers, _ROWS_PER_SLICE))
        yield _line(["hour", [*packed, _packed_rows(within, some)]])
        while some := list(islice(numbers, _ROWS_PER_SLICE)):
            yield _line(["hour", [*packed, _packed_rows(within, some)]])
    yield from _uses_lines(ledger)


def _packed_rows(within: m.LedgerHour, numbers: Iterable[int]) -> list[Any]:
    rows = within.rows
    return [[number, _ROW.pack(rows[number])] for number in numbers if number in rows]


def _uses_lines(ledger: m.Ledger) -> Iterator[bytes]:
    """Totals by root and service in buckets: sorting all at once would hold the Raft loop up."""
    buckets: list[list[tuple[m.RootID, str]]] = [[] for _ in range(len(ledger.uses) // _USES_PER_BUCKET + 1)]
    for position, key in enumerate(ledger.uses):
        buckets[zlib.crc32("\0".join(key).encode("utf-8", "surrogatepass")) % len(buckets)].append(key)
        if position % _ROWS_PER_SLICE == 0:
            yield b""
    for bucket in buckets:
        yield _line(["uses", [[*key, _USE.pack(ledger.uses[key])] for key in sorted(bucket)]])


def _read_ledger(lines: Iterable[bytes]) -> m.Ledger:
    hours: dict[int, tuple[int, int, dict[int, m.LedgerRow]]] = {}
    uses: dict[tuple[m.RootID, str], m.ServiceUse] = {}
    for line in lines:
        kind, body = _opened("a line of a snapshot", line, _LINE)
        if kind == "hour":
            hour, first, following, rows = _fitting("an hour of a snapshot", _HOUR_LINE, body)
            hours.setdefault(hour, (first, following, {}))[2].update(rows)
        elif kind == "uses":
            found = _fitting("totals of a snapshot", _USES_LINE, body)
            uses.update({(root_id, service): use for root_id, service, use in found})
        else:
            raise Corrupt(f'the snapshot holds a line of unknown kind "{kind}"')
    return m.Ledger(
        hours=Map(
            {hour: m.LedgerHour(first, following, Map(rows)) for hour, (first, following, rows) in hours.items()}
        ),
        row_count=sum(len(rows) for _, _, rows in hours.values()),
        uses=Map(uses),
        uses_by_expiry=by_expiry(Map(uses)),
    )


def _line(value: Any) -> bytes:
    return _dumps(value).encode() + b"\n"


def _opened(what: str, data: bytes, shape: _Shape[T]) -> T:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as exc:
        raise Corrupt(f"{what} is not JSON of ours: {type(exc).__name__}") from exc
    return _fitting(what, shape, value)


def _fitting(what: str, shape: _Shape[T], value: Any) -> T:
    return _checked(what, lambda: shape.unpack(value))


def _checked(what: str, unpack: Callable[[], T]) -> T:
    try:
        return unpack()
    except (ValueError, TypeError, RecursionError, binascii.Error) as exc:
        raise Corrupt(f"{what} does not have the expected shape: {exc}") from exc
