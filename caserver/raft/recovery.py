"""Carries a stopped cluster into another list of nodes: *exports* of the old nodes, imported on every node of the new list.

An export is what one node's data directory amounts to: the state after the last entry of its log, whether that entry was
committed or not. Of the exports of a majority the one that ends with the highest (term, index) holds every committed
entry, by the rule on which elections rest. All nodes of the new list begin with it alone, in the next *generation*: its
number and the SHA-256 of what was imported. Nodes of different generations never talk, so neither a node that missed the
import nor one that imported something else can take part.

Everything here works on locked directories of stopped nodes. Misuse is ``RecoveryRefused``, in words for an operator.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from caserver.errors import Corrupt
from caserver.internode.membership import generation_number, next_generation
from caserver.raft import data_dir, snapshot_file
from caserver.raft.data_dir import DataDir, Marker
from caserver.raft.journal import JOURNAL_FILE, Entry, Journal
from caserver.raft.ports import Disk, StateMachine
from caserver.raft.seam import COMMAND, CONTROL

FORMAT = 1
_KIND = "caserver recover export"
_DIGEST_KEY = "sha256"

Position = tuple[int, int]  # term and index of a log's last entry: what elections compare


class RecoveryRefused(Exception):
    """An export or import that would lose acknowledged changes or split the cluster; the text says what to do instead."""


@dataclass(frozen=True, slots=True)
class Export:
    """What one node contributes."""

    node: str
    members: tuple[str, ...]  # the list of nodes that it belonged to
    generation: str
    cluster_id: str | None  # None: no Bootstrap was applied there
    voter: bool  # False: it had lost its log and was not promoted yet, or never ran since its last import
    node_term: int  # the highest term that it knew; may be above that of its last entry
    content: bytes = field(repr=False)  # a snapshot file of the state after the last entry
    snapshot: snapshot_file.Snapshot = field(repr=False)  # the same, verified

    @property
    def position(self) -> Position:
        """Where its log ends."""
        _, index, term = self.snapshot.last
        return term, index

    def encode(self) -> bytes:
        """The bytes of an export file: JSON with a digest of itself."""
        term, index = self.position
        document = {
            "kind": _KIND,
            "format": FORMAT,
            "node": self.node,
            "members": list(self.members),
            "generation": self.generation,
            "cluster_id": self.cluster_id,
            "voter": self.voter,
            "node_term": self.node_term,
            "term": term,
            "index": index,
            "snapshot": base64.b64encode(self.content).decode(),
        }
        return json.dumps({**document, _DIGEST_KEY: _digest(document)}, indent=1).encode() + b"\n"

    @classmethod
    def decode(cls, content: bytes) -> Export:
        """Read and verify what ``encode`` made; Corrupt for anything else."""
        try:
            return cls._of(_document(content))
        except (ValueError, KeyError, TypeError, RecursionError) as exc:
            raise Corrupt(f"the export cannot be read: {exc}") from exc

    @classmethod
    def _of(cls, document: dict[str, Any]) -> Export:
        generation_number(document["generation"])  # ValueError
        content = base64.b64decode(document["snapshot"], validate=True)
        return cls(
            node=str(document["node"]),
            members=tuple(map(str, document["members"])),
            generation=document["generation"],
            cluster_id=document["cluster_id"],
            voter=bool(document["voter"]),
            node_term=int(document["node_term"]),
            content=content,
            snapshot=snapshot_file.decode(content),
        )


def _document(content: bytes) -> dict[str, Any]:
    """The members of an export file; ValueError unless they are as written."""
    document = json.loads(content)
    if type(document) is not dict or document.get("kind") != _KIND:
        raise ValueError("it is no export of caserver")
    if document["format"] != FORMAT:
        raise ValueError(f"it has format {document['format']}, this release reads {FORMAT}")
    if document.pop(_DIGEST_KEY, None) != _digest(document):
        raise ValueError("it is damaged or was edited: its digest does not fit")
    return document


def _digest(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def export(disk: Disk, machine: StateMachine[Any, Any, Any]) -> Export:
    """What the data directory on ``disk`` amounts to; ``machine`` is a new one and holds the state afterwards.

    OSError if a process holds the directory; Corrupt, with a remedy, if it cannot be trusted.
    """
    directory = DataDir.reopen(disk)
    marker = directory.marker
    journal, snapshot = directory.load(on_fault=lambda _: None)
    entries: list[Entry] = journal[:]
    if len(entries) < 2 or marker.generation is None or not _has_begun(marker):  # noqa: PLR2004 - a snapshot names two entries
        raise RecoveryRefused(
            f"the log of node {marker.node} holds nothing yet: there is nothing to export; export the other nodes, or, if "
            "none of them holds anything, start over with empty data directories"
        )
    if not marker.members:
        raise RecoveryRefused(
            f"the data directory of node {marker.node} was made by an older release, which did not keep the list of nodes: "
            "start the node once with this release and stop it"
        )
    _replay(machine, entries, snapshot)
    # Of the entry before, only its place counts: a log that was shortened just there has no more of it either.
    place = (CONTROL, *entries[-2][1:])
    content = snapshot_file.encode(previous=place, last=entries[-1], slices=machine.dump())
    return Export(
        node=marker.node,
        members=marker.members,
        generation=marker.generation,
        cluster_id=marker.cluster_id,
        voter=marker.initialised,
        node_term=max(journal.getCurrentTerm(), entries[-1][2]),
        content=content,
        snapshot=snapshot_file.decode(content),
    )


def _has_begun(marker: Marker) -> bool:
    return marker.initialised or marker.rejoining or marker.imported


def _replay(
    machine: StateMachine[Any, Any, Any], entries: Iterable[Entry], snapshot: snapshot_file.Snapshot | None
) -> None:
    applied = 0
    if snapshot is not None:
        machine.load(snapshot.state)
        applied = snapshot.last[1]
    for command, index, _ in entries:
        if index <= applied or command[:1] == CONTROL:
            continue
        if command[:1] != COMMAND:
            raise Corrupt(
                f"entry {index} is of kind {command[:1]!r}, which this release does not know: use a later one"
            )
        machine.apply(command[1:])


@dataclass(frozen=True, slots=True)
class Import:
    """What the nodes of a new list begin with."""

    chosen: Export
    exports: tuple[Export, ...]
    generation: str  # the one that begins
    cluster_id: str | None
    unheard: tuple[str, ...]  # nodes of the old list without a counting export
    is_majority: bool  # False: forced by -survivor; what only the unheard ones knew is lost


def choose(exports: Sequence[Export], *, survivor: bool) -> Import:
    """Judge the exports of one cluster and pick the one that holds everything; RecoveryRefused if they do not fit.

    ``survivor`` is the operator's word that the nodes without an export are lost for good.
    """
    if not exports:
        raise RecoveryRefused("no export was given: name the files that `recover export` made on the old nodes")
    first = exports[0]
    _require_one("clusters", {each.cluster_id for each in exports if each.cluster_id is not None})
    _require_one("generations", {each.generation for each in exports})
    _require_one("lists of nodes", {", ".join(each.members) for each in exports})
    names = [each.node for each in exports]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise RecoveryRefused(f"there are two exports of node {repeated[0]}: give the newer one alone")
    if strangers := sorted(set(names) - set(first.members)):
        raise RecoveryRefused(f"node {strangers[0]} is not one of the nodes {', '.join(first.members)}")
    voters = [each for each in exports if each.voter]
    unheard = tuple(sorted(set(first.members) - {each.node for each in voters}))
    is_majority = 2 * len(voters) > len(first.members)
    if not is_majority and not survivor:
        raise RecoveryRefused(_too_few(len(voters), len(first.members), unheard, exports))
    chosen = max(exports, key=lambda each: (each.position, each.node))
    for each in exports:
        if each.position == chosen.position and each.snapshot.state_hash != chosen.snapshot.state_hash:
            raise RecoveryRefused(
                f"nodes {each.node} and {chosen.node} hold different states after the same entry {each.position[1]}: "
                "one of them is damaged; find out which, and leave its export out"
            )
    return Import(
        chosen=chosen,
        exports=tuple(exports),
        generation=next_generation(first.generation, chosen.content),
        cluster_id=next((each.cluster_id for each in exports if each.cluster_id is not None), None),
        unheard=unheard,
        is_majority=is_majority,
    )


def _require_one(what: str, found: set[str]) -> None:
    if len(found) > 1:
        shown = " and ".join(sorted(each[:80] for each in found))
        raise RecoveryRefused(
            f"the exports are of different {what} ({shown}): give those of one cluster that were made after its last stop"
        )


def _too_few(count: int, total: int, unheard: tuple[str, ...], exports: Sequence[Export]) -> str:
    learners = [each.node for each in exports if not each.voter]
    aside = f" (that of {', '.join(learners)} does not count: it had no vote)" if learners else ""
    return (
        f"{count} of {total} nodes are exported{aside}, a majority of {total // 2 + 1} is needed: what was acknowledged may "
        f"be known to the others alone. Export one of {', '.join(unheard)} as well; only if they are lost for good, "
        "repeat with -survivor on every node: acknowledged changes that no survivor knows are lost then"
    )


def install(disk: Disk, plan: Import, *, node: str, names: Collection[str]) -> bool:
    """Make the directory on ``disk`` that of ``node`` in the new list ``names``; False if it is so already.

    OSError if a process holds the directory or it cannot be written; RecoveryRefused or Corrupt, with the directory as it
    was, if this node must not begin with that.
    """
    disk.lock()
    stored = data_dir.stored_marker(disk)
    if stored is not None and not stored.importing and _has_begun(stored):
        if stored.node == node and stored.generation == plan.generation:
            return False
        _require_own(stored, plan, node)
        _require_not_behind(stored, plan)
        has_log = disk.read(JOURNAL_FILE) is not None
        if has_log and stored.initialised and stored.generation == plan.chosen.generation:
            _require_unchanged(DataDir(disk, stored, stored.members), plan, node)
    snapshot = plan.chosen.snapshot
    data_dir.install(
        disk,
        replace(Marker.of(node, names), generation=plan.generation, cluster_id=plan.cluster_id),
        snapshot=plan.chosen.content,
        entries=[snapshot.previous, snapshot.last],
        term=max(each.node_term for each in plan.exports),
    )
    return True


_MOVE = "move its data directory away first if it holds nothing that you need"


def _require_own(stored: Marker, plan: Import, node: str) -> None:
    if stored.node != node:
        raise RecoveryRefused(
            f"this data directory belongs to node {stored.node}, this is node {node}: correct node_name or data_dir"
        )
    if stored.cluster_id is not None and plan.cluster_id not in {None, stored.cluster_id}:
        raise RecoveryRefused(
            f"this node belongs to cluster {stored.cluster_id}, the exports are of cluster {plan.cluster_id}: give the "
            f"exports of this cluster, or {_MOVE}"
        )


def _require_not_behind(stored: Marker, plan: Import) -> None:
    """Refuse exports from before the node's last import, and another import of the generation that it is in."""
    if stored.generation is None:
        return
    own, begun = generation_number(stored.generation), generation_number(plan.generation)
    if own > begun:
        raise RecoveryRefused(
            f"this node is of generation {own} already, the exports are of generation {begun - 1}: export the nodes anew"
        )
    if own == begun:
        raise RecoveryRefused(
            f"this node imported something else as generation {own} before ({stored.generation[:20]}, now "
            f"{plan.generation[:20]}): give the same exports to every node; to go on from that import, export the nodes "
            f"anew; to drop it on this node, {_MOVE}"
        )
    if own == begun - 1 and stored.generation != plan.chosen.generation:
        raise RecoveryRefused(
            f"this node is of generation {stored.generation[:20]}, the exports are of {plan.chosen.generation[:20]}: two "
            f"imports went apart before; decide for one, and on nodes of the other {_MOVE}"
        )


def _require_unchanged(directory: DataDir, plan: Import, node: str) -> None:
    """Refuse to replace a log that holds more than what is imported, or more than was exported of it."""
    try:
        journal, _ = directory.load(on_fault=lambda _: None)
    except Corrupt:
        return  # it is lost anyway
    own = _position(journal)
    exported = next((each.position for each in plan.exports if each.node == node), None)
    if exported is not None and own != exported:
        raise RecoveryRefused(
            f"node {node} has run since it was exported: its log ends with entry {own[1]} of term {own[0]}, the export with "
            f"entry {exported[1]} of term {exported[0]}; stop all nodes and export them anew"
        )
    if own > plan.chosen.position:
        raise RecoveryRefused(
            f"the log of node {node} goes further than every export (to entry {own[1]} of term {own[0]}): export this node "
            f"too and give all exports to every node; or, if that entry was never acknowledged, {_MOVE}"
        )


def _position(journal: Journal) -> Position:
    index, term = journal.last
    return term, index
