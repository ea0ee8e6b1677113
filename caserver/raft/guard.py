"""The rules that every message passes on its way in and out, because pysyncobj trusts whatever arrives.

Messages (all from authenticated peers, schema in ``messages``):

    append_entries   the leader's entries, heartbeat or snapshot chunk    next_node_idx  its answer, stamped with the term
    request_vote, response_vote      election                             pv, pva    would you vote for me? (pre-vote)
    ri, ria          ReadIndex: am I still your leader?                   stale      my term is higher than what you sent
    timeout_now      take over: leadership is handed to you
    standing         what I am, said first on every link and once a second; keys: the cluster secrets that I hold

Rules, with the defect of the bare engine that each one cures:

* An answer counts only in the term in which it was given; a vote counts once per voter. (Entries committed by a minority.)
* A node whose leader is alive ignores candidates, unless the leader handed over; who wants to campaign asks first.
  (One lagging node deposes a healthy leader.)
* A sender with an old term is told so. (A stale leader never learns.)
* A snapshot's chunk says nothing about the log: its commit index does not count. (A follower applies what it should drop.)
* What promises something leaves only after the journal is durable; promises of one tick share one flush.
* A node without the initialised marker counts for nothing: it gives no vote and no ReadIndex answer, and its answers move
  only what is sent to it next. (A lost disk forgets a vote and acknowledged entries.)

A brand-new cluster has no member that could vouch for anything, so it is founded in two steps, each needing all listed
nodes: a node that has heard from every peer that its log is empty makes its marker (*founding*); a founding node
campaigns once every peer is founding, or more. Nobody is left behind, and no wiped node can mistake an old cluster for a
new one, because one member with entries is enough to tell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from caserver.environment import Clock, Entropy
from caserver.errors import Corrupt
from caserver.raft.ports import KeyReport, Message, Network
from caserver.raft.seam import FIRST_INDEX, Core

_PROMISES = {"next_node_idx", "response_vote", "request_vote"}


class Standing(StrEnum):
    """What a node is to its cluster."""

    UNKNOWN = "unknown"  # it has not said yet
    EMPTY = "empty"  # no marker: new, or wiped
    LEARNER = "learner"  # wiped and told so: catches up, counts for nothing until promoted
    FOUNDING = "founding"  # marker, and a log that never held an entry
    MEMBER = "member"


_VOTERS = {Standing.FOUNDING, Standing.MEMBER}
_WITHOUT_ENTRIES = {Standing.EMPTY, Standing.FOUNDING}
_NOT_FOUNDED = "a new cluster elects its first leader once every listed node takes part; not yet: "
_NOTHING_TO_REJOIN = "nothing to rejoin: no node of this cluster ever held an entry; remove -rejoin and empty the data directory of this node"


@dataclass(frozen=True, slots=True)
class Timing:
    """Durations in seconds."""

    heartbeat: float
    timeout_min: float
    timeout_max: float

    @classmethod
    def scaled(cls, multiplier: float) -> Timing:
        """Consul's ``raft_multiplier``: 1 for a quiet local network, more for slow or shared machines."""
        return cls(heartbeat=0.06 * multiplier, timeout_min=0.3 * multiplier, timeout_max=0.6 * multiplier)


class ElectionTimer:
    """When this node last heard of life, and when it will want to lead."""

    def __init__(self, clock: Clock, entropy: Entropy, timing: Timing) -> None:
        self._clock, self._entropy, self._timing = clock, entropy, timing
        self.deadline = 0.0
        self.rearm()

    def rearm(self, *, part: float = 1.0) -> None:
        """Wait a new, random timeout, or a part of one."""
        span = self._entropy.uniform(self._timing.timeout_min, self._timing.timeout_max)
        self.deadline = self._clock.monotonic() + span * part

    def expired(self) -> bool:
        """Whether the wait is over."""
        return self._clock.monotonic() >= self.deadline


