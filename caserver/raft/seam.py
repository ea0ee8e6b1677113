"""Every touch on pysyncobj: what is asserted, replaced and read of it lives here and nowhere else.

The package stays as it was published. ``Core`` is its ``SyncObj`` with the parts replaced that cannot be trusted:

* nothing is unpickled, anywhere (``pysyncobj.pickle`` and ``pysyncobj.journal`` load functions raise);
* the journal is handed in as an object, time comes from ``bind_monotonic``;
* election timeouts, sending of entries, applying, compaction and the command queue are the engine's own;
* the commit rule is counted by peer, not by entry, which says the same and costs nothing per entry.

What is left is the protocol itself: terms, votes, log matching. ``assert_names`` proves at start-up that
the private names used here exist in the installed version, so that a changed package is a clear message and not a
cluster that forgets.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from types import CodeType
from typing import Any, NoReturn, Protocol
from zlib import crc32

import pysyncobj.journal
import pysyncobj.pickle
import pysyncobj.syncobj
from pysyncobj import FAIL_REASON, SyncObj, SyncObjConf
from pysyncobj.journal import Journal
from pysyncobj.node import Node
from pysyncobj.transport import Transport
from pysyncobj.version import VERSION

from caserver.errors import Corrupt
from caserver.raft.ports import Message

Entry = tuple[bytes, int, int]  # command, index, term

PYSYNCOBJ_VERSION = "0.3.17"
FIRST_INDEX = 1  # of the entry that pysyncobj puts into an empty log
SUCCESS, DISCARDED, UNKNOWN_OUTCOME = FAIL_REASON.SUCCESS, FAIL_REASON.DISCARDED, FAIL_REASON.UNKNOWN_OUTCOME
COMMAND = b"\x00"  # first byte of an entry: a state machine's command
CONTROL = b"\x01"  # a no-op; with bytes behind it, one of our own control entries

_FOLLOWER, _LEADER = 0, 2
_HINT_SECONDS = 1.0  # between two notes in the journal of how far the log is committed
_FIELDS = (
    "commandsWaitingCommit",
    "connectedNodes",
    "lastResponseTime",
    "newAppendEntriesTime",
    "noopIDx",
    "raftCommitIndex",
    "raftCurrentTerm",
    "raftElectionDeadline",
    "raftLastApplied",
    "raftLeader",
    "raftLog",
    "raftMatchIndex",
    "raftNextIndex",
    "raftState",
    "serializer",
    "transport",
)
_METHODS = (
    "applyLogEntries",
    "deleteEntriesFrom",
    "doApplyCommand",
    "generateRaftTimeout",
    "loadDumpFile",
    "onBecomeLeader",
    "onMessageReceived",
    "sendAppendEntries",
    "sendNextNodeIdx",
    "setCurrentTerm",
    "setState",
    "tryLogCompaction",
)


def assert_names(version: str = VERSION) -> None:
    """RuntimeError unless pysyncobj, installed as ``version``, is that with the private names that this module drives."""
    fault = None
    if version != PYSYNCOBJ_VERSION:
        fault = f"version {version} is installed"
    mentioned = set(_names_in(SyncObj))
    missing = [name for name in _FIELDS if f"_SyncObj__{name}" not in mentioned]
    missing += [name for name in _METHODS if not callable(getattr(SyncObj, f"_SyncObj__{name}", None))]
    missing += [name for name in ("createJournal", "monotonicTime") if not hasattr(pysyncobj.syncobj, name)]
    if missing:
        fault = f"its SyncObj lacks {', '.join(missing)}"
    if fault:
        raise RuntimeError(
            f"pysyncobj {PYSYNCOBJ_VERSION}, unmodified, is needed, but {fault}; install exactly that version"
        )


def _names_in(owner: type) -> Iterator[str]:
    for member in vars(owner).values():
        code = getattr(member, "__code__", None)
        if isinstance(code, CodeType):
            yield from code.co_names


class PickleForbidden(RuntimeError):
    """pysyncobj tried to unpickle something."""


def _forbidden(*_: object, **__: object) -> NoReturn:
    raise PickleForbidden("unpickling is switched off in this process")


_monotonic: Callable[[], float] = time.monotonic
_original_create_journal = pysyncobj.syncobj.createJournal


def bind_monotonic(monotonic: Callable[[], float]) -> None:
    """Make ``monotonic`` the clock of every ``SyncObj`` of this process (one virtual clock drives a whole simulation)."""
    global _monotonic  # noqa: PLW0603 - pysyncobj looks its clock up in its module: there is one for the process
    _monotonic = monotonic


def _bound_monotonic() -> float:
    return _monotonic()


def _is_true(record: logging.LogRecord) -> bool:
    """Whether a log line of pysyncobj's tells the truth: the journal only hides what it believes it truncates."""
    return not str(record.msg).startswith("truncating already-applied log entries")


