"""Which nodes belong together: the hello that opens every link, and what must agree in it.

Membership is static. Two nodes that hold different lists of names, different generations of the cluster or different
cluster ids never talk: letting lists that are "one apart" talk elects two leaders. Addresses are no part of it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass

from caserver.environment import release
from caserver.errors import Corrupt

PROTOCOL = 1  # of the messages between nodes; raised when an older node could misread them
# Kinds of Raft messages that came after the first release: sent only to a node whose hello names them.
LATER_KINDS = ("keys",)
FIRST_GENERATION = "0"  # later ones are made by `caserver operator recover import`: number and hash of the state
HELLO_BYTES_MAX = 4096
_TEXT_MAX = 512
_KINDS_MAX = 64


@dataclass(frozen=True, slots=True)
class Hello:
    """What a node says of itself before anything else."""

    protocol: int
    node: str
    to: str  # the node that it means to speak to
    names: str  # digest of its list of nodes
    generation: str | None  # None: a learner that lost its data and has not met its cluster yet
    cluster_id: str | None  # None until the first Bootstrap is applied
    kinds: tuple[str, ...] = ()  # the later kinds of messages that it reads
    release: str | None = None  # of caserver; for operators to read

    def encode(self) -> bytes:
        """A JSON object; readers ignore fields that they do not know, so that later versions can add some."""
        return json.dumps(asdict(self), separators=(",", ":")).encode()

    @classmethod
    def decode(cls, payload: bytes) -> Hello:
        """Read what ``encode`` made; ValueError for anything else."""
        try:
            given = json.loads(payload)
        except RecursionError as exc:
            raise ValueError("a hello nested too deeply") from exc
        if type(given) is not dict or type(given.get("protocol")) is not int:
            raise ValueError("a hello without a protocol number")
        return cls(
            protocol=given["protocol"],
            node=_text(given.get("node")),
            to=_text(given.get("to")),
            names=_text(given.get("names")),
            generation=_text_or_none(given.get("generation")),
            cluster_id=_text_or_none(given.get("cluster_id")),
            kinds=_texts(given.get("kinds", [])),
            release=_text_or_none(given.get("release")),
        )


def _text(given: object) -> str:
    if type(given) is not str or not 0 < len(given) <= _TEXT_MAX:
        raise ValueError("a hello with a field missing or too long")
    return given


def _texts(given: object) -> tuple[str, ...]:
    if type(given) is not list or len(given) > _KINDS_MAX:
        raise ValueError("a hello with a list that is none, or too long")
    return tuple(_text(each) for each in given)


def _text_or_none(given: object) -> str | None:
    return None if given is None else _text(given)


def generation_number(generation: str) -> int:
    """How many imports made ``generation``; ValueError if it is not one."""
    number, _, content = generation.partition(":")
    if not number.isascii() or not number.isdigit() or (int(number) > 0) != bool(content):
        raise ValueError(f"{generation[:80]!r} is not a generation")
    return int(number)


def next_generation(generation: str, content: bytes) -> str:
    """The generation after ``generation`` that begins with ``content``: two imports of different content never meet."""
    return f"{generation_number(generation) + 1}:{hashlib.sha256(content).hexdigest()}"


def names_digest(names: Collection[str]) -> str:
    """SHA-256 (hex) of the sorted node names; the same on all nodes of one cluster."""
    return hashlib.sha256(json.dumps(sorted(set(names))).encode()).hexdigest()


class Membership:
    """The cluster that this node belongs to; lives on the Raft thread."""

    def __init__(
        self,
        names: Collection[str],
        generation: str | None = FIRST_GENERATION,
        *,
        cluster_id: str | None = None,
        learned: Callable[[str], None] | None = None,
    ) -> None:
        """``generation`` is None for a learner that lost it; ``learned`` is told the one that it then takes on."""
        self.names = frozenset(names)
        self.digest = names_digest(names)
        self._generation = generation
        self._cluster_id = cluster_id
        self._learned = learned
        self._release = release()

    @property
    def generation(self) -> str | None:
        """Which of the clusters of these names this node belongs to."""
        return self._generation

    @property
    def cluster_id(self) -> str | None:
        """Id of the cluster once its first Bootstrap was applied here."""
        return self._cluster_id

    def adopt(self, cluster_id: str) -> None:
        """Take the id that was just applied; Corrupt if this node already belongs to another cluster."""
        if self._cluster_id not in {None, cluster_id}:
            raise Corrupt(
                f"this node belongs to cluster {self._cluster_id} and was handed the state of cluster {cluster_id}; "
                f"two clusters share a cluster_secret and node names: correct the `peer` addresses"
            )
        self._cluster_id = cluster_id

    def hello(self, node: str, *, to: str) -> Hello:
        """What ``node``, this one, says to another."""
        return Hello(
            protocol=PROTOCOL,
            node=node,
            to=to,
            names=self.digest,
            generation=self._generation,
            cluster_id=self._cluster_id,
            kinds=LATER_KINDS,
            release=self._release,
        )

    def check(self, hello: Hello) -> str | None:
        """Why the sender of ``hello`` does not belong with this node, as a sentence for an operator; None if it does."""
        if hello.protocol != PROTOCOL:
            return (
                f"it speaks protocol {hello.protocol}, this node {PROTOCOL}: run the same release of caserver on both"
            )
        if hello.names != self.digest:
            return (
                f"its list of nodes (digest {hello.names[:12]}) is not this node's (digest {self.digest[:12]}): write "
                "the same `peer` names on every node; a cluster grows and shrinks by `caserver operator recover`"
            )
        if _differ(hello.generation, self._generation):
            return (
                f"it is of generation {hello.generation}, this node of generation {self._generation}: one of the two "
                "missed a `caserver operator recover import` (run it there with the same exports), or lost its data "
                "(start it with -rejoin)"
            )
        if _differ(hello.cluster_id, self._cluster_id):
            return (
                f"it belongs to cluster {hello.cluster_id}, this node to cluster {self._cluster_id}: "
                "correct the `peer` addresses, and give each cluster a cluster_secret of its own"
            )
        return None

    def meet(self, hello: Hello) -> None:
        """A node that belongs here said hello: a learner that lost its generation takes on the node's."""
        if self._generation is None and hello.generation is not None:
            if self._learned is not None:
                self._learned(hello.generation)
            self._generation = hello.generation


def _differ(theirs: str | None, ours: str | None) -> bool:
    return theirs is not None and ours is not None and theirs != ours
