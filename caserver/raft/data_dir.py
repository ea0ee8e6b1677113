"""What a data directory says about itself before anything in it is used: ``node.json``, and what must lie beside it.

The marker names the node, its cluster and whether this node ever was a voter. A voter that lost its log has forgotten
votes and acknowledged entries and must not take part as if nothing had happened; so every combination of files that a
running node does not leave behind is refused, with what to do. ``-rejoin`` is the operator's word that this node's log is
gone: it starts over as a learner, which counts for nothing until the others have promoted it. An intact directory is
never touched by it.

In order: lock, marker, rules; then snapshot, journal and their agreement (``load``).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import structlog

from caserver.errors import Corrupt
from caserver.internode.membership import FIRST_GENERATION, Membership, names_digest
from caserver.raft import snapshot_file
from caserver.raft.journal import JOURNAL_FILE, Damaged, Entry, Journal, replace_file
from caserver.raft.ports import Disk
from caserver.raft.seam import FIRST_INDEX
from caserver.raft.snapshot_file import SNAPSHOT_FILE

MARKER_FILE = "node.json"
FORMAT = 1
_OLD = ".old"  # where -rejoin puts what it finds
_KEPT = (MARKER_FILE, JOURNAL_FILE, SNAPSHOT_FILE)
DATA_FILES = frozenset(_KEPT + tuple(name + _OLD for name in _KEPT))  # all that may hold something of a cluster
_REMEDY = (
    "give the node its old data directory back, or, if that is lost, start it with -rejoin while a majority of the "
    "other nodes is up"
)

_ALONE = (  # -rejoin would make a second CA under the name of the first
    "restore data_dir from a backup; or, if a new CA may take the place of the one that is lost, empty it and start "
    "without -rejoin"
)

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Marker:
    """The content of ``node.json``."""

    node: str
    names: str  # digest of the list of nodes
    members: tuple[str, ...] = ()  # that list, sorted; empty if it was written by a release that did not keep it
    generation: str | None = FIRST_GENERATION  # None: a learner that has not met its cluster yet
    initialised: bool = False  # it may have voted or acknowledged entries
    rejoining: bool = False  # a learner: it lost its log, and is not promoted yet
    cluster_id: str | None = None  # of the first Bootstrap that was applied here
    importing: bool = False  # `recover import` is at work, or was interrupted
    origin: int = FIRST_INDEX  # last index that the log began with; higher if an import made it

    @classmethod
    def of(cls, node: str, names: Collection[str]) -> Marker:
        """The marker of a new node."""
        return cls(node=node, names=names_digest(names), members=tuple(sorted(set(names))))

    @property
    def alone(self) -> bool:
        """Whether there are no other nodes; False if the marker does not tell."""
        return self.members == (self.node,)

    @property
    def imported(self) -> bool:
        """Whether its log began with an import."""
        return self.origin > FIRST_INDEX

    def encode(self) -> bytes:
        """JSON for people as well."""
        return json.dumps({"format": FORMAT, **asdict(self)}, indent=2).encode() + b"\n"

    @classmethod
    def decode(cls, content: bytes) -> Marker:
        """Read what ``encode`` made; ValueError for anything else, Corrupt for a later format."""
        given = json.loads(content)
        if type(given) is not dict or type(given.get("format")) is not int:
            raise ValueError("not a marker")
        if given.pop("format") > FORMAT:
            raise Corrupt(f"{MARKER_FILE} was written by a later release of caserver: use that one, or a newer one")
        members = given.pop("members", [])
        if type(members) is not list:
            raise ValueError("not a marker")
        try:
            marker = cls(**given, members=tuple(members))
        except TypeError as exc:
            raise ValueError("not a marker") from exc
        if type(marker.origin) is not int:
            raise ValueError("not a marker")
        flags = (marker.initialised, marker.rejoining, marker.importing)
        texts, optional = (marker.node, marker.names, *marker.members), (marker.generation, marker.cluster_id)
        if {type(each) for each in flags} != {bool} or {type(each) for each in texts} != {str}:
            raise ValueError("not a marker")
        if not {type(each) for each in optional} <= {str, type(None)}:
            raise ValueError("not a marker")
        return marker


class DataDir:
    """An opened, locked data directory; lives on the Raft thread. Make one with ``open``."""

    def __init__(self, disk: Disk, marker: Marker, names: Collection[str]) -> None:
        self._disk = disk
        self._marker = marker
        self._names = frozenset(names)

    @classmethod
    def open(cls, disk: Disk, *, node: str, names: Collection[str], rejoin: bool = False) -> DataDir:
        """Lock the directory and check it against ``node`` and the ``names`` of all nodes.

        OSError if another process holds it or it cannot be read; Corrupt, with a remedy, if this node must not run on it.
        """
        disk.lock()
        found = _Found.look(disk)
        fresh = Marker.of(node, names)
        if found.marker is not None and (found.marker.initialised or found.marker.imported):
            _require_same(found.marker, fresh)
        fault = found.fault()
        alone = fresh.alone
        starts_over = fault is not None and not alone and (rejoin or found.is_learner)
        if fault is not None and not starts_over:
            raise Corrupt(f"{fault}; {found.remedy(alone=alone)}")
        if starts_over:
            _log.warning("rejoin_started_over", reason=fault)
            # Before the marker: a crash in between must not leave a learner with a log that nobody vouches for.
            _clear(disk, keep=found.marker is None or not (found.is_learner or found.marker.importing))
        marker = found.learner(fresh) if starts_over else found.carried_on(fresh, rejoin=rejoin)
        if alone and marker.rejoining:
            raise Corrupt(f"there are no other nodes to rejoin, this is a single node; {_ALONE}")
        if marker != found.marker:
            disk.replace(MARKER_FILE, marker.encode())
        return cls(disk, marker, names)

    @classmethod
    def reopen(cls, disk: Disk) -> DataDir:
        """Lock a directory that a node has run on and take it for what its marker says, without a configuration.

        OSError if another process holds it or it cannot be read; Corrupt, with a remedy, if no node may run on it.
        """
        disk.lock()
        found = _Found.look(disk)
        if (fault := found.fault()) is not None:
            raise Corrupt(f"{fault}; {found.remedy(alone=found.marker is not None and found.marker.alone)}")
        if found.marker is None:
            raise Corrupt(f"there is no {MARKER_FILE} here, no node has run on it: give the data_dir of a node")
        return cls(disk, found.marker, found.marker.members)

    def load(self, *, on_fault: Callable[[OSError], None]) -> tuple[Journal, snapshot_file.Snapshot | None]:
        """Open snapshot and journal and bring them in line; Corrupt, with a remedy, if they cannot be trusted."""
        try:
            return self._load(on_fault)
        except Damaged as exc:
            if self._marker.alone:
                raise Corrupt(f"{exc.problem}; {_ALONE}") from exc
            raise

    def _load(self, on_fault: Callable[[OSError], None]) -> tuple[Journal, snapshot_file.Snapshot | None]:
        snapshot = snapshot_file.read(self._disk)
        journal = Journal(self._disk, on_fault=on_fault)
        if journal.torn_bytes:
            _log.warning("torn_tail_cut", file=JOURNAL_FILE, bytes=journal.torn_bytes, reason="never acknowledged")
        journal.heal(None if snapshot is None else (snapshot.previous, snapshot.last))
        return journal, snapshot

    @property
    def marker(self) -> Marker:
        """What the directory says about itself."""
        return self._marker

    @property
    def initialised(self) -> bool:
        """Whether this node is a voter: it may have voted or acknowledged entries."""
        return self._marker.initialised

    @property
    def rejoining(self) -> bool:
        """Whether this node lost its log, by its operator's word, and is not promoted yet."""
        return self._marker.rejoining

    @property
    def origin(self) -> int:
        """The last index that the log began with: what follows was agreed on in this generation."""
        return self._marker.origin

    @property
    def cluster_id(self) -> str | None:
        """Id of the cluster once its first Bootstrap was applied here."""
        return self._marker.cluster_id

    def mark_initialised(self) -> None:
        """Make this node a voter, durable on return; before its first vote, answer or promotion counts. OSError."""
        if self._marker.rejoining:
            _log.info("promoted", reason="the log is caught up: this node counts again")
        self._store(replace(self._marker, initialised=True, rejoining=False))

    def mark_cluster(self, cluster_id: str) -> None:
        """Remember the cluster that this node belongs to, durable on return; Corrupt if it belongs to another. OSError."""
        if self._marker.cluster_id not in {None, cluster_id}:
            raise Corrupt(
                f"this data directory belongs to cluster {self._marker.cluster_id} and was handed the state of cluster "
                f"{cluster_id}: correct the `peer` addresses"
            )
        self._store(replace(self._marker, cluster_id=cluster_id))

    def membership(self, *, on_fault: Callable[[OSError], None] = lambda _: None) -> Membership:
        """The membership that this directory stands for; what a learner is told of its generation is stored here.

        ``on_fault`` is told if it cannot be: whoever is talking to a peer then would take that for a fault of the network.
        """

        def learned(generation: str) -> None:
            try:
                self._store(replace(self._marker, generation=generation))
            except OSError as exc:
                on_fault(exc)
                raise

        return Membership(self._names, self._marker.generation, cluster_id=self._marker.cluster_id, learned=learned)

    def _store(self, marker: Marker) -> None:
        if marker != self._marker:
            self._disk.replace(MARKER_FILE, marker.encode())
            self._marker = marker


