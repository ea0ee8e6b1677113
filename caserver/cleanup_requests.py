"""What operators ask of the clean-ups that are owed at former CA providers, and what the leader answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, assert_never

from caserver.errors import InvalidRequest
from caserver.state.shapes import INT, TEXT, many, record


@dataclass(frozen=True, slots=True)
class ReadCleanups:
    """Ask what is still owed."""


@dataclass(frozen=True, slots=True)
class ForgetCleanup:
    """Give up one of them; what it would have removed stays where it is."""

    cleanup_id: str


CleanupRequest = ReadCleanups | ForgetCleanup


@dataclass(frozen=True, slots=True)
class OwedCleanup:
    """One clean-up that is owed: at which backend, what it would remove there, and why it is not done."""

    id: str
    provider: str
    address: str  # empty, like what follows, where a provider has no backend
    namespace: str
    path: str
    left: tuple[str, ...]  # in words; nobody looked whether it is there
    not_before: int  # instant before which nothing is removed
    reason: str  # why the latest try failed; empty: none did since this leader leads


@dataclass(frozen=True, slots=True)
class CleanupsRead:
    """Every clean-up that is owed, in the order in which they came to be."""

    cleanups: tuple[OwedCleanup, ...]


@dataclass(frozen=True, slots=True)
class CleanupForgotten:
    """It is given up as of ``index``."""

    index: int


CleanupAnswer = CleanupsRead | CleanupForgotten

REQUESTS: dict[str, type[CleanupRequest]] = {"read_cleanups": ReadCleanups, "forget_cleanup": ForgetCleanup}
_OWED = many(
    record(
        OwedCleanup,
        id=TEXT,
        provider=TEXT,
        address=TEXT,
        namespace=TEXT,
        path=TEXT,
        left=many(TEXT),
        not_before=INT,
        reason=TEXT,
    )
)


def decode_cleanup(kind: type[CleanupRequest], arguments: dict[str, Any]) -> CleanupRequest:
    """The request with these arguments; InvalidRequest if one is missing, foreign or of another type."""
    match arguments:
        case {"cleanup_id": str(cleanup_id), **rest} if kind is ForgetCleanup and not rest:
            return ForgetCleanup(cleanup_id)
        case {**rest} if kind is ReadCleanups and not rest:
            return ReadCleanups()
        case _:
            raise InvalidRequest("an internal request has other arguments than this version knows")


def encode_cleanup_answer(answer: CleanupAnswer) -> dict[str, Any]:
    """The member of an answer frame."""
    match answer:
        case CleanupsRead(cleanups=cleanups):
            return {"cleanups": _OWED.pack(cleanups)}
        case CleanupForgotten(index=index):
            return {"forgotten_at": index}
        case _:
            assert_never(answer)


def decode_cleanup_answer(document: dict[str, Any]) -> CleanupAnswer | None:
    """Inverse of ``encode_cleanup_answer``; None if the frame holds something else, InvalidRequest if it is damaged."""
    try:
        if "cleanups" in document:
            return CleanupsRead(_OWED.unpack(document["cleanups"]))
        if "forgotten_at" in document:
            return CleanupForgotten(INT.unpack(document["forgotten_at"]))
    except (ValueError, TypeError) as exc:
        raise InvalidRequest("an internal answer holds a clean-up that cannot be read") from exc
    return None
