"""What must be true after every step of a simulated cluster; the first breach ends the run.

* one leader a term, one vote a term, and a promise leaves only when what it rests on is durable
* logs match; a leader holds everything that was ever committed; what is committed is durable at a majority of voters
* the same entry and the same state at the same index on every node; exactly one active root; serials are unique
* what was acknowledged is committed and stays, what was disowned never appears; an index never goes back
* every leaf that was handed out is booked, verifies under every bundle that is in use, and came in time
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from caserver.errors import Corrupt
from caserver.raft.ports import Message
from caserver.raft.seam import COMMAND
from caserver.requests import IssuedLeaf, LeavesSigned
from caserver.state.apply import apply
from caserver.state.codec import decode_command, encode_state
from caserver.state.commands import (
    ActivateRoot,
    Applied,
    ExpireLeaves,
    IssueLeaves,
    LeafOrder,
    RecordSerials,
    RestoreCommit,
    SetConfiguration,
    SetIntermediate,
)
from caserver.state.model import CAState
from tests.sim.bundles import Bundles
from tests.sim.mishaps import Mishaps

if TYPE_CHECKING:
    from tests.sim.loop import Process, SimTask, VirtualLoop
    from tests.sim.node import Life, Node

DELIVERED_WITHIN = 5.0  # seconds from the proposal of a leaf to its receipt
_COMPARE_EVERY = 16  # entries between two comparisons of whole states


class Violation(AssertionError):
    """An invariant was broken."""

    def __init__(self, what: str, traceback: str) -> None:
        super().__init__(what)
        self.traceback = traceback  # of the exception that broke it, if one did


@dataclass(slots=True)
class _Commitment:
    """One committed entry."""

    term: int
    command: bytes
    under: int  # term in which it was seen to be committed: whoever leads a later one must hold it
    result: object = None
    state: CAState | None = None  # after it
    digest: str | None = None


@dataclass(slots=True)
class _View:
    """What was last seen of one life."""

    terms: dict[int, int] = field(default_factory=dict)  # of its log, by index
    span: tuple[int, int] = (0, 0)  # first and last index of its log
    seen: tuple[Any, ...] = ()
    applied: int = 0
    index: int = 0
    leads: int = 0  # highest term that it led


class Witness:
    """Watches everything; remembers what was promised to whom."""

    def __init__(self, loop: VirtualLoop, nodes: dict[str, Node], *, note: Callable[[str], None]) -> None:
        self._loop, self._nodes, self._note = loop, nodes, note
        self.violation: Violation | None = None
        self.mishaps = Mishaps(self.fail)
        self._views: dict[Life, _View] = {}
        self._by_process: dict[Process, Life] = {}
        self._entries: dict[tuple[int, int], tuple[bytes, int]] = {}  # (index, term) -> command, term before it
        self._committed: dict[int, _Commitment] = {}
        self.newest = 0  # highest committed index of the log
        self.began = 0  # index that the present generation began with
        self._bodies: dict[bytes, int] = {}  # committed command -> state index, 0 if refused
        self._open: Counter[bytes] = Counter()  # proposals of a command that were not told that it never commits
        self._leaders: dict[int, str] = {}
        self._votes: dict[tuple[int, str], str] = {}
        self._votes_heard: set[tuple[Process, int, str]] = set()
        self._proposed: dict[int, float] = {}  # serial -> instant of its proposal
        self._booked: dict[int, str] = {}  # serial -> service
        self._handed_out: set[int] = set()
        self._began: dict[str, float] = {}  # issue id without a serial -> instant of its proposal
        self._unnumbered: Counter[tuple[int, str]] = Counter()  # (index, service) -> leaves that may be handed out
        self._begun: dict[tuple[int, str], float] = {}  # the same -> instant of the first proposal
        self.effects: dict[str, list[int]] = {}  # request id -> indexes at which it took effect
        self.replaced: dict[int, int] = {}  # index of a change of the configuration -> index of the one before it
        self.restored: set[int] = set()  # indexes at which a restore took effect
        self.acknowledged_index = 0  # highest index that any client was told of
        self.bundles = Bundles(self.fail)
        self.counts: dict[str, int] = {}
        self.conditions: Callable[[], Iterable[str]] = tuple  # what is wrong right now

    def fail(self, what: str, traceback: str = "") -> None:
        """Note a breach; raised at the next step, outside of the product's own exception handling."""
        if self.violation is None:
            self.violation = Violation(what, traceback)
            self._note(f"VIOLATION {what}\n{traceback}")

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def happened(self, what: str) -> None:
        """Count it, and what was wrong at the time."""
        self.count(what)
        for condition in self.conditions():
            self.count(f"{what} during {condition}")

    # -- lives

    def born(self, life: Life) -> None:
        """A process begins, with what it found on its disk."""
        self._views[life] = _View()
        self._by_process[life.process] = life
        self._look(life)

    def died(self, life: Life) -> None:
        """A process ended."""
        self._views.pop(life, None)
        self._by_process.pop(life.process, None)

    def stopped(self, life: Life, exc: BaseException) -> None:
        """A process ended by itself."""
        if isinstance(exc, Corrupt) and life.node.platter.lost and "start it with -rejoin" in str(exc):
            return
        if "space left on the simulated device" in str(exc):
            return
        self.fail(f"{life.name} stopped by itself: {type(exc).__name__}: {exc}")

    # -- every step

    def after(self, owner: Process | None) -> None:
        """A callback has run."""
        life = None if owner is None else self._by_process.get(owner)
        if life is not None:
            self._look(life)
        if self.violation is not None:
            raise self.violation

    def ended(self, task: SimTask) -> None:
        """A task has ended."""
        self.mishaps.ended(task)

    def _look(self, life: Life) -> None:
        if life.log.failed.done():
            return  # after a failure the memory of a node is not to be trusted, its disk is
        view, core, entries = self._views[life], life.engine._core, life.journal._contents.entries
        last = entries[-1][1:] if entries else (0, 0)
        term, leads = core.term(), core.is_leader()
        matches = tuple(core.match_index(peer) for peer in life.engine._guard.peers) if leads else ()
        seen = (last, term, leads, core.applied_index(), matches)
        if seen == view.seen:
            return
        view.seen = seen
        self._check_log(life, view, entries)
        if leads:
            self._check_matches(life)
        if leads and term > view.leads:
            view.leads = term
            self._check_leader(life, term, view)
        self._check_state(life, view, core.applied_index())

    def _check_log(self, life: Life, view: _View, entries: list[tuple[bytes, int, int]]) -> None:
        """Log matching: an entry of one index and term is the same everywhere, and so is everything before it."""
        if not entries:
            return
        first = entries[0][1]
        for position in range(len(entries) - 1, -1, -1):
            command, index, term = entries[position]
            if view.terms.get(index) == term:
                break
            view.terms[index] = term
            if position:
                known = self._entries.setdefault((index, term), (command, entries[position - 1][2]))
                if known != (command, entries[position - 1][2]):
                    self.fail(f"the log of {life.name} does not match at index {index} of term {term}")
        if entries[-1][1] < view.span[1] or first > view.span[0]:
            view.terms = {each: term for each, term in view.terms.items() if first <= each <= entries[-1][1]}
        view.span = (first, entries[-1][1])

    def _check_leader(self, life: Life, term: int, view: _View) -> None:
        """Election safety and leader completeness."""
        self.happened("election")
        other = self._leaders.setdefault(term, life.name)
        if other != life.name:
            self.fail(f"{other} and {life.name} both lead term {term}")
        voters = sorted(voter for (when, voter), whom in self._votes.items() if (when, whom) == (term, life.name))
        if 2 * len(voters) <= len(self._nodes):
            self.fail(f"{life.name} leads term {term} with the votes of {voters} alone")
        first = life.engine._core.first()[1]
        for index, commitment in self._committed.items():
            # A candidate of long ago may find its last vote only now, when later terms have committed what it lacks.
            if commitment.under < term and index > first and view.terms.get(index) != commitment.term:
                self.fail(f"{life.name} leads term {term} without entry {index}, which was committed")
                return

    def _check_matches(self, life: Life) -> None:
        """What a leader believes that its followers have, they have."""
        core = life.engine._core
        for peer in life.engine._guard.peers:
            index = core.match_index(peer)
            entry = core.entry(index)
            platter = self._nodes[peer].platter
            if platter.lost or entry is None or index <= 1:
                continue
            if platter.durable.contents.term > core.term():
                continue  # it had what it acknowledged, until it followed a later leader
            if not platter.durable.holds(index, entry[2]):
                self.fail(
                    f"{life.name}, leader of term {core.term()}, counts on entry {index} at {peer}, which lacks it"
                )

    def _check_state(self, life: Life, view: _View, applied: int) -> None:
        state = life.state
        if applied < view.applied:
            self.fail(f"{life.name} applied {view.applied} and then {applied}")
        if state.index < view.index:
            self.fail(f"the index of {life.name} went back from {view.index} to {state.index}")
        known = self._committed.get(applied)
        if known is not None and known.state is not None and known.state is not state and applied != view.applied:
            self._compare(life, applied, known, state, whole=not view.applied or applied % _COMPARE_EVERY == 0)
        view.applied, view.index = applied, state.index

    def _compare(self, life: Life, index: int, known: _Commitment, state: CAState, *, whole: bool) -> None:
        theirs = known.state
        if theirs is None:
            return
        same = (theirs.index, theirs.ca_epoch, theirs.roots, theirs.ledger.row_count) == (
            state.index,
            state.ca_epoch,
            state.roots,
            state.ledger.row_count,
        )
        if same and whole:
            if known.digest is None:
                known.digest = _digest(theirs)
            same = known.digest == _digest(state)
            self.count("states compared")
        if not same:
            self.fail(f"after entry {index} the state of {life.name} is not that of the first who applied it")

    # -- commits

    def commits(self, life: Life, index: int, command: bytes, term: int) -> None:
        """``life`` is about to apply an entry."""
        known = self._committed.get(index)
        if known is not None:
            if (known.command, known.term) != (command, term):
                self.fail(
                    f"{life.name} applies another entry {index} than the one that was committed in term {known.term}"
                )
            return
        if index != self.newest + 1 and self.newest:
            self.fail(f"{life.name} commits entry {index} after entry {self.newest}")
        self.newest = max(self.newest, index)
        self._committed[index] = _Commitment(term, command, life.engine._core.term())
        self._check_durable(life, index, term)

    def _check_durable(self, life: Life, index: int, term: int) -> None:
        holders = [name for name in self._nodes if self._held(name, index, term)]
        if index > 1 and 2 * len(holders) <= len(self._nodes):
            self.fail(f"{life.name} commits entry {index} of term {term}, which only {holders} hold for certain")

    def _held(self, name: str, index: int, term: int) -> bool:
        """Whether a voter holds the entry; what one acknowledged before it lost its disk was true then."""
        platter = self._nodes[name].platter
        durable = platter.before_wipe if platter.lost else platter.durable
        return durable.voter and durable.holds(index, term)

    def imported(self, node: str, entries: list[tuple[bytes, int, int]], *, term: int) -> None:
        """Every node begins anew with the log of ``node``, in ``term``: all of it is committed now, if it was not before."""
        if not entries or entries[-1][1] < self.newest:
            self.fail(f"what is imported from {node} ends before entry {self.newest}, which was committed")
            return
        # Whoever promised something beyond that term was not exported, and nobody of the new generation hears of it.
        self._votes = {place: whom for place, whom in self._votes.items() if place[0] <= term}
        for command, index, entry_term in entries:
            known = self._committed.get(index)
            if known is not None and index > entries[0][1] and (known.command, known.term) != (command, entry_term):
                self.fail(f"what is imported from {node} has another entry {index} than the one that was committed")
            if index == self.newest + 1:
                self._adopt(node, command, index, entry_term, under=term)
        self.began = self.newest

    def _adopt(self, node: str, command: bytes, index: int, term: int, *, under: int) -> None:
        before = self._committed.get(index - 1)
        state = CAState() if before is None or before.state is None else before.state
        commitment = self._committed[index] = _Commitment(term, command, under, state=state)
        self.newest = index
        if command[:1] == COMMAND:
            commitment.state, commitment.result = apply(state, decode_command(command[1:]))
            self._take_effect(node, index, command[1:], commitment.result, commitment.state)

    def applied(self, life: Life, index: int, result: object, state: CAState) -> None:
        """``life`` has applied an entry."""
        known = self._committed[index]
        if known.state is not None:
            if known.result != result:
                self.fail(f"entry {index} had another result on {life.name} than on the first who applied it")
            self._compare(life, index, known, state, whole=index % _COMPARE_EVERY == 0)
            return
        known.result, known.state = result, state
        if known.command[:1] == COMMAND:
            self._take_effect(life.name, index, known.command[1:], result, state)

    def _take_effect(self, node: str, index: int, body: bytes, result: object, state: CAState) -> None:
        """The first application of a command."""
        if not self._open[body]:
            self.fail(f"{node} applies entry {index}, whose proposer was told that it never commits")
        took = result.index if isinstance(result, Applied) else 0
        self._bodies[body] = took
        if state.roots and sum(root.active for root in state.roots) != 1:
            self.fail(f"after entry {index} there is not exactly one active root")
        command = decode_command(body)
        name = f"{type(command).__name__} {'applied' if took else 'refused'}"
        if isinstance(command, IssueLeaves | RecordSerials | ExpireLeaves):
            self.count(name)
        else:
            self.happened(name)
        if isinstance(command, IssueLeaves) and took:
            for order in command.orders:
                self._book(order, took)
        elif isinstance(command, RestoreCommit) and took:
            self.restored.add(took)
        elif isinstance(command, ActivateRoot | SetConfiguration | SetIntermediate) and took:
            self.effects.setdefault(command.request_id, []).append(took)
            self.replaced[took] = self._configured_at(index - 1)
        self.bundles.changed(state, at=command.at)

    def _configured_at(self, index: int) -> int:
        """Index of the configuration that was in force after an entry; 0 for none."""
        known = self._committed.get(index)
        configuration = None if known is None or known.state is None else known.state.configuration
        return 0 if configuration is None else configuration.modify_index

    def _book(self, order: LeafOrder, index: int) -> None:
        self.count("leaves booked")
        if order.serial is None:
            place = index, order.service
            self._unnumbered[place] += 1
            self._begun[place] = min(self._began[order.issue_id], self._begun.get(place, float("inf")))
            return
        if order.serial in self._booked:
            self.fail(f"serial {order.serial} is booked twice")
        self._booked[order.serial] = order.service

    def acknowledged(self, life: Life, body: bytes, result: object) -> None:
        """A proposer was told that its command is committed."""
        took = self._bodies.get(body)
        if took is None:
            self.fail(f"{life.name} acknowledged a command that nobody applied")
        elif isinstance(result, Applied):
            self.told(result.index)
            if took != result.index and decode_command(body).__class__ is IssueLeaves:
                self.fail(f"{life.name} acknowledged index {result.index} for what took effect at {took}")

    def disowned(self, life: Life, body: bytes) -> None:
        """A proposer was told that its command never commits: not by this proposal of it."""
        self._open[body] -= 1
        if not self._open[body] and body in self._bodies:
            self.fail(f"{life.name} disowned a command that is committed")

    def offered(self, body: bytes) -> None:
        """A command is proposed; the same bytes may be again, if a change is retried within the second or a step repeated."""
        self._open[body] += 1

    def told(self, index: int) -> None:
        """A client was told of an index."""
        self.acknowledged_index = max(self.acknowledged_index, index)

    def state_at_most(self, index: int) -> bool:
        """Whether ``index`` was reached by some committed command."""
        return any(each.state is not None and each.state.index >= index for each in self._committed.values())

    # -- promises on the wire

    def sent(self, sender: str, peer: str, message: Message) -> None:
        """A message leaves ``sender``."""
        kind = message["type"]
        if kind == "response_vote":
            self._voted(sender, message["term"], peer)
        elif kind == "request_vote":
            self._voted(sender, message["term"], sender)
        elif kind == "next_node_idx" and message["success"]:
            durable = self._nodes[sender].platter.durable
            upto = message["next_node_idx"] - 1
            life = self._nodes[sender].life
            term = None if life is None else self._term_at(life, upto)
            if upto > 1 and term is not None and not durable.holds(upto, term):
                self.fail(f"{sender} acknowledges entry {upto} to {peer} before it is durable")

    def _term_at(self, life: Life, index: int) -> int | None:
        entry = life.engine._core.entry(index)
        return None if entry is None else int(entry[2])

    def _voted(self, voter: str, term: int, candidate: str) -> None:
        known = self._votes.setdefault((term, voter), candidate)
        if known != candidate:
            self.fail(f"{voter} votes for {known} and for {candidate} in term {term}")
        durable = self._nodes[voter].platter.durable.contents
        if (durable.term, durable.vote) != (term, candidate) and durable.term <= term:
            self.fail(f"{voter} votes for {candidate} in term {term} before the vote is durable")

    def hears(self, life: Life, peer: str, message: Message) -> tuple[int, int, int]:
        """A message arrives; what it must not change if it proves nothing: term, what ``peer`` has, and votes."""
        core = life.engine._core
        return core.term(), core.match_index(peer), core._SyncObj__votesCount

    def heard(self, life: Life, peer: str, message: Message, before: tuple[int, int, int]) -> None:
        """It was handled."""
        kind, (term, match, votes) = message["type"], before
        _, match_now, votes_now = self.hears(life, peer, message)
        if kind == "next_node_idx" and message["term"] != term and match_now > match:
            self.fail(f"{life.name} counts in term {term} what {peer} acknowledged in term {message['term']}")
        if kind != "response_vote":
            return
        vote = (life.process, message["term"], peer)
        if vote in self._votes_heard and votes_now > votes:
            self.fail(f"{life.name} counts the vote of {peer} in term {message['term']} again")
        self._votes_heard.add(vote)

    # -- leaves

    def proposed(self, command: IssueLeaves) -> None:
        """Leaves are about to be booked."""
        for order in command.orders:
            if order.serial is None:
                self._began[order.issue_id] = self._loop.time()
            else:
                self._proposed[order.serial] = self._loop.time()

    def received(self, life: Life, answer: LeavesSigned) -> None:
        """A node received what it asked to be signed."""
        for leaf in answer.results:
            if isinstance(leaf, IssuedLeaf):
                self._received(life, leaf)

    def _received(self, life: Life, leaf: IssuedLeaf) -> None:
        self.count("leaves received")
        self.told(leaf.index)
        place = leaf.index, leaf.service
        numbered = self._booked.get(leaf.serial) == leaf.service
        if not numbered and not self._unnumbered[place]:
            self.fail(f"{life.name} received a leaf for {leaf.service} that is not booked")
            return
        if leaf.serial in self._handed_out:
            self.fail(f"serial {leaf.serial} was handed out twice")
        self._handed_out.add(leaf.serial)
        if not numbered:
            self._unnumbered[place] -= 1
            self.count("leaves received from the external server")
        took = self._loop.time() - (self._proposed[leaf.serial] if numbered else self._begun[place])
        if took > DELIVERED_WITHIN:
            self.fail(f"{life.name} received a leaf {took:.1f} s after its proposal")
        self.bundles.issued(leaf)


def _digest(state: CAState) -> str:
    digest = hashlib.sha256()
    for piece in encode_state(state):
        digest.update(piece)
    return digest.hexdigest()
