"""Every metric by name, what is measured on the way, and Prometheus' text form.

Names are Consul's where Consul has the metric, else they begin with ``caserver.``. What a module counts it keeps in plain
numbers of its own; they become readings only when somebody asks, so that counting costs next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Kind(StrEnum):
    """How a metric moves."""

    GAUGE = "gauge"  # the value now
    COUNTER = "counter"  # how often since the start
    SAMPLE = "summary"  # durations in milliseconds


@dataclass(frozen=True, slots=True)
class Metric:
    """One name."""

    name: str
    kind: Kind
    meaning: str
    labels: tuple[str, ...] = ()

    @property
    def prometheus_name(self) -> str:
        """The name as Prometheus takes it."""
        return self.name.replace(".", "_").replace("-", "_")


def _gauge(name: str, meaning: str, *labels: str) -> Metric:
    return Metric(name, Kind.GAUGE, meaning, labels)


def _counter(name: str, meaning: str, *labels: str) -> Metric:
    return Metric(name, Kind.COUNTER, meaning, labels)


def _sample(name: str, meaning: str, *labels: str) -> Metric:
    return Metric(name, Kind.SAMPLE, meaning, labels)


ROOT_EXPIRY = _gauge("consul.mesh.active-root-ca.expiry", "seconds until the active root expires")
SIGNING_EXPIRY = _gauge(
    "consul.mesh.active-signing-ca.expiry", "seconds until the certificate that signs leaves expires"
)
TOKEN_EXPIRY = _gauge(
    "caserver.provider.token_expiry", "seconds until the token of the CA provider expires, on the leader"
)
DEGRADED = _gauge("caserver.degraded", "1 for each thing that is amiss with the CA as this node sees it", "code")
TLS_EXPIRY = _gauge("consul.agent.tls.cert.expiry", "seconds until the certificate of HTTPS on this node expires")
LEDGER_LEAVES = _gauge("caserver.ledger.leaves", "single leaves kept in the ledger")
LEAVES_SIGNED = _counter("caserver.leaves.signed", "leaves signed by this node while it led")
CSR_REFUSED = _counter("caserver.csr.refused", "signing requests that this node refused while it led", "reason")
CACHE_ENTRIES = _gauge("consul.cache.entries_count", "leaves cached on this node")

HTTP_REQUESTS = _counter("caserver.http.requests", "answered requests", "path", "method", "status")
HTTP_BLOCKED = _gauge("caserver.http.blocked_queries", "blocking queries that wait on this node")

AUTOPILOT_HEALTHY = _gauge("consul.autopilot.healthy", "1 if all servers are well, on the leader")
FAILURE_TOLERANCE = _gauge("consul.autopilot.failure_tolerance", "servers that may still be lost, on the leader")
IS_LEADER = _gauge("consul.server.isLeader", "1 on the leader, 0 elsewhere")
TERM = _gauge("caserver.raft.term", "Raft term")
VOTER = _gauge("caserver.raft.voter", "1 if this node has a vote")
LAST_INDEX = _gauge("consul.raft.last_index", "last entry of this node's log")
COMMIT_INDEX = _gauge("consul.raft.commit_index", "last entry known to be committed")
APPLIED_INDEX = _gauge("consul.raft.applied_index", "last entry applied")
QUEUE = _gauge("caserver.raft.queue", "proposals and consistent reads under way on this node")
LEADER_CONTACT = _gauge("caserver.raft.leader_contact", "milliseconds since the leader was heard; 0 on the leader")
CAMPAIGNS = _counter("consul.raft.state.candidate", "elections that this node stood for")
WINS = _counter("consul.raft.state.leader", "elections that this node won")
LEADER_CHANGES = _counter("caserver.raft.leader_changes", "times that another leader became known")
COMMIT_TIME = _sample("consul.raft.commitTime", "from proposal to commit, on the leader")
APPLY_TIME = _sample("consul.raft.fsm.apply", "applying one command")
FSYNC_TIME = _sample("caserver.raft.fsync", "making the journal durable")
PEER_CONNECTED = _gauge("caserver.raft.peer.connected", "1 if the link to the peer is up", "peer")
PEER_CONTACT = _gauge("caserver.raft.peer.contact", "milliseconds since the peer was heard", "peer")
PEER_LAG = _gauge("caserver.raft.peer.lag", "entries that the peer lacks, on the leader", "peer")
REFUSED_MESSAGES = _counter("caserver.raft.refused", "messages of peers that broke a rule", "rule")
LINK_EVENTS = _counter("caserver.raft.links", "refusals and failures of connections between nodes", "event")

METRICS: tuple[Metric, ...] = tuple(each for each in globals().values() if isinstance(each, Metric))


@dataclass(frozen=True, slots=True)
class Totals:
    """What was measured, since the start; ``low`` and ``high`` since the last restart of the interval."""

    count: int = 0
    total: float = 0.0
    squares: float = 0.0
    low: float = 0.0
    high: float = 0.0

    def since(self, earlier: Totals) -> Totals:
        """What came after ``earlier``."""
        return Totals(
            self.count - earlier.count, self.total - earlier.total, self.squares - earlier.squares, self.low, self.high
        )

    @property
    def mean(self) -> float:
        """0 for nothing."""
        return self.total / self.count if self.count else 0.0

    @property
    def deviation(self) -> float:
        """Standard deviation of the samples; 0 for fewer than two."""
        if self.count <= 1:
            return 0.0
        return float(max(0.0, (self.squares - self.total * self.mean) / (self.count - 1)) ** 0.5)


class Summary:
    """Adds up measurements, in one thread."""

    __slots__ = ("_count", "_high", "_low", "_squares", "_total")

    def __init__(self) -> None:
        self._count = 0
        self._total = self._squares = 0.0
        self._low, self._high = float("inf"), 0.0

    def add(self, value: float) -> None:
        """One measurement, not negative."""
        self._count += 1
        self._total += value
        self._squares += value * value
        self._low = min(self._low, value)
        self._high = max(self._high, value)

    def read(self, *, restart: bool = False) -> Totals:
        """All so far; with ``restart`` the extremes begin anew afterwards."""
        low = 0.0 if self._low == float("inf") else self._low
        totals = Totals(self._count, self._total, self._squares, low, self._high)
        if restart:
            self._low, self._high = float("inf"), 0.0
        return totals


@dataclass(frozen=True, slots=True)
class Reading:
    """One value of a metric: a number, or ``Totals`` of a sample."""

    metric: Metric
    value: float | Totals
    labels: Mapping[str, str] = field(default_factory=dict)


def readings_of(metric: Metric, counts: Mapping[str, float]) -> list[Reading]:
    """A reading for each key, which is the value of the metric's one label."""
    (label,) = metric.labels
    return [Reading(metric, value, {label: key}) for key, value in sorted(counts.items())]


def prometheus(readings: Iterable[Reading]) -> str:
    """The readings in Prometheus' text format 0.0.4."""
    lines: list[str] = []
    told: set[str] = set()
    for reading in sorted(readings, key=lambda each: METRICS.index(each.metric)):
        metric, name = reading.metric, reading.metric.prometheus_name
        if name not in told:
            told.add(name)
            lines += [f"# HELP {name} {metric.meaning}", f"# TYPE {name} {metric.kind.value}"]
        if isinstance(reading.value, Totals):
            lines.append(f"{name}_sum{_labels(reading)} {reading.value.total:.9g}")
            lines.append(f"{name}_count{_labels(reading)} {reading.value.count}")
        else:
            lines.append(f"{name}{_labels(reading)} {_number(reading.value)}")
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else f"{value:.9g}"


def _labels(reading: Reading) -> str:
    if not reading.labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in reading.labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
