"""One Raft node without sockets, threads or waiting: messages and ticks go in, messages and outcomes come out.

``Engine`` puts pysyncobj's protocol (``seam.Core``) behind the message rules (``Guard``) and adds what the package lacks:
exact outcomes, a bounded queue, group commit, ReadIndex, snapshots beside the log, hand-over, promotion of replaced nodes.

A tick runs in this order, which is what makes it durable and fast: queue -> journal and network at once -> one flush ->
promises -> count commits, apply, answer. Whoever drives the engine calls ``tick`` after every ``receive``, ``propose`` and
``barrier`` (once for many) and at ``next_wakeup``. Any exception that leaves it means that the node must stop: the state
in memory is not to be trusted any more, the files are.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from caserver.environment import Clock, Entropy
from caserver.errors import Corrupt
from caserver.raft import snapshot_file
from caserver.raft.compaction import Making, Receiving
from caserver.raft.feeder import Feeder
from caserver.raft.guard import ElectionTimer, Guard, PeerView, Reactions, SelfReport, Standing, Timing
from caserver.raft.journal import Journal
from caserver.raft.ports import (
    Committed,
    Disk,
    KeyReport,
    Leadership,
    Marker,
    Message,
    Network,
    NotCommitted,
    Outcome,
    OutcomeUnknown,
    StateMachine,
)
from caserver.raft.seam import COMMAND, CONTROL, DISCARDED, FIRST_INDEX, SUCCESS, Core, Entry, bind_monotonic
from caserver.raft.status import RaftStatus, status_of

COMMAND_BYTES_MAX = 256 << 10
QUEUE_MAX = 4096  # proposals between two ticks
SNAPSHOT_EVERY = 4096  # entries; all nodes compact at the same indexes, so that their hashes compare
_PUSH_DELAY = 0.002  # seconds that a new commit index waits for company
_REPORT_EVERY = 1.0  # seconds
_HASHES_KEPT = 8


@dataclass(slots=True, eq=False)
class Proposal:
    """A command on its way."""

    command: bytes
    done: Callable[[Outcome[Any]], None]  # called once, from a tick
    appended: bool = False
    withdrawn: bool = False  # set by the caller who stopped waiting


@dataclass(slots=True)
class _HandOver:
    to: str | None
    until: float
    sent: bool = False


class Engine:
    """One node of the replicated log; sans-IO but for its ``Disk``, lives on one thread."""

    def __init__(
        self,
        *,
        node: str,
        peers: Sequence[str],
        machine: StateMachine[Any, Any, Any],
        journal: Journal,
        snapshot: snapshot_file.Snapshot | None,
        marker: Marker,
        disk: Disk,
        network: Network,
        clock: Clock,
        entropy: Entropy,
        timing: Timing,
        rejoin: bool = False,
        origin: int = FIRST_INDEX,
        snapshot_every: int = SNAPSHOT_EVERY,
        seals: Callable[[Any], frozenset[str]] = lambda _: frozenset(),
        erased: Callable[[Any, Any], bool] = lambda _before, _after: False,
    ) -> None:
        """``peers`` are the others; ``journal`` is healed against ``snapshot``; ``rejoin`` lets a wiped node learn.

        ``origin`` is the last index that the log began with, before anything was agreed on in this generation.
        ``seals`` names the keys that sealed what a state holds. ``erased`` tells of two states whether the step between
        them took a secret away: the log is compacted then, so that the secret does not stay in it.
        """
        bind_monotonic(clock.monotonic)
        self._node, self._machine, self._journal, self._marker, self._disk = node, machine, journal, marker, disk
        self._clock, self._timing, self._rejoin, self._snapshot_every = clock, timing, rejoin, snapshot_every
        self._origin = origin
        self._life = entropy.bytes(8).hex()
        self._seals, self._erased = seals, erased
        self._secrets_gone = False  # from the state, but not from a snapshot that is begun yet
        self.snapshot_seals: frozenset[str] = frozenset()  # keys that sealed what the stored snapshot holds
        self.keys: KeyReport | None = None  # what this node tells of its own
        self._queue: deque[Proposal] = deque()
        self._making: Making | None = None
        self._receiving = Receiving()
        self._promoted: dict[str, float] = {}  # life -> when its promotion was last proposed
        self._hashes: dict[int, str] = {}
        self._hand_over: _HandOver | None = None
        self._heir_told = 0  # term in which another node was told to lead, which it may do late
        self._push_at = float("inf")
        self._report_at = clock.monotonic() + _REPORT_EVERY
        self._timer = ElectionTimer(clock, entropy, timing)
        self._core = Core(
            node, peers, hooks=self, journal=journal, heartbeat=timing.heartbeat, timeout=timing.timeout_max
        )
        self._feeder = Feeder(self._core, disk=disk, clock=clock, send=self.send)
        self._guard = Guard(
            node=node,
            peers=peers,
            core=self._core,
            network=network,
            clock=clock,
            timing=timing,
            timer=self._timer,
            reactions=Reactions(
                standing=self._standing,
                report=self._report,
                standing_changed=self._standing_changed,
                state_hash=self._compare_hash,
                chunk=self._take_chunk,
                answered=self._feeder.answered,
                keys=lambda: self.keys,
            ),
        )
        self._restore(snapshot)
        if not peers:
            if not marker.initialised:
                marker.mark_initialised()
            self._timer.deadline = clock.monotonic()  # nobody to wait for: lead at the first tick

    def _restore(self, snapshot: snapshot_file.Snapshot | None) -> None:
        if snapshot is not None:
            self._machine.load(snapshot.state)
            self.snapshot_seals = self._seals(self._machine.state)
            self._core.restored(snapshot.last[1])
            self._remember_hash(snapshot.last[1], snapshot.state_hash)

    # -- driving

    def receive(self, peer: str, message: Message) -> bool:
        """Take one message of an authenticated peer; answers leave at the next tick. Whether one is due on account of it."""
        try:
            self._guard.receive(peer, message)
        finally:
            self._journal.end_of_message()
        return message["type"] != "next_node_idx" or self._answer_matters(peer)

    def _answer_matters(self, peer: str) -> bool:
        """Of a leader's many answers, those of all but the first majority change nothing that the next tick could not do."""
        return self._hand_over is not None or self._feeder.is_hungry(peer) or self._core.can_commit()

    def link(self, peer: str, *, up: bool) -> None:
        """The link on which this node sends to ``peer`` came up or went down."""
        self._feeder.lost(peer)
        self._guard.link(peer, up=up)

    def tick(self) -> None:
        """Do all that is due."""
        if self._clock.monotonic() >= self._report_at:
            self._report_at = self._clock.monotonic() + _REPORT_EVERY
            self._guard.announce()
        campaign = self._guard.consider_campaign()
        if self._queue:
            self._drain_queue()
        self._flush()
        if self._core.is_leader() and self._clock.monotonic() >= self._core.heartbeat_due():
            self._core.send_soon()  # due at this instant, not only after it: time may stand still
        committed = self._core.commit_index()
        self._core.step(campaign=campaign)
        if self._guard.owes:
            self._flush()
        self._lead(committed)
        self._guard.run_barriers()

    def next_wakeup(self) -> float:
        """Monotonic instant at which ``tick`` must run again if nothing happens before."""
        leads = self._core.is_leader()
        due = min(self._core.heartbeat_due(), self._push_at) if leads else self._timer.deadline
        return min(due, self._report_at)

    def _flush(self) -> None:
        self._journal.sync()
        self._guard.keep_promises()

    def _lead(self, committed_before: int) -> None:
        """What only a leader does at the end of a tick."""
        if not self._core.is_leader():
            self._hand_over = None
            self._push_at = float("inf")
            return
        now = self._clock.monotonic()
        if self._core.commit_index() > committed_before:
            self._push_at = min(self._push_at, now + _PUSH_DELAY)
        if now >= self._push_at:
            self._send_all()
        self._feeder.feed_hungry()
        self._promote_learners(now)
        self._continue_hand_over(now)

    # -- proposing

    def propose(self, proposal: Proposal) -> None:
        """Queue a command for the next tick; a refusal is told at once."""
        refusal = self._refusal(proposal.command)
        if refusal:
            proposal.done(NotCommitted(refusal))
        else:
            self._queue.append(proposal)

    def _refusal(self, command: bytes) -> str | None:
        if len(command) > COMMAND_BYTES_MAX:
            return f"a command of {len(command)} bytes is over the limit of {COMMAND_BYTES_MAX}"
        if not self._core.is_leader():
            return f"this node does not lead (term {self._core.term()})"
        if self._hand_over is not None:
            return "leadership is being handed over"
        if len(self._queue) >= QUEUE_MAX:
            return f"{QUEUE_MAX} commands are waiting already"
        return None

    def _drain_queue(self) -> None:
        last = self._core.last()[1]
        while self._queue:
            proposal = self._queue.popleft()
            if proposal.withdrawn:
                continue
            if not self._core.is_leader():
                proposal.done(NotCommitted("leadership was lost before the command was appended"))
                continue
            proposal.appended = True
            self._core.append(COMMAND + proposal.command, _deciding(proposal.done))
        if self._core.last()[1] > last:
            self._send_all()  # on the wire while this node flushes its own journal

    def barrier(self, done: Callable[[str | None], None]) -> None:
        """``done(None)`` when the state holds all that was committed before the call, ``done(reason)`` if unprovable."""
        self._guard.barrier(done)

    # -- what pysyncobj's protocol asks for (seam.Hooks)

    def send(self, peer: str, message: Message) -> bool:
        """Send a message of the protocol, by the rules."""
        return self._guard.send(peer, message)

    def rearm_election(self) -> None:
        """Wait a new election timeout."""
        self._timer.rearm()

    def became_leader(self) -> None:
        """Make the no-op as durable as anything that is counted."""
        self._feeder.forget()
        self._journal.sync()

    def apply(self, index: int, command: bytes) -> object:
        """Apply one committed entry; any failure is final."""
        kind, body = command[:1], command[1:]
        result: object = None
        if kind == COMMAND:
            result = self._apply_command(index, body)
        elif kind != CONTROL:
            raise Corrupt(f"entry {index} is of kind {kind!r}, which no version of caserver writes")
        elif body:
            self._apply_control(index, body)
        if index % self._snapshot_every == 0 or self._secrets_gone:
            self._begin_snapshot(index)
        return result

    def _apply_command(self, index: int, body: bytes) -> object:
        before = self._machine.state
        try:
            result: object = self._machine.apply(body)
            self._secrets_gone = self._secrets_gone or self._erased(before, self._machine.state)
        except (Corrupt, MemoryError, RecursionError, OSError):
            raise
        except Exception as exc:
            # apply is total: a raise is a defect, and a node that went on would differ from those where it did not happen.
            raise Corrupt(f"applying entry {index} failed: {type(exc).__name__}; the node stops unharmed") from exc
        return result

    def _apply_control(self, index: int, body: bytes) -> None:
        try:
            control = json.loads(body)
            name, life = control["promote"], control["life"]
        except (ValueError, KeyError, TypeError) as exc:
            raise Corrupt(
                f"entry {index} is a control entry of a later version; upgrade caserver on this node"
            ) from exc
        if (name, life) == (self._node, self._life) and not self._marker.initialised:
            self._mark()

    # -- sending entries

    def send_entries(self) -> None:
        """Bring every connected peer closer to the end of the log."""
        self._push_at = float("inf")
        for peer, view in self._guard.peers.items():
            if view.announced:
                self._feeder.feed(peer)

    def _send_all(self) -> None:
        self._core.send_now()

    # -- snapshots

    @property
    def making(self) -> Making | None:
        """The snapshot that is being made; whoever drives the engine advances it between other things."""
        return self._making

    def compact(self) -> None:
        """Begin a snapshot now, unless one is being made or the newest holds all there is."""
        index = self._core.applied_index()
        if index > max(self._hashes, default=0):
            self._begin_snapshot(index)

    def _begin_snapshot(self, index: int) -> None:
        if self._making is not None and (self._making.writing or not self._secrets_gone):
            return
        previous, last = self._core.entry(index - 1), self._core.entry(index)
        if previous is not None and last is not None:
            self._secrets_gone = False
            # Of the entry before, only its place counts from here on: what it carried must be able to disappear.
            place = (CONTROL, previous[1], previous[2])
            seals = self._seals(self._machine.state)
            self._making = Making(self._machine.dump(), previous=place, last=last, seals=seals)

    def store_snapshot(self, making: Making) -> None:
        """Write a finished snapshot, durable on return; touches nothing else, so a worker thread may do it."""
        snapshot_file.write(self._disk, previous=making.previous, last=making.last, slices=making.slices)

    def snapshot_stored(self, making: Making) -> None:
        """Shorten the log to what the stored snapshot does not hold."""
        self._making = None
        self.snapshot_seals = making.seals
        self._remember_hash(making.index, making.state_hash)
        self._shorten(making.previous, making.last)
        if self._secrets_gone:
            self._begin_snapshot(self._core.applied_index())
        self._guard.announce()

    def _shorten(self, previous: Entry, last: Entry) -> None:
        kept = self._core.entry(last[1])
        behind = self._journal[last[1] - self._core.first()[1] + 1 :] if kept and kept[2] == last[2] else []
        self._journal.rewrite([previous, last, *behind])

    def _take_chunk(self, peer: str, chunk: tuple[bytes, bool, bool]) -> None:
        piece, first, last = chunk
        content = self._receiving.take(piece, first=first, last=last)
        following = self._core.last()[1] + 1
        if content is None:
            self._core.answer(peer, next_index=following, success=False, reset=False)
        elif self._making is not None and self._making.writing:
            self._core.answer(
                peer, next_index=FIRST_INDEX, success=False, reset=True
            )  # one file, one writer: once more
        else:
            self._install(peer, snapshot_file.decode(content), content)

    def _install(self, peer: str, snapshot: snapshot_file.Snapshot, content: bytes) -> None:
        index = snapshot.last[1]
        if index <= self._core.applied_index():
            self._core.answer(peer, next_index=self._core.applied_index() + 1, success=False, reset=True)
            return
        self._making = None
        self._machine.load(snapshot.state)
        self._disk.replace(snapshot_file.SNAPSHOT_FILE, content)
        self.snapshot_seals = self._seals(self._machine.state)
        self._shorten(snapshot.previous, snapshot.last)
        self._core.restored(index)
        self._remember_hash(index, snapshot.state_hash)
        self._core.answer(peer, next_index=index + 1, success=True, reset=False)

    def _remember_hash(self, index: int, state_hash: str) -> None:
        self._hashes[index] = state_hash
        for old in sorted(self._hashes)[:-_HASHES_KEPT]:
            del self._hashes[old]

    def _compare_hash(self, peer: str, index: int, state_hash: str) -> None:
        own = self._hashes.get(index)
        if own is None or own == state_hash:
            return
        if peer == self._core.leader():
            raise Corrupt(
                f"after entry {index} the state of this node differs from that of the leader {peer}; "
                "stop it, move its data directory away and start it with -rejoin"
            )
        self._guard.counts["state_differs"] += 1

    # -- standing

    def _standing(self) -> Standing:
        if self._marker.initialised:
            return Standing.MEMBER if self._core.last()[1] > self._origin else Standing.FOUNDING
        return Standing.LEARNER if self._rejoin else Standing.EMPTY

    def _report(self) -> SelfReport:
        index = max(self._hashes, default=0)
        return SelfReport(
            standing=self._standing(),
            life=self._life,
            wall_ms=int(self._clock.now().timestamp() * 1000),
            snapshot_index=index,
            snapshot_hash=self._hashes.get(index, ""),
        )

    def _standing_changed(self, peer: str, view: PeerView) -> None:
        if view.standing in {Standing.EMPTY, Standing.LEARNER}:
            self._core.forget_match(peer)
            self._feeder.progress.pop(peer, None)
        standing = self._standing()
        if standing is Standing.EMPTY:
            self._consider_founding(peer, view)
        elif standing is Standing.FOUNDING and self._node < min(self._guard.peers) and self._guard.may_campaign():
            self._timer.deadline = self._clock.monotonic()  # nobody ever led: one of all need not wait for a leader

    def _consider_founding(self, peer: str, view: PeerView) -> None:
        if view.standing is Standing.MEMBER:
            found = "holds no log" if self._origin == FIRST_INDEX else "holds what was imported and nothing later"
            raise Corrupt(
                f"the data directory of this node {found}, but {peer} is a member of a cluster that lists it: "
                "if its disk was lost or replaced, start it with -rejoin; if not, give it its old data directory back"
            )
        if self._guard.all_without_entries():
            self._mark()

    def _mark(self) -> None:
        self._marker.mark_initialised()
        self._guard.announce()

    def _promote_learners(self, now: float) -> None:
        for peer, view in self._guard.peers.items():
            if view.standing is not Standing.LEARNER:
                continue
            waited = now - view.since > self._timing.timeout_max  # candidates that it voted for before have given up
            asked = now - self._promoted.get(view.life, float("-inf")) < _REPORT_EVERY
            caught_up = self._feeder.progress.get(peer, 0) > self._core.commit_index()
            if waited and caught_up and not asked:
                self._promoted[view.life] = now
                control = {"promote": peer, "life": view.life}
                self._core.append(CONTROL + json.dumps(control).encode(), None)
                self._core.send_soon()

    # -- leadership

    def hand_over(self, to: str | None = None) -> bool:
        """Stop taking proposals and let ``to``, or the peer that is furthest, campaign; False if that cannot be."""
        if not self._core.is_leader() or not self._heirs(to):
            return False
        if self._hand_over is None:
            self._hand_over = _HandOver(to, self._clock.monotonic() + self._timing.timeout_max)
        return True

    def _continue_hand_over(self, now: float) -> None:
        over = self._hand_over
        if over is None:
            return
        if now > over.until:
            self._hand_over = None
            return
        chosen = max(self._heirs(over.to), key=self._core.match_index, default=None)
        if chosen and not over.sent and self._core.match_index(chosen) == self._core.last()[1]:
            over.sent = self.send(chosen, {"type": "timeout_now", "term": self._core.term()})
            self._heir_told = self._core.term()

    def _heirs(self, to: str | None) -> list[str]:
        """The connected voters, or ``to`` alone if it is one."""
        guard = self._guard
        able = [peer for peer, view in guard.peers.items() if view.announced and guard.is_voter(peer)]
        return able if to is None else [peer for peer in able if peer == to]

    def outlook(self) -> Hashable:
        """Differs whenever ``leadership`` does in more than in what time alone changes; costs less."""
        return self._office(), self._standing(), self._guard.views, self.keys, self._hand_over is None

    def _office(self) -> tuple[str | None, int, bool, bool]:
        """The leader that is known, the term, whether this node leads, and whether it votes."""
        core = self._core
        if core.is_leader():
            ready = core.applied_index() >= (core.noop_index() or 0)
            return self._node, core.term(), ready, self._marker.initialised
        silence = self._clock.monotonic() - self._guard.leader_contact
        known = silence < self._timing.timeout_max and not self._guard.leader_lost
        return core.leader() if known else None, core.term(), False, self._marker.initialised

    def leadership(self) -> Leadership:
        """Who leads, as far as this node knows."""
        leader, term, leads, votes = self._office()
        further, nearer = self._guard.clock_offsets()
        silence = 0.0 if self._core.is_leader() else self._clock.monotonic() - self._guard.leader_contact
        peers = {peer: view.announced for peer, view in self._guard.peers.items()}
        keys = {peer: view.keys for peer, view in self._guard.peers.items() if view.keys is not None}
        return Leadership(
            node=self._node,
            leader=leader,
            term=term,
            is_leader=leads,
            is_voter=votes,
            fresh_until=self._guard.fresh_until() if self._is_sure(term) else float("-inf"),
            last_contact=silence,
            clock_offset=further,
            clock_outvoted=nearer,
            peers=peers,
            obstacle=self._guard.obstacle(),
            keys=keys if self.keys is None else keys | {self._node: self.keys},
        )

    def _is_sure(self, term: int) -> bool:
        """Whether no other node was asked to lead, or will be."""
        return self._hand_over is None and self._heir_told != term

    def status(self) -> RaftStatus:
        """What an operator may want to know."""
        now, contact_max = self._clock.monotonic(), self._timing.timeout_min
        return status_of(self._core, self._guard, self.leadership(), now=now, contact_max=contact_max)

    @property
    def applied_index(self) -> int:
        """Index of the last applied entry."""
        return self._core.applied_index()

    @property
    def counts(self) -> Mapping[str, int]:
        """What the rules refused, by rule."""
        return Counter(self._guard.counts)

    @property
    def standing(self) -> Standing:
        """What this node is to its cluster."""
        return self._standing()


def _deciding(done: Callable[[Outcome[Any]], None]) -> Callable[[object, int], None]:
    def decided(result: object, reason: int) -> None:
        if reason == SUCCESS:
            done(Committed(result))
        elif reason == DISCARDED:
            done(NotCommitted("another leader's entry took the place of the command"))
        else:
            done(OutcomeUnknown("a snapshot of a later state arrived before the outcome was known"))

    return decided