def _create_journal(journal: Any) -> Any:
    return journal if isinstance(journal, Journal) else _original_create_journal(journal)


def install() -> None:
    """Put the hooks into pysyncobj's modules, once or many times; RuntimeError as ``assert_names``."""
    assert_names()
    pysyncobj.pickle.loads = pysyncobj.pickle.load = _forbidden
    pysyncobj.journal.loads = _forbidden  # bound there by name
    pysyncobj.syncobj.createJournal = _create_journal
    pysyncobj.syncobj.monotonicTime = _bound_monotonic
    logging.getLogger(pysyncobj.syncobj.__name__).addFilter(_is_true)


class Peer(Node):  # type: ignore[misc] # pysyncobj carries no types
    """A node known by its name alone; hashes alike in every process, so that sets of peers iterate alike."""

    def __init__(self, id: str, **fields: object) -> None:  # noqa: A002 - pysyncobj's name
        super().__init__(id, **fields)
        self._hash = crc32(id.encode())

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Peer) and other.id == self.id


class Hooks(Protocol):
    """What ``Core`` asks of the engine around it."""

    def send(self, peer: str, message: Message) -> bool:
        """Send what the protocol wants sent."""
        ...

    def apply(self, index: int, command: bytes) -> object:
        """Apply one committed entry (with its kind byte)."""
        ...

    def send_entries(self) -> None:
        """Bring every connected peer closer to the end of the log."""
        ...

    def rearm_election(self) -> None:
        """A sign of life was seen: wait a new election timeout."""
        ...

    def became_leader(self) -> None:
        """The no-op of this term is in the log; nothing was sent or counted yet."""
        ...


class _HookTransport(Transport):  # type: ignore[misc] # pysyncobj carries no types
    def __init__(self, core: Any, node: Node, peers: Sequence[Node]) -> None:
        super().__init__(core, node, peers)
        self._hooks: Hooks = core.hooks

    def send(self, node: Node, message: Message) -> bool:
        return self._hooks.send(node.id, message)


class _NoPoller:
    def poll(self, timeout: float) -> None:
        """There are no sockets of pysyncobj's own."""


class _NoSerializer:
    """Stands where pysyncobj keeps its pickling, forking serializer; snapshots are the engine's."""

    def setTransmissionData(self, data: object) -> bool:  # noqa: N802 - pysyncobj's name
        return False

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise Corrupt(f"pysyncobj asked its serializer for {name}, which never happens unmodified")