@dataclass(slots=True)
class PeerView:
    """What is known of one peer; forgotten with the process."""

    standing: Standing = Standing.UNKNOWN
    life: str = ""  # differs for every start of the peer
    since: float = 0.0  # monotonic instant of the first report of this life and standing
    wall_ahead: float | None = None  # seconds of its wall clock ahead of ours; None: not heard since the link broke
    announced: bool = False  # the link is up and our standing went first
    heard: float = 0.0  # monotonic instant of its last message
    linked: float = 0.0  # monotonic instant at which the link came up
    keys: KeyReport | None = None  # what it said since the link is up


@dataclass(frozen=True, slots=True)
class SelfReport:
    """What this node says of itself."""

    standing: Standing
    life: str
    wall_ms: int
    snapshot_index: int = 0  # of the newest snapshot; 0 = none
    snapshot_hash: str = ""  # of the state in it, hex


@dataclass(slots=True)
class _Round:
    """One ReadIndex round."""

    term: int
    number: int
    started: float  # monotonic
    heard: set[str]
    waiting: list[Callable[[str | None], None]]


@dataclass(slots=True)
class Reactions:
    """What the engine does about things that the guard notices."""

    standing: Callable[[], Standing]
    report: Callable[[], SelfReport]
    standing_changed: Callable[[str, PeerView], None]  # also on the first report
    state_hash: Callable[[str, int, str], None]  # peer, index, hash
    chunk: Callable[[str, Any], None]  # a piece of a snapshot from the leader
    answered: Callable[[str, Message], None]  # a valid answer to what this leader sent
    keys: Callable[[], KeyReport | None]  # this node's


