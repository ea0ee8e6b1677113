"""Requests that change something carry an id, so that a retry finds its first effect instead of having another one."""

from __future__ import annotations

from immutables import Map

from caserver.state.commands import Reason, Refused
from caserver.state.ledger import without
from caserver.state.lifecycle import earlier
from caserver.state.model import REQUEST_IDS_KEPT, CAState, Index, RequestRecord


def next_index(state: CAState) -> Index:
    """The index of what is applied next."""
    return Index(state.index + 1)


def refuse_duplicate(state: CAState, request_id: str) -> Refused | None:
    """The refusal of a request without an id, or of one that was applied before; None if it is new."""
    if not request_id:
        return Refused(Reason.INVALID, "the request has no id")
    record = state.requests.get(request_id)
    if record is None:
        return None
    return Refused(Reason.DUPLICATE_REQUEST, f"{record.result} at index {record.index}", record)


def with_request(state: CAState, request_id: str, record: RequestRecord) -> Map[str, RequestRecord]:
    """The known requests with one more, without those of long ago."""
    return recent(state.requests, record.at).set(request_id, record)


def recent(requests: Map[str, RequestRecord], now: int) -> Map[str, RequestRecord]:
    """The requests that are still remembered at ``now``.

    A call is held for a minute at most. Ten minutes by a clock that was set forward meanwhile may be less than that, but
    nobody makes ``REQUEST_IDS_MIN`` other changes in it.
    """
    return without(requests, [key for key in earlier(requests) if requests[key].at + REQUEST_IDS_KEPT < now])