@dataclass(frozen=True, slots=True)
class _Found:
    """What lay in the directory."""

    marker: Marker | None
    damage: str | None  # why the marker cannot be read
    has_log: bool
    has_snapshot: bool

    @classmethod
    def look(cls, disk: Disk) -> _Found:
        content, marker, damage = disk.read(MARKER_FILE), None, None
        if content is not None:
            try:
                marker = Marker.decode(content)
            except ValueError as exc:
                damage = f"{MARKER_FILE} cannot be read ({exc})"
        return cls(
            marker=marker,
            damage=damage,
            has_log=disk.read(JOURNAL_FILE) is not None,
            has_snapshot=disk.read(SNAPSHOT_FILE) is not None,
        )

    @property
    def is_learner(self) -> bool:
        """Whether it is the directory of a learner, which may start over as often as it has to."""
        return self.marker is not None and self.marker.rejoining

    def fault(self) -> str | None:
        """Why no running node leaves such a directory behind; None if one does."""
        if self.damage is not None:
            return self.damage
        if self.marker is not None and self.marker.importing:
            return "`caserver operator recover import` was interrupted here"
        if self.marker is None and (self.has_log or self.has_snapshot):
            return f"the data directory holds a log or a snapshot but no {MARKER_FILE}: nobody knows whose they are"
        if self.marker is not None and self.marker.initialised and not self.has_log:
            return (
                f"this node was a member of its cluster and its {JOURNAL_FILE} is gone: term, vote and entries are lost"
            )
        if self.has_snapshot and not self.has_log:
            return f"there is a snapshot and no {JOURNAL_FILE}: term and vote are lost"
        return None

    def remedy(self, *, alone: bool) -> str:
        """What to do about the fault; ``alone`` if there are no other nodes."""
        if self.marker is not None and self.marker.importing:
            return "run it again with the same exports"
        return _ALONE if alone else _REMEDY

    def learner(self, fresh: Marker) -> Marker:
        """The marker of a node that starts over; it stays in the cluster that it is known to have been in."""
        known = self.marker
        if known is None:
            return replace(fresh, generation=None, rejoining=True)
        return replace(fresh, generation=known.generation, cluster_id=known.cluster_id, rejoining=True)

    def carried_on(self, fresh: Marker, *, rejoin: bool) -> Marker:
        """The marker of a node that goes on, or begins."""
        stored = self.marker
        if stored is not None and stored.initialised:
            if rejoin:
                _log.warning("rejoin_ignored", reason="the data directory is complete; remove the flag")
            return replace(stored, members=fresh.members)
        if stored is not None and stored.imported and not stored.rejoining:
            return replace(stored, members=fresh.members, rejoining=rejoin)
        if stored is not None and stored.rejoining:
            return replace(stored, node=fresh.node, names=fresh.names, members=fresh.members)
        return replace(fresh, generation=None, rejoining=True) if rejoin else fresh


