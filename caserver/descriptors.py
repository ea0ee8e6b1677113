"""How many files and connections this process may hold, and who may hold how many of them.

Clients whom nobody knows must never take the last descriptor: the log needs one for each snapshot, and its peers theirs.
"""

from __future__ import annotations

import resource
from dataclasses import dataclass

import structlog

PUBLIC_MAX = 8192  # of all public listeners together; what more connections cost is memory
PER_PEER_MAX = 256
FEW = 512  # a limit below this leaves little for clients
_PER_PEER_MIN = 8
_UNLIMITED = 1 << 20

_log = structlog.get_logger("caserver.agent")


@dataclass(frozen=True, slots=True)
class Shares:
    """What is for whom; at least a quarter of all is left for the log, its links and the files."""

    per_listener: int  # connections to one public listener
    per_peer: int  # internal connections from one peer, and as many to it

    @classmethod
    def of(cls, limit: int, *, listeners: int, peers: int) -> Shares:
        """Divide ``limit`` descriptors: half for clients, a quarter for the hops between nodes."""
        return cls(
            per_listener=max(1, min(limit // 2, PUBLIC_MAX) // max(1, listeners)),
            per_peer=max(_PER_PEER_MIN, min(limit // 8 // max(1, peers), PER_PEER_MAX)),
        )


def raise_limit() -> int:
    """Take as many descriptors as the system grants this process; how many that are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (ValueError, OSError) as exc:  # "unlimited" may be more than the kernel has
            _log.warning("the limit of open files stays as it is", limit=soft, reason=str(exc))
    limit = _UNLIMITED if soft == resource.RLIM_INFINITY else soft
    if limit < FEW:
        _log.warning("few files may be open, so few clients are served at a time: raise `ulimit -n`", limit=limit)
    return limit