class Core(SyncObj):  # type: ignore[misc] # pysyncobj carries no types
    """The protocol of pysyncobj, with its privates behind typed methods.

    Methods only, no properties: ``SyncObj.__init__`` reads every attribute of the half-built object.
    """

    def __init__(
        self, node: str, peers: Sequence[str], *, hooks: Hooks, journal: Journal, heartbeat: float, timeout: float
    ) -> None:
        """``timeout`` is the longest election timeout; both durations in seconds."""
        install()
        self.hooks = hooks
        self._peers = {each: Peer(each) for each in peers}
        self._fallback, self._hint_at = timeout, _monotonic() + _HINT_SECONDS
        configuration = SyncObjConf(
            autoTick=False,
            appendEntriesUseBatch=True,  # the engine flushes; the other mode opens a pipe
            appendEntriesPeriod=heartbeat,
            raftMinTimeout=timeout * 0.5,
            raftMaxTimeout=timeout,
            leaderFallbackTimeout=timeout,  # CheckQuorum; the default of 30 s lets an isolated leader believe in itself
            connectionTimeout=timeout,
            commandsWaitLeader=False,
            commandsQueueSize=1,  # unused: the engine has its own
            dynamicMembershipChange=False,
            useFork=False,
            journalFile=journal,
            fullDumpFile=None,
        )
        super().__init__(
            Peer(node), [*self._peers.values()], configuration, nodeClass=Peer, transportClass=_HookTransport
        )
        self._poller = _NoPoller()
        self._SyncObj__serializer = _NoSerializer()

    # -- what the engine replaces

    def _SyncObj__applyLogEntries(self) -> bool:  # noqa: N802
        """Apply what is committed and tell those who wait for it; False: nothing is to be sent on account of it."""
        applied, committed = self.applied_index(), self.commit_index()
        if applied >= committed:
            return False
        log, waiting = self._SyncObj__raftLog, self._SyncObj__commandsWaitingCommit
        before = log[0][1] - 1
        for command, index, term in log[applied - before : committed - before]:
            result = self.hooks.apply(index, command)
            self._SyncObj__raftLastApplied = index
            for appended_in, decided in waiting.pop(index, ()):
                if appended_in == term:
                    decided(result, SUCCESS)
                else:
                    decided(None, DISCARDED)
        return False

    def _SyncObj__doApplyCommand(self, command: bytes) -> NoReturn:  # noqa: N802
        raise Corrupt("pysyncobj tried to apply an entry in its own way, which would unpickle it")

    def _SyncObj__generateRaftTimeout(self) -> float:  # noqa: N802
        self.hooks.rearm_election()
        return math.inf  # the engine decides when to campaign, after a pre-vote

    def _SyncObj__sendAppendEntries(self) -> None:  # noqa: N802
        self._SyncObj__newAppendEntriesTime = _monotonic() + self.conf.appendEntriesPeriod
        self.hooks.send_entries()

    def _SyncObj__onBecomeLeader(self) -> None:  # noqa: N802
        # The no-op must be as durable as the leader's own vote for it before anything counts it.
        super()._SyncObj__onBecomeLeader()
        self.hooks.became_leader()

    def _SyncObj__tryLogCompaction(self) -> None:  # noqa: N802
        """Never from inside: it would pickle, in a fork or on the spot."""

    def _SyncObj__loadDumpFile(self, clearJournal: bool) -> NoReturn:  # noqa: FBT001, N802, N803
        raise Corrupt("pysyncobj tried to load a snapshot of its own format")

    def _checkCommandsToApply(self) -> None:  # noqa: N802
        """Its queue is not used: it forwards commands to leaders without ever telling the outcome."""

    # -- what the engine reads

    def term(self) -> int:
        """The current term."""
        return int(self._SyncObj__raftCurrentTerm)

    def is_leader(self) -> bool:
        """Whether this node believes it leads its term."""
        return bool(self._SyncObj__raftState == _LEADER)

    def leader(self) -> str | None:
        """Name of the last known leader."""
        return None if self._SyncObj__raftLeader is None else str(self._SyncObj__raftLeader.id)

    def noop_index(self) -> int | None:
        """Index of the no-op of the last term that this node led."""
        index: int | None = self._SyncObj__noopIDx
        return index

    def commit_index(self) -> int:
        """Highest index known committed."""
        return int(self._SyncObj__raftCommitIndex)

    def applied_index(self) -> int:
        """Highest index applied."""
        return int(self._SyncObj__raftLastApplied)

    def first(self) -> Entry:
        """The oldest entry kept."""
        entry: Entry = self._SyncObj__raftLog[0]
        return entry

    def last(self) -> Entry:
        """The newest entry."""
        entry: Entry = self._SyncObj__raftLog[-1]
        return entry

    def entry(self, index: int) -> Entry | None:
        """The entry at ``index``, None if it is compacted away or not there yet."""
        first = self.first()[1]
        if not first <= index <= self.last()[1]:
            return None
        entry: Entry = self._SyncObj__raftLog[index - first]
        return entry

    def entries(self, start: int, size: int) -> list[Entry]:
        """Entries from ``start`` on, at least one if there is one, about ``size`` bytes of them."""
        position, end = start - self.first()[1], len(self._SyncObj__raftLog)
        found: list[Entry] = []
        while position < end and size > 0:
            found.append(self._SyncObj__raftLog[position])
            size -= len(found[-1][0]) + 16  # index and term count too, or no-ops would be free
            position += 1
        return found

    def next_index(self, peer: str) -> int:
        """Index of the entry to send to ``peer`` next (leader only)."""
        return int(self._SyncObj__raftNextIndex[self._peers[peer]])

    def match_index(self, peer: str) -> int:
        """Highest index known durable at ``peer`` (leader only)."""
        return int(self._SyncObj__raftMatchIndex.get(self._peers[peer], 0))

    def last_response(self, peer: str) -> float:
        """Monotonic instant of the last answer of ``peer`` to this leader."""
        return float(self._SyncObj__lastResponseTime.get(self._peers[peer], -math.inf))

    def heartbeat_due(self) -> float:
        """Monotonic instant at which a leader sends again."""
        return float(self._SyncObj__newAppendEntriesTime)

    # -- what the engine does to it

    def deliver(self, peer: str, message: Message) -> None:
        """Let the protocol act on a message that passed the guard."""
        self._SyncObj__onMessageReceived(self._peers[peer], message)

    def step(self, *, campaign: bool) -> None:
        """One tick: campaign if told to, count commits, apply, send heartbeats."""
        now = _monotonic()
        if now >= self._hint_at:
            self._hint_at = now + _HINT_SECONDS
            self._SyncObj__raftLog.onOneSecondTimer()
        if campaign:
            self._SyncObj__raftElectionDeadline = -math.inf
            self._onTick(0)
            self._SyncObj__raftElectionDeadline = math.inf
            return
        if self._SyncObj__raftState == _LEADER:
            self._count_commits()
            self._require_quorum(now)
        self._SyncObj__applyLogEntries()
        if self._SyncObj__raftState == _LEADER and now > self._SyncObj__newAppendEntriesTime:
            self._SyncObj__sendAppendEntries()

    def can_commit(self) -> bool:
        """Whether a leader may count more as committed than it does."""
        return self.is_leader() and self._held_by_majority() > self.commit_index()

    def _held_by_majority(self) -> int:
        """The last index that a majority holds, this node with it."""
        last, held = self.last()[1], sorted(self._SyncObj__raftMatchIndex.values())
        needed = (len(self._peers) + 1) // 2  # of the others, to be more than half with this node
        return min(last, held[-needed]) if needed else last

    def _count_commits(self) -> None:
        """Commit what a majority holds up to an entry of this term: terms only grow along the log."""
        index = self._held_by_majority()
        if index <= self.commit_index():
            return
        entry = self.entry(index)
        if entry is not None and entry[2] == self._SyncObj__raftCurrentTerm:
            self._SyncObj__raftCommitIndex = index
            self._SyncObj__raftLog.setRaftCommitIndex(index)

    def _require_quorum(self, now: float) -> None:
        """A leader that a majority has not answered for an election timeout leads nobody."""
        since = now - self._fallback
        alive = 1 + sum([at > since for at in self._SyncObj__lastResponseTime.values()])
        if 2 * alive <= len(self._peers) + 1:
            self._SyncObj__setState(_FOLLOWER)
            self._SyncObj__raftLeader = None

    def link(self, peer: str, *, up: bool) -> None:
        """Note that ``peer`` can or cannot be sent to."""
        transport = self._SyncObj__transport
        (transport._onNodeConnected if up else transport._onNodeDisconnected)(self._peers[peer])  # noqa: SLF001

    def append(self, entry: bytes, decided: Callable[[object, int], None] | None) -> int:
        """Append to the leader's log; ``decided(result, FAIL_REASON)`` is called when its index is. Returns the index."""
        index, term = self.last()[1] + 1, self.term()
        self._SyncObj__raftLog.add(entry, index, term)
        if decided is not None:
            self._SyncObj__commandsWaitingCommit[index].append((term, decided))
        return index

    def send_now(self) -> None:
        """Send to all peers, entries or a heartbeat (leader only)."""
        self._SyncObj__sendAppendEntries()

    def send_soon(self) -> None:
        """Let the next step send to all peers."""
        self._SyncObj__newAppendEntriesTime = -math.inf

    def set_next_index(self, peer: str, index: int) -> None:
        """Resend from ``index`` on."""
        self._SyncObj__raftNextIndex[self._peers[peer]] = index

    def forget_match(self, peer: str) -> None:
        """``peer`` lost its log: nothing is durable there."""
        self._SyncObj__raftMatchIndex[self._peers[peer]] = 0

    def step_down(self, term: int) -> None:
        """Follow nobody in ``term``, which may be the current one."""
        if term > self.term():
            self._SyncObj__setCurrentTerm(term, None)
        self._SyncObj__setState(_FOLLOWER)
        self._SyncObj__raftLeader = None

    def restored(self, index: int) -> None:
        """The state machine was loaded with the state after ``index``."""
        self._SyncObj__raftLastApplied = index
        self._SyncObj__raftCommitIndex = max(index, self.commit_index())
        self._SyncObj__raftLog.setRaftCommitIndex(self._SyncObj__raftCommitIndex)
        waiting = self._SyncObj__commandsWaitingCommit
        for passed in [each for each in waiting if each <= index]:
            for _, decided in waiting.pop(passed):
                decided(None, UNKNOWN_OUTCOME)

    def keep_committed(self, index: int) -> None:
        """Undo that a repeated message, which shows a shorter log, took the commit index back."""
        self._SyncObj__raftCommitIndex = max(index, self.commit_index())

    def answer(self, peer: str, *, next_index: int, success: bool, reset: bool) -> None:
        """Tell the leader where this log stands."""
        self._SyncObj__sendNextNodeIdx(self._peers[peer], reset=reset, nextNodeIdx=next_index, success=success)
