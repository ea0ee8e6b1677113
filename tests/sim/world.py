"""One simulated cluster from its seed to its verdict.

The same seed, steps and nodes give the same run, message by message, in every process with the same PYTHONHASHSEED
(``scripts/sim`` fixes it). A run is a few hundred steps of clients and faults, then everything is healed and the cluster
must come to rest: all members, one state, and leaves through every node.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import logging
import random
import statistics
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

import pysyncobj.syncobj
import structlog

from caserver.config.acl_settings import ACLSettings
from caserver.environment import SystemClock
from caserver.errors import CaserverError
from caserver.fields import Secret
from caserver.raft.seam import bind_monotonic, install
from caserver.state.lifecycle import due
from tests.sim.faults import Faults
from tests.sim.loop import OWNER, VirtualLoop
from tests.sim.mishaps import named, traced
from tests.sim.network import Wires
from tests.sim.node import EPOCH, Life, Node, Parts, Setting, hash_of
from tests.sim.server import SimServer
from tests.sim.witness import Violation, Witness
from tests.sim.workload import Clients, GaveUp
from tests.testkit.fakes import SeededEntropy

STEP_MEAN = 0.04  # seconds between two steps
PRESSING_MEAN = 0.02
CLIENTS = 0.8  # share of steps in which a client acts; in the others something breaks, or is mended
REST_SECONDS = 150.0  # within which a healed cluster comes to rest; a clock that jumped is doubted for 60
GUARDED = 0.25  # share of runs in which tokens are asked for
MASTER = Secret("6c1fa2f8-7f7c-4b3b-9b0c-1d8f8d4e2a57")
STEPS = 200
SERVER_LATENCY = 0.003  # seconds of a request to the external server
TELLING = frozenset(
    {"snapshot_written", "torn_tail_cut", "rejoin_started_over", "promoted", "the clock is not trusted"}
)
TRUNCATING = "truncating already-applied log entries"


@dataclass
class Report:
    """What a run came to."""

    seed: int
    steps: int
    nodes: int
    trace: str  # hash over every line of it
    lines: int
    seconds: float  # virtual
    counts: dict[str, int]
    violation: str | None = None
    traceback: str = ""  # of the exception that was the violation, if one was
    step: int = 0  # in which the violation showed
    kept: list[str] = field(default_factory=list)
    restores: bool = False

    @property
    def verdict(self) -> str:
        """For people."""
        if self.violation is None:
            return "no violation"
        return f"VIOLATION in step {self.step} at {self.seconds:.3f} s: {self.violation}"

    @property
    def command(self) -> str:
        restores = " --restores" if self.restores else ""
        return f"scripts/sim --seed {self.seed} --steps {self.steps} --nodes {self.nodes}{restores}"


class _Trace:
    def __init__(self, loop: VirtualLoop, *, keep: bool) -> None:
        self._loop, self._keep = loop, keep
        self._hash = hashlib.sha256()
        self.lines = 0
        self.kept: list[str] = []

    def note(self, what: str) -> None:
        line = f"{self._loop.time():.6f} {what}\n"
        self._hash.update(line.encode())
        self.lines += 1
        if self._keep:
            self.kept.append(line)

    def digest(self) -> str:
        return self._hash.hexdigest()


class ServerClock:
    """The clock of the external server: right, as most nodes have it."""

    def __init__(self, loop: VirtualLoop, nodes: dict[str, Node]) -> None:
        self._loop, self._nodes = loop, nodes

    def now(self) -> datetime:
        ahead = statistics.median(node.clock.ahead for node in self._nodes.values())
        return EPOCH + timedelta(seconds=self._loop.time() + ahead)

    def monotonic(self) -> float:
        return self._loop.time()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class World:
    """See above; ``run`` once."""

    def __init__(
        self, seed: int, *, steps: int, nodes: int, parts: Parts, keep_trace: bool = False, restores: bool = False
    ) -> None:
        self.seed, self.steps = seed, steps
        self.loop = VirtualLoop()
        self.trace = _Trace(self.loop, keep=keep_trace)
        self.chance = random.Random(hash_of(seed, "world"))
        wires = Wires(self.loop, random.Random(hash_of(seed, "wires")), note=self.trace.note)
        self.nodes: dict[str, Node] = {}
        self.witness = Witness(self.loop, self.nodes, note=self.trace.note)
        wires.observers.append(self.witness.sent)
        if self.chance.random() < GUARDED and not parts.acl.enabled:
            parts = replace(parts, acl=ACLSettings(enabled=True, default_allow=False, initial_management=MASTER))
        names = tuple(f"n{number}" for number in range(1, nodes + 1))
        self.setting = Setting(
            loop=self.loop,
            wires=wires,
            witness=self.witness,
            chance=random.Random(hash_of(seed, "disks")),
            names=names,
            seed=seed,
            snapshot_every=self.chance.choice((8, 20, 40, 200)),
            parts=parts,
            note=self.trace.note,
            server=SimServer(
                ServerClock(self.loop, self.nodes),
                latency=SERVER_LATENCY,
                chance=random.Random(hash_of(seed, "server")),
                note=self.trace.note,
            ),
        )
        self.nodes.update({name: Node(name, self.setting) for name in names})
        skewed, rolling = self.chance.random() < 0.3, self.chance.random() < 0.3
        self.faults = Faults(self.setting, self.nodes, self.chance, skewed=skewed, rolling=rolling)
        entropy = SeededEntropy(hash_of(seed, "clients"))
        self.clients = Clients(self.setting, self.chance, entropy, lambda: self.faults.clocks_set)
        self.clients.guarded = parts.acl.enabled
        if restores:
            self.clients.restores = random.Random(hash_of(seed, "restores"))
        self.witness.conditions = self._conditions
        self.step = 0

    def _conditions(self) -> Iterator[str]:
        """What is wrong right now, for the counts of what happened meanwhile."""
        wires, server, nodes = self.setting.wires, self.setting.server, self.nodes.values()
        found = {
            "cut": bool(wires.cuts),
            "noise": wires.lost + wires.doubled > 0,
            "pause": any(life.process.paused for life in self.faults.lives),
            "node down": bool(self.faults.down),
            "wiped node": any(node.platter.lost for node in nodes),
            "server trouble": server.down is not None or server.lossy + server.stuck > 0,
            "clocks apart": len({node.clock.ahead for node in nodes}) > 1,
            "secrets apart": len({node.secrets for node in nodes}) > 1,
            "restore": any(life.state.restoring is not None for life in self.faults.lives),
            "change": any(life.state.change is not None for life in self.faults.lives),
        }
        return (what for what, holds in found.items() if holds)

    def run(self) -> Report:
        """Run to the end, or to the first violation."""
        self.loop.observer = self.witness
        self.loop.set_exception_handler(self.witness.mishaps.unhandled)
        violation: Violation | None = None
        try:
            self.loop.run_until_complete(self._live())
            gc.collect()  # what is only reachable by itself has not been asked how it ended
            violation = self.witness.violation
        except Violation as exc:
            violation = exc
        except Exception as exc:  # noqa: BLE001 - a defect of the simulator is told like one of the product
            violation = Violation(named(exc), traced(exc))
        finally:
            self._close()
        return Report(
            seed=self.seed,
            steps=self.steps,
            nodes=len(self.nodes),
            trace=self.trace.digest(),
            lines=self.trace.lines,
            seconds=self.loop.time(),
            counts=self.witness.counts,
            restores=self.clients.restores is not None,
            violation=None if violation is None else str(violation),
            traceback="" if violation is None else violation.traceback,
            step=self.step,
            kept=self.trace.kept,
        )

    def _close(self) -> None:
        """Let go of everything, quietly and whatever the run left behind."""
        self.loop.observer = None
        self.loop.set_exception_handler(lambda _loop, _context: None)
        for life in self.faults.lives:
            life.process.alive = False
            life.disk.close()
            life.process.paused = False
            self.loop.go_on(life.process)
        tasks = asyncio.all_tasks(self.loop)
        for task in sorted(tasks, key=hash):
            task.cancel()
        for _ in range(2):  # a violation in the very last step leaves a stop behind, which ends the first round
            with suppress(RuntimeError):
                self.loop.run_until_complete(_gathered(tasks))
        self.loop.close()

    async def _live(self) -> None:
        for node in self.nodes.values():
            node.start()
        if self.chance.random() < 0.7:
            await self._until(self._is_ready, seconds=30.0, what="the first leader has a root")
        while self.step < self.steps:
            self.step += 1
            if self.faults.lives and self.chance.random() < CLIENTS:
                self.clients.act(self._asked())
                await asyncio.sleep(self.chance.expovariate(1 / STEP_MEAN))
            else:
                self.faults.act()
                await self.faults.pass_lull()
                await self._press()
        await self._come_to_rest()

    async def _press(self) -> None:
        """Ask hard while the cluster finds out what broke: elections take half a second."""
        for _ in range(self.chance.choice((0, 0, 30))):
            if self.faults.lives:
                self.clients.act(self._asked())
            await asyncio.sleep(self.chance.expovariate(1 / PRESSING_MEAN))

    def _asked(self) -> Life:
        """Whom a client asks: any node, or one that believes it leads."""
        lives = self.faults.lives
        leading = [life for life in lives if life.log.leadership.is_leader]
        return self.chance.choice(leading if leading and self.chance.random() < 0.4 else lives)

    async def _until(self, holds: Callable[[], bool], *, seconds: float, what: str) -> None:
        end = self.loop.time() + seconds
        while not holds():
            if self.loop.time() > end:
                self.witness.fail(f"not within {seconds:g} s: {what}")
            await asyncio.sleep(0.2)

    def _is_ready(self) -> bool:
        return any(life.log.leadership.is_leader and life.state.active_root for life in self.faults.lives)

    # -- the end

    async def _come_to_rest(self) -> None:
        self.trace.note("heal")
        self.faults.heal()
        self.setting.server.heal()
        await self._until(self.faults.start_all, seconds=REST_SECONDS, what="all nodes run as members")
        await self._until(self._is_ready, seconds=REST_SECONDS, what="a leader has a root")
        await self._until(lambda: not self.clients.running, seconds=60.0, what="all clients have an answer")
        for name in sorted(self.nodes):
            await self._serves(name)
        await self._until(self.faults.start_all, seconds=REST_SECONDS, what="all nodes run on as members")
        if self.faults.slept:
            await self._until(self._is_tidy, seconds=REST_SECONDS, what="what is due is done")
        # What a doubtful clock held up is tried again after a minute at most.
        await self._until(self._is_one, seconds=REST_SECONDS, what="all nodes have the same state")
        self.clients.judge()
        self._judge_server()
        if not self.witness.state_at_most(self.witness.acknowledged_index):
            self.witness.fail(f"index {self.witness.acknowledged_index} was acknowledged and never reached")

    def _judge_server(self) -> None:
        """What stands at the external server signs, or is owed a clean-up, or belongs to a change under way.

        After a restore nobody knows what was made since the snapshot.
        """
        if self.witness.restored:
            return
        state = next(life.state for life in self.faults.lives)
        known = {retiring.epoch for retiring in state.retiring}
        known |= {root.epoch for root in state.roots if root.active}
        known |= set() if state.change is None else {state.change.epoch}
        orphans = {(path, epoch) for path, epoch in self.setting.server.standing if epoch not in known}
        if orphans:
            self.witness.fail(f"nobody knows of {sorted(orphans)} at the external server")

    async def _serves(self, name: str) -> None:
        """A leaf and a consistent read through this node."""
        end = self.loop.time() + REST_SECONDS
        while True:
            life = self.nodes[name].life
            if life is None:  # it was told to stop before everything healed, and was slow
                await self._until(self.faults.start_all, seconds=REST_SECONDS, what="all nodes run again")
                continue
            try:
                await self.clients.sign(life)
                await self.clients.read(life)
            except (CaserverError, GaveUp) as exc:
                if self.loop.time() > end:
                    self.witness.fail(f"{name} does not serve after everything healed: {exc}")
                await asyncio.sleep(1.0)
            else:
                return

    def _is_tidy(self) -> bool:
        """Old roots are pruned, leaves expired and providers retired, as far as time has come for that."""
        leading = [life for life in self.faults.lives if life.log.leadership.is_leader]
        return bool(leading) and all(
            due(life.state, int(life.node.clock.now().timestamp()) - 5) is None for life in leading
        )

    def _is_one(self) -> bool:
        lives = self.faults.lives
        return len({(life.engine.applied_index, life.state.index) for life in lives}) == 1 and all(
            life.state.change is None and life.state.restoring is None for life in lives
        )


async def _gathered(tasks: set[asyncio.Task[Any]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


@contextmanager
def _quiet(world: World) -> Iterator[None]:
    """Send what the product logs into the trace, and count what pysyncobj says of truncation."""

    def into_trace(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> Any:
        owner = OWNER.get()
        number = (
            ""
            if owner is None
            else next((n.name for n in world.nodes.values() if n.life and n.life.process is owner), "")
        )
        world.trace.note(f"log {number} {event['event']}")
        world.witness.mishaps.logged(event)
        if event["event"] in TELLING:
            world.witness.happened(event["event"])
        raise structlog.DropEvent

    def count(record: logging.LogRecord) -> bool:
        if str(record.msg).startswith(TRUNCATING):
            world.witness.count(TRUNCATING)
        return False

    install()
    logger = logging.getLogger(pysyncobj.syncobj.__name__)
    filters, logger.filters = logger.filters, [count]
    former = structlog.get_config()
    structlog.configure(processors=[into_trace], cache_logger_on_first_use=False)
    collecting = gc.isenabled()
    gc.disable()  # destructors at odd moments are the one thing that time does not order
    gc.freeze()  # what was there before is not looked at when the run is over
    try:
        yield
    finally:
        gc.unfreeze()
        structlog.configure(**former)
        logger.filters = filters
        bind_monotonic(SystemClock().monotonic)
        if collecting:
            gc.enable()


def simulate(
    seed: int,
    *,
    steps: int = STEPS,
    nodes: int = 3,
    parts: Parts | None = None,
    keep_trace: bool = False,
    restores: bool = False,
) -> Report:
    """Run one seed."""
    world = World(seed, steps=steps, nodes=nodes, parts=parts or Parts(), keep_trace=keep_trace, restores=restores)
    with _quiet(world):
        return world.run()