def _require_same(stored: Marker, fresh: Marker) -> None:
    if stored.node != fresh.node:
        raise Corrupt(
            f"this data directory belongs to node {stored.node}, this is node {fresh.node}: "
            "correct node_name or data_dir; two nodes must never share or swap directories"
        )
    if stored.names != fresh.names:
        raise Corrupt(
            "this data directory belongs to a cluster of other nodes than the `peer` blocks name: put the former names "
            "back, or change the cluster with all nodes stopped by `caserver operator recover export` and `import`"
        )


def cluster_of(directory: Path) -> str | None:
    """The cluster that the node of this directory is known to belong to, None if there is none yet or nobody can tell."""
    try:
        return Marker.decode((directory / MARKER_FILE).read_bytes()).cluster_id
    except (OSError, ValueError, Corrupt):  # whoever opens the directory says what is wrong with it
        return None


def stored_marker(disk: Disk) -> Marker | None:
    """The marker of a locked directory, None if it is new; Corrupt if there are files and nobody knows whose."""
    found = _Found.look(disk)
    if found.marker is None and (found.damage or found.has_log or found.has_snapshot):
        raise Corrupt(f"{found.fault()}; move the files of the data directory away first")
    return found.marker


def install(disk: Disk, marker: Marker, *, snapshot: bytes, entries: Sequence[Entry], term: int) -> None:
    """Make a locked directory that of a node that begins with this state and log, durable on return. OSError.

    It is a voter once all nodes of its list have begun so: one that forgot what it acknowledged since then must not be.

    A crash at any step leaves the former content, or a directory that no node starts on and that takes another ``install``.
    What a voter had there is kept aside.
    """
    former, marker = stored_marker(disk), replace(marker, origin=entries[-1][1])
    if former is not None and former.initialised:
        _keep_aside(disk, MARKER_FILE, JOURNAL_FILE, SNAPSHOT_FILE)
    disk.replace(MARKER_FILE, replace(marker, importing=True).encode())
    disk.replace(SNAPSHOT_FILE, snapshot)
    replace_file(disk, entries=entries, term=term)
    disk.replace(MARKER_FILE, marker.encode())


def _clear(disk: Disk, *, keep: bool) -> None:
    """Remove log and snapshot; ``keep`` leaves copies under other names: they may be all that is left of a cluster."""
    if keep:
        _keep_aside(disk, JOURNAL_FILE, SNAPSHOT_FILE)
    for name in (JOURNAL_FILE, SNAPSHOT_FILE):
        if disk.read(name) is not None:
            disk.replace(name, None)


def _keep_aside(disk: Disk, *names: str) -> None:
    for name in names:
        content = disk.read(name)
        if content is not None:
            disk.replace(name + _OLD, content)