class Guard:
    """Stands between the network and the protocol; sans-IO, one per engine."""

    def __init__(
        self,
        *,
        node: str,
        peers: Sequence[str],
        core: Core,
        network: Network,
        clock: Clock,
        timing: Timing,
        timer: ElectionTimer,
        reactions: Reactions,
    ) -> None:
        self._node = node
        self._core, self._network, self._clock, self._timing, self._timer = core, network, clock, timing, timer
        self._reactions = reactions
        self.peers = {peer: PeerView() for peer in peers}
        self.counts: Counter[str] = Counter()  # what was refused, by rule
        self.campaigns = 0
        self.views = 0  # changes of what is known of the peers
        self.leader_contact = clock.monotonic()  # when the leader was last heard
        self.leader_lost = False  # the link to it broke since
        self._vouched_until = float("-inf")  # until then a leader counts on this node to elect nobody else
        if reactions.standing() is Standing.MEMBER:  # as one may that this node vouched for just before it stopped
            self._vouched_until = clock.monotonic() + timing.timeout_min / 4
        self._promises: list[tuple[str, Message]] = []
        self._votes_seen: set[tuple[int, str]] = set()
        self._would_vote: tuple[int, set[str]] = (0, set())
        self._campaign_term = 0  # in which this node may campaign: a majority would vote, or the leader handed over
        self._transfer_term = 0
        self._rounds: dict[int, _Round] = {}
        self._round_number = 0
        self._proven = (0, float("-inf"))  # term of this node's leadership, when the last round that proved it began
        self._barriers: list[Callable[[str | None], None]] = []
        self._handlers: dict[str, Callable[[str, Message], None]] = {
            "standing": self._standing,
            "keys": self._keys,
            "append_entries": self._append_entries,
            "next_node_idx": self._next_node_idx,
            "request_vote": self._request_vote,
            "response_vote": self._response_vote,
            "timeout_now": self._timeout_now,
            "pv": self._pre_vote,
            "pva": self._pre_vote_granted,
            "ri": self._read_index,
            "ria": self._read_index_granted,
            "stale": self._stale,
        }

    # -- links and standing

    def link(self, peer: str, *, up: bool) -> None:
        """A link to ``peer`` came up (say first what we are) or went down."""
        self._core.link(peer, up=up)
        self.views += 1
        view = self.peers[peer]
        view.announced = False
        if not up:  # a link that comes up may follow the peer's first report
            view.wall_ahead = view.keys = None
        if up:
            view.announced, view.linked = self._network.send(peer, self._report()), self._clock.monotonic()
            self._send_keys(peer)
        elif peer == self._core.leader() and not self._core.is_leader():
            # Its process is gone, or the network is: ask around early. While others hear the leader they will say no.
            self.leader_lost = True
            self._timer.deadline = min(self._timer.deadline, self._clock.monotonic() + self._turn_after(peer))

    def _turn_after(self, lost: str) -> float:
        """Seconds until it is this node's turn to campaign after ``lost``: all notice at once, and would split the vote."""
        left = sorted({self._node, *self.peers} - {lost})
        return self._timing.timeout_min / 8 * (1 + left.index(self._node))

    def announce(self) -> None:
        """Tell every connected peer what this node is now."""
        for peer, view in self.peers.items():
            if view.announced:
                self._network.send(peer, self._report())
                self._send_keys(peer)

    def _send_keys(self, peer: str) -> None:
        keys = self._reactions.keys()
        if keys is not None:
            self._network.send(peer, {"type": "keys", "held": list(keys.held), "stored": list(keys.stored)})

    def _keys(self, peer: str, message: Message) -> None:
        self.views += 1
        self.peers[peer].keys = KeyReport(tuple(message["held"]), tuple(message["stored"]))

    def _report(self) -> Message:
        report = self._reactions.report()
        return {
            "type": "standing",
            "standing": report.standing.value,
            "life": report.life,
            "wall": report.wall_ms,
            "snapshot_index": report.snapshot_index,
            "snapshot_hash": report.snapshot_hash,
        }

    def _standing(self, peer: str, message: Message) -> None:
        try:
            standing = Standing(message["standing"])
        except ValueError:
            self._refuse("unknown_standing")
            return
        self.views += 1
        view, life = self.peers[peer], message["life"]
        view.wall_ahead = (message["wall"] - self._reactions.report().wall_ms) / 1000
        if (standing, life) != (view.standing, view.life):
            view.standing, view.life, view.since = standing, life, self._clock.monotonic()
            self._reactions.standing_changed(peer, view)
        if standing in _VOTERS and message["snapshot_index"]:
            self._reactions.state_hash(peer, message["snapshot_index"], message["snapshot_hash"])

    def clock_offsets(self) -> tuple[float, float]:
        """Seconds that this node's wall clock is ahead of the middle one of all that are linked and were heard.

        Of two in the middle the one that is further off comes first: with one peer alone nobody can say whose clock is wrong.
        """
        linked = [view.wall_ahead for view in self.peers.values() if view.announced]
        ahead = sorted([0.0, *(each for each in linked if each is not None)])
        middle = sorted((ahead[(len(ahead) - 1) // 2], ahead[len(ahead) // 2]), key=abs)
        return 0.0 - middle[1], 0.0 - middle[0]

    def is_voter(self, peer: str) -> bool:
        """Whether ``peer`` said that it has its log."""
        return self.peers[peer].standing in _VOTERS

    def has_vote(self, peer: str) -> bool:
        """Whether ``peer`` has a vote as far as is known here.

        A log with entries says that every listed node was a voter when it began; one that has not been heard since this
        node started counts as what it was then.
        """
        founded = self._reactions.standing() is Standing.MEMBER
        return self.is_voter(peer) or (founded and self.peers[peer].standing is Standing.UNKNOWN)

    def all_without_entries(self) -> bool:
        """Whether every listed peer reported, in this life of this node, that it never held an entry."""
        return all(view.standing in _WITHOUT_ENTRIES for view in self.peers.values())

    def obstacle(self) -> str | None:
        """What keeps a cluster that was never founded from being so, and what to do about it; None in any other."""
        standing = self._reactions.standing()
        if standing is Standing.LEARNER:
            return _NOTHING_TO_REJOIN if self._nobody_has_entries() else None
        counted = {Standing.EMPTY: _WITHOUT_ENTRIES, Standing.FOUNDING: _VOTERS}.get(standing)
        if counted is None:
            return None
        missing = [
            f"{peer} ({self._shown(view.standing)})"
            for peer, view in self.peers.items()
            if view.standing not in counted
        ]
        return _NOT_FOUNDED + ", ".join(missing) if missing else None

    def _nobody_has_entries(self) -> bool:
        """Whether no peer holds anything, so that whoever waits to learn from them waits in vain."""
        return all(view.standing in _WITHOUT_ENTRIES | {Standing.LEARNER} for view in self.peers.values())

    def _shown(self, standing: Standing) -> str:
        if standing is Standing.UNKNOWN:
            return "not heard from since this node started"
        if standing is Standing.LEARNER and self._nobody_has_entries():
            return "learner: remove -rejoin there and empty its data directory"
        return standing.value

    def _votes(self) -> bool:
        return self._reactions.standing() in _VOTERS

    def may_campaign(self) -> bool:
        """Whether this node counts, and in a new cluster whether all others do, too."""
        standing = self._reactions.standing()
        if standing is Standing.FOUNDING:
            return all(self.is_voter(peer) for peer in self.peers)
        return standing is Standing.MEMBER

    # -- in

    def receive(self, peer: str, message: Message) -> None:
        """Act on one message; what breaks a rule is counted and dropped."""
        view, handler = self.peers.get(peer), self._handlers.get(message["type"])
        if view is None or handler is None:
            self._refuse("unknown")
            return
        view.heard = self._clock.monotonic()
        handler(peer, message)

    def _refuse(self, rule: str) -> None:
        self.counts[rule] += 1

    def _append_entries(self, peer: str, message: Message) -> None:
        if self._reactions.standing() is Standing.EMPTY:
            self._refuse("not_initialised")
            return
        term = self._core.term()
        if message["term"] < term:
            self._tell_stale(peer)
            return
        if self._core.is_leader() and message["term"] == term:
            raise Corrupt(f"{peer} and this node both lead term {term}: a vote was given twice; stop all nodes")
        if not _contiguous(message):
            self._refuse("bad_entries")
            return
        self.leader_contact, self.leader_lost = self._clock.monotonic(), False
        committed = self._core.commit_index()
        if "entries" not in message:
            # The bare engine would take the leader's commit index for its own log, which nothing here has matched.
            message = {**message, "commit_index": committed}
        self._core.deliver(peer, message)
        self._core.keep_committed(committed)
        if message.get("serialized") is not None:
            self._reactions.chunk(peer, message["serialized"])

    def _next_node_idx(self, peer: str, message: Message) -> None:
        core, following = self._core, message["next_node_idx"]
        if not core.is_leader() or message["term"] != core.term():
            self._refuse("stale_answer")
            return
        if not FIRST_INDEX <= following <= core.last()[1] + 1 and (message["success"] or message["reset"]):
            self._refuse("impossible_answer")
            return
        if not self.is_voter(peer):
            if message["success"] or message["reset"]:
                core.set_next_index(peer, following)
        elif message["reset"] and following <= core.match_index(peer):
            self._refuse("late_reset")  # it has more than that; a voter never loses what it acknowledged
            core.set_next_index(peer, core.match_index(peer) + 1)
        else:
            core.deliver(peer, message)
        self._reactions.answered(peer, message)

    def _request_vote(self, peer: str, message: Message) -> None:
        if not self._votes() or not self.is_voter(peer):
            self._refuse("vote_without_standing")
        elif message["term"] < self._core.term():
            self._tell_stale(peer)
        elif not message.get("xfer") and (
            self._vouches() or (message["term"] > self._core.term() and self._hears_leader())
        ):
            self._refuse("sticky")
        else:
            self._core.deliver(peer, message)

    def _response_vote(self, peer: str, message: Message) -> None:
        seen = (message["term"], peer)
        if not self.is_voter(peer) or seen in self._votes_seen:
            self._refuse("vote_again")
            return
        self._votes_seen = {each for each in self._votes_seen if each[0] >= self._core.term()} | {seen}
        self._core.deliver(peer, message)

    def _timeout_now(self, peer: str, message: Message) -> None:
        if message["term"] == self._core.term() and self._core.leader() == peer and self.may_campaign():
            self._campaign_term = self._transfer_term = self._core.term() + 1

    def _stale(self, peer: str, message: Message) -> None:
        if message["term"] > self._core.term() and self.is_voter(peer):
            self._core.step_down(message["term"])
            self._timer.rearm(part=0.5)

    def _tell_stale(self, peer: str) -> None:
        if self._votes():
            self.send(peer, {"type": "stale", "term": self._core.term()})

    # -- out

    def send(self, peer: str, message: Message) -> bool:
        """Stamp a message and send it, a promise only at the next ``keep_promises``."""
        if not self.peers[peer].announced:
            return False
        kind = message["type"]
        if kind == "next_node_idx":
            message = {**message, "term": self._core.term()}
            if message["reset"]:
                message["next_node_idx"] = self._before_conflict(message["next_node_idx"])
        elif kind == "request_vote":
            message = {**message, "xfer": message["term"] == self._transfer_term}
        if kind in _PROMISES:
            self._promises.append((peer, message))
            return True
        return self._network.send(peer, message)

    def _before_conflict(self, following: int) -> int:
        """Where a contradicted term begins here: asking for all of it saves the leader a question per entry."""
        contradicted = self._core.entry(following)
        while contradicted is not None and following > self._core.commit_index() + 1:
            before = self._core.entry(following - 1)
            if before is None or before[2] != contradicted[2]:
                break
            following -= 1
        return following

    @property
    def owes(self) -> bool:
        """Whether promises wait for a durable journal."""
        return bool(self._promises)

    def keep_promises(self) -> None:
        """Send what was promised; the journal is durable now."""
        promises, self._promises = self._promises, []
        for peer, message in promises:
            if self.peers[peer].announced:
                self._network.send(peer, message)

    # -- elections

    def _majority(self, peers: set[str]) -> bool:
        """Whether ``peers`` and this node are more than half."""
        return 2 * (len(peers) + 1) > len(self.peers) + 1

    def _hears_leader(self) -> bool:
        """Stickiness: whether this node is in touch with a leader, or leads in touch with a majority."""
        since = self._clock.monotonic() - self._timing.timeout_min
        if self._core.is_leader():
            return self._majority({peer for peer in self.peers if self._core.last_response(peer) > since})
        heard = self._core.leader() is not None and self.leader_contact > since and not self.leader_lost
        return heard or self._vouches()

    def _vouches(self) -> bool:
        return self._clock.monotonic() < self._vouched_until

    def consider_campaign(self) -> bool:
        """Ask for pre-votes when the time has come; whether to campaign right now."""
        if self._core.is_leader():
            return False
        if self._timer.expired() and self._campaign_term != self._core.term() + 1:
            self._timer.rearm(part=0.5)
            if self.may_campaign():
                self._ask_pre_votes()
        if self._campaign_term != self._core.term() + 1:
            return False
        self._campaign_term = 0
        campaign = self.may_campaign()
        self.campaigns += campaign
        return campaign

    def _ask_pre_votes(self) -> None:
        term = self._core.term() + 1
        self._would_vote = (term, set())
        _, index, last_term = self._core.last()
        for peer in self.peers:
            self.send(peer, {"type": "pv", "term": term, "lli": index, "llt": last_term})
        if self._majority(set()):
            self._campaign_term = term

    def _pre_vote(self, peer: str, message: Message) -> None:
        if not self._votes() or not self.is_voter(peer):
            self._refuse("vote_without_standing")
            return
        if message["term"] <= self._core.term():
            self._tell_stale(peer)  # else the node with the best log may never reach the term that others are in
            return
        _, index, term = self._core.last()
        if self._hears_leader() or (message["llt"], message["lli"]) < (term, index):
            self._refuse("pre_vote")
            return
        self.send(peer, {"type": "pva", "term": message["term"]})

    def _pre_vote_granted(self, peer: str, message: Message) -> None:
        term, voters = self._would_vote
        if message["term"] != term or term != self._core.term() + 1 or self._core.is_leader():
            return
        if not self.is_voter(peer) or self._hears_leader():
            return
        voters.add(peer)
        if self._majority(voters):
            self._would_vote = (0, set())
            self._campaign_term = term

    # -- ReadIndex

    def barrier(self, done: Callable[[str | None], None]) -> None:
        """Call ``done(None)`` once leadership at a moment after now is proven, ``done(reason)`` if it cannot be."""
        self._barriers.append(done)

    def run_barriers(self) -> None:
        """Start one round for all who wait, if this leader's term has begun; give up rounds of a lost term."""
        if not self._barriers and not self._rounds:
            return
        core = self._core
        if not core.is_leader():
            self._give_up(f"this node does not lead (term {core.term()})")
            return
        for number in [n for n, each in self._rounds.items() if each.term != core.term()]:
            self._finish(number, "leadership was lost")
        self._ask_again()
        if not self._barriers or core.applied_index() < (core.noop_index() or 0):
            return
        self._round_number += 1
        waiting, self._barriers = self._barriers, []
        ongoing = _Round(core.term(), self._round_number, self._clock.monotonic(), set(), waiting)
        self._rounds[self._round_number] = ongoing
        for peer in self.peers:
            self.send(peer, {"type": "ri", "term": ongoing.term, "n": ongoing.number})
        if self._majority(ongoing.heard):
            self._finish(ongoing.number, None)

    def _ask_again(self) -> None:
        """Move those whose round got lost on the way into the next one, which proves as much for them."""
        before = self._clock.monotonic() - 2 * self._timing.heartbeat
        for number in [n for n, each in self._rounds.items() if each.started < before]:
            self._barriers += self._rounds.pop(number).waiting

    def _give_up(self, reason: str) -> None:
        waiting, self._barriers = self._barriers, []
        for done in waiting:
            done(reason)
        for number in tuple(self._rounds):
            self._finish(number, reason)

    def fresh_until(self) -> float:
        """Instant until which a majority elects nobody else than this leader.

        Whoever answered a round listens to no candidate for half of ``timeout_min``, whatever becomes of the link, and a node
        that starts again for a quarter. Half of the former, because clocks may run at different speeds.
        """
        if not self.peers:
            return float("inf")
        term, began = self._proven
        return began + self._timing.timeout_min / 4 if term == self._core.term() else float("-inf")

    def _finish(self, number: int, reason: str | None) -> None:
        ongoing = self._rounds[number]
        if reason is None and (ongoing.term, ongoing.started) > self._proven:
            self._proven = (ongoing.term, ongoing.started)
        for done in self._rounds.pop(number).waiting:
            done(reason)

    def _read_index(self, peer: str, message: Message) -> None:
        if self._votes() and message["term"] == self._core.term() and self._core.leader() == peer:
            self.leader_contact, self.leader_lost = self._clock.monotonic(), False
            self._vouched_until = self.leader_contact + self._timing.timeout_min / 2
            self._campaign_term = self._transfer_term  # what others promised before counts no more
            self.send(peer, {"type": "ria", "term": message["term"], "n": message["n"]})

    def _read_index_granted(self, peer: str, message: Message) -> None:
        ongoing = self._rounds.get(message["n"])
        if ongoing is None or not self.is_voter(peer) or not self._core.is_leader():
            return
        if not ongoing.term == message["term"] == self._core.term():
            return
        ongoing.heard.add(peer)
        if self._majority(ongoing.heard):
            for number in [each for each in self._rounds if each <= ongoing.number]:
                self._finish(number, None)  # proven at a later moment than an earlier round asked for


def _contiguous(message: Message) -> bool:
    """Whether the entries follow the place that the message names, with terms that can be."""
    if message.get("prevLogIdx") is None:
        return "serialized" in message
    term, index = message["prevLogTerm"], message["prevLogIdx"]
    for _, each_index, each_term in message["entries"]:
        if each_index != index + 1 or not term <= each_term <= message["term"]:
            return False
        term, index = each_term, each_index
    return True
