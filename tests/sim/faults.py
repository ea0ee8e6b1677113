"""What goes wrong in a simulated cluster."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterator
from contextvars import Context, copy_context
from dataclasses import dataclass, field

from caserver.raft.guard import Standing
from tests.sim.disk import Death
from tests.sim.network import LATE_SECONDS
from tests.sim.node import TIMING, Life, Node, Setting
from tests.sim.operators import Operators

SETTLED = 5  # entries of a generation after which a node may lose its disk


@dataclass
class Faults:
    """Breaks things, and mends them."""

    setting: Setting
    nodes: dict[str, Node]
    chance: random.Random
    skewed: bool  # whether wall clocks go wrong in this run
    rolling: bool  # whether the cluster secret is changed in this run
    clocks_set: int = 0
    quiet_for: float = 0.0  # seconds in which nobody does anything
    slept: float = 0.0  # seconds that passed for all wall clocks at once
    _outside: Context = field(default_factory=copy_context)  # of no process

    def act(self) -> None:
        """One thing happens."""
        kinds: tuple[tuple[Callable[[], None], int], ...] = (
            (self.kill, 6),
            (self.crash_soon, 14),
            (self.start, 40),
            (self.pause, 8),
            (self.cut, 9),
            (self.isolate, 5),
            (self.split, 4),
            (self.mend, 16),
            (self.reset_link, 5),
            (self.noise, 4),
            (self.disk_full, 2),
            (self.stop, 4),
            (self.hand_over, 3),
            (self.swing, 14),
            (self.rush, 8),
            (self.wipe, 4),
            (self.lull, 4),
            (self.wall_clock, 4 if self.skewed else 0),
            (self.hours_pass, 3 if self.skewed else 0),
            (self.operators.recover, 3),
            (self.operators.roll, 60 if self.rolling else 0),
        )
        (kind,) = self.chance.choices([each for each, _ in kinds], weights=[weight for _, weight in kinds])
        kind()

    def __post_init__(self) -> None:
        self.operators = Operators(self.setting, self.nodes, self.chance, self._note)

    def lull(self) -> None:
        """Nothing happens for a while: what is put off falls due."""
        self.quiet_for = self.chance.choice((3.0, 12.0, 40.0)) * self.chance.uniform(0.5, 1.5)
        self._note(f"lull {self.quiet_for:.3f}")

    async def pass_lull(self) -> None:
        """Let it pass."""
        seconds, self.quiet_for = self.quiet_for, 0.0
        if seconds:
            await asyncio.sleep(seconds)

    # -- choices

    @property
    def lives(self) -> list[Life]:
        """Running processes, in a fixed order."""
        found = [self.nodes[name].life for name in sorted(self.nodes)]
        return [life for life in found if life is not None]

    @property
    def down(self) -> list[Node]:
        return [self.nodes[name] for name in sorted(self.nodes) if self.nodes[name].life is None]

    def _life(self) -> Life | None:
        """A running process: as often as not one that leads, for that is where it hurts."""
        leading = [life for life in self.lives if life.log.leadership.is_leader]
        if leading and self.chance.random() < 0.5:
            return self.chance.choice(leading)
        return self.chance.choice(self.lives) if self.lives else None

    def _pairs(self) -> Iterator[tuple[str, str]]:
        for a in sorted(self.nodes):
            for b in sorted(self.nodes):
                if a != b:
                    yield a, b

    def _note(self, what: str) -> None:
        self.setting.note(f"fault {what}")
        self.setting.witness.count(f"fault {what.split(maxsplit=1)[0]}")

    # -- processes

    def kill(self) -> None:
        """A process dies, or a machine."""
        life = self._life()
        if life is not None:
            death = self.chance.choice(list(Death))
            callbacks = self.chance.choice((0, self.chance.randint(1, 300)))
            self._note(f"kill {life.name} {death.value} after {callbacks}")
            self._after(life, callbacks, lambda: life.die(death))

    def crash_soon(self) -> None:
        """A process dies in the middle of one of its next writes."""
        life = self._life()
        if life is not None:
            steps, death = self.chance.randint(1, 12), self.chance.choice(list(Death))
            self._note(f"crash {life.name} in {steps} writes {death.value}")
            life.disk.crash_in(steps, lambda: life.die(death))

    def start(self) -> None:
        """A process that ended is started again."""
        if self.down:
            self.start_node(self.chance.choice(self.down))

    def start_node(self, node: Node, *, crash_in: int | None = None) -> None:
        """Start it as an operator would."""
        crash_in = self.chance.randint(1, 6) if crash_in is None and self.chance.random() < 0.1 else crash_in
        # An operator tries without the flag first, now and then; the node has to refuse by itself then.
        rejoin = node.platter.lost and (node.unfit is not None or self.chance.random() < 0.7)
        node.start(rejoin=rejoin, crash_in=crash_in)

    def stop(self) -> None:
        """A process is asked to stop and hands leadership over first."""
        life = self._life()
        if life is not None:
            self._note(f"stop {life.name}")
            self.setting.loop.create_task(_stop(life), context=life.process.context.copy())

    def hand_over(self) -> None:
        """An operator moves leadership."""
        life = self._life()
        if life is not None:
            self._note(f"hand over {life.name}")
            self.setting.loop.create_task(
                life.log.transfer_leadership(deadline=2.0), context=life.process.context.copy()
            )

    def swing(self) -> None:
        """Leadership goes away and comes back while what one node answers to the leader is held up."""
        leader, others = self._leader_and_others()
        if leader is None or len(others) == 1:
            return
        held, heir = (each.name for each in self.chance.sample(others, 2))
        away, back, mended = (self.chance.uniform(0.02, 0.3) for _ in range(3))
        self._note(f"swing {leader.name} {heir} without {held}")
        self.setting.wires.cut(held, leader.name)
        self._later(away, lambda: self._move_leadership(to=heir))
        self._later(away + back, lambda: self._move_leadership(to=leader.name))
        self._later(away + back + mended, lambda: self.setting.wires.mend(held, leader.name))

    def rush(self) -> None:
        """The leader is cut off, and all others want its office at the same time, again and again."""
        leader, others = self._leader_and_others()
        if leader is None:
            return
        self._note(f"rush after {leader.name}")
        wires = self.setting.wires
        pairs = [pair for other in others for pair in ((leader.name, other.name), (other.name, leader.name))]
        before = wires.lost, wires.doubled, wires.late
        wires.lost, wires.doubled, wires.late = 0.2, 0.6, 0.01

        def calm() -> None:
            wires.lost, wires.doubled, wires.late = before
            for a, b in pairs:
                wires.mend(a, b)

        for a, b in pairs:
            wires.cut(a, b)
        begin = TIMING.timeout_min + self.chance.uniform(0.01, 0.1)
        for number in range(8):
            self._later(begin + number * self.chance.uniform(0.002, 0.1), self._all_campaign)
        self._later(begin + 1.0, calm)

    def _leader_and_others(self) -> tuple[Life | None, list[Life]]:
        leading = [life for life in self.lives if life.log.leadership.is_leader]
        leader = self.chance.choice(leading) if leading else None
        others = [life for life in self.lives if life is not leader]
        return (leader, others) if others else (None, others)

    def _later(self, seconds: float, then: Callable[[], None]) -> None:
        self.setting.loop.call_later(seconds, then, context=self._outside)

    def _move_leadership(self, *, to: str) -> None:
        for life in self.lives:
            if life.log.leadership.is_leader and life.name != to:
                move = life.log.transfer_leadership(to, deadline=1.0)
                self.setting.loop.create_task(move, context=life.process.context.copy())

    def _all_campaign(self) -> None:
        for life in self.lives:
            if not life.log.leadership.is_leader:
                life.engine._timer.deadline = self.setting.loop.time()
                self.setting.loop.call_soon(life.log._turn, context=life.process.context)

    def pause(self) -> None:
        """A process stands still for a while, at once or after some callback."""
        life = self._life()
        if life is None or life.process.paused:
            return
        seconds = self.chance.choice((0.05, 0.3, 1.0, 3.0, 8.0)) * self.chance.uniform(0.5, 1.5)
        callbacks = self.chance.choice((0, self.chance.randint(1, 300)))
        self._note(f"pause {life.name} {seconds:.3f} after {callbacks}")

        def freeze() -> None:
            life.process.paused = True
            self.setting.loop.call_later(seconds, self.setting.loop.go_on, life.process, context=self._outside)

        self._after(life, callbacks, freeze)

    def _after(self, life: Life, callbacks: int, then: Callable[[], None]) -> None:
        """Do something to a process after it ran some callbacks more."""
        if callbacks:
            life.process.countdown, life.process.then = callbacks, then
        else:
            then()

    # -- disks

    def disk_full(self) -> None:
        """A device runs full: the process must stop by itself."""
        life = self._life()
        if life is not None:
            self._note(f"full {life.name}")
            life.disk.fail_in(self.chance.randint(1, 4))

    def wipe(self) -> None:
        """A node loses its disk; only a minority at a time, and only of a cluster that was founded."""
        may_lose = (len(self.nodes) - 1) // 2
        lost = [node for node in self.nodes.values() if node.platter.lost]
        founded = [node for node in self.nodes.values() if node.platter.durable.voter]
        if len(lost) >= may_lose or len(founded) + len(lost) < len(self.nodes):
            return
        if self.setting.witness.newest < self.setting.witness.began + SETTLED:
            return  # before its first entries a cluster cannot do without any of its nodes, in no generation
        life = self._life()
        if life is None or not life.journal._contents.commit > 5:
            return
        self._note(f"wipe {life.name}")
        life.die(Death.POWER)
        life.node.platter.wipe()

    # -- the network

    def cut(self) -> None:
        """One direction between two nodes."""
        a, b = self.chance.choice(list(self._pairs()))
        self._note(f"cut {a}>{b}")
        self.setting.wires.cut(a, b)

    def isolate(self) -> None:
        """All that a node sends, hears, or both."""
        life = self._life()
        name = self.chance.choice(sorted(self.nodes)) if life is None else life.name
        directions = self.chance.choice((("out",), ("in",), ("in", "out")))
        self._note(f"isolate {name} {directions}")
        for other in sorted(self.nodes):
            if other != name:
                if "out" in directions:
                    self.setting.wires.cut(name, other)
                if "in" in directions:
                    self.setting.wires.cut(other, name)

    def split(self) -> None:
        """Two groups that do not hear each other; now and then one node hears both."""
        names = sorted(self.nodes)
        self.chance.shuffle(names)
        bridge = {names.pop()} if self.chance.random() < 0.3 else set()
        one = set(names[: self.chance.randint(1, len(names) - 1)])
        self._note(f"split {sorted(one)} {sorted(bridge)}")
        for a, b in self._pairs():
            if (a in one) != (b in one) and not {a, b} & bridge:
                self.setting.wires.cut(a, b)

    def mend(self) -> None:
        """The network works again, in part or as a whole."""
        cuts = sorted(self.setting.wires.cuts)
        if cuts and self.chance.random() < 0.5:
            cuts = [self.chance.choice(cuts)]
        for a, b in cuts:
            self.setting.wires.mend(a, b)

    def reset_link(self) -> None:
        """A connection breaks, and is made anew while older messages are still under way."""
        life = self._life()
        links = [] if life is None else list(life.network.outbound.values())
        if links:
            link = self.chance.choice(links)
            self._note(f"reset {link.pair}")
            self.setting.wires.break_link(link, leaks=True)

    def noise(self) -> None:
        """Messages get lost or come twice, or no longer."""
        wires = self.setting.wires
        wires.lost, wires.doubled = self.chance.choice(
            ((0.0, 0.0), (0.05, 0.0), (0.0, 0.1), (0.02, 0.05), (0.3, 0.1), (0.0, 0.5))
        )
        wires.late = self.chance.choice((0.005, LATE_SECONDS, LATE_SECONDS))
        self._note(f"noise {wires.lost} {wires.doubled} {wires.late}")

    # -- clocks

    def wall_clock(self) -> None:
        """Somebody sets the clock of one node."""
        self.clocks_set += 1
        node = self.nodes[self.chance.choice(sorted(self.nodes))]
        node.clock.ahead = self.slept + self.chance.choice((0.0, 0.0, 5.0, -5.0, 20.0, -20.0, 90.0, -90.0, 4000.0))
        self._note(f"clock {node.name} {node.clock.ahead}")

    def hours_pass(self) -> None:
        """All machines were asleep: leaves expire, roots are pruned once the clocks are trusted again."""
        self._note("hours")
        self.clocks_set += 1
        self.slept += 5 * 3600.0
        for node in self.nodes.values():
            node.clock.ahead = self.slept

    # -- the end

    def heal(self) -> None:
        """Everything works again."""
        self.clocks_set += self.skewed
        wires = self.setting.wires
        wires.lost = wires.doubled = 0.0
        for a, b in sorted(wires.cuts):
            wires.mend(a, b)
        for node in self.nodes.values():
            node.clock.ahead = self.slept
        for life in self.lives:
            life.disk.crash_in(10**9, lambda: None)
            life.disk.fail_in(10**9)
            life.process.countdown = 0
            if life.process.paused:
                self.setting.loop.go_on(life.process)

    def start_all(self) -> bool:
        """Start what is down; whether all run as members."""
        for life in self.lives:
            # Of a later generation, the others do not even tell it that it is known to them: its log does.
            if life.node.platter.lost and life.engine.standing is Standing.EMPTY:
                life.die(Death.KILLED)
        for node in self.down:
            node.start(rejoin=node.platter.lost)
        return len(self.lives) == len(self.nodes) and all(
            life.engine.standing is Standing.MEMBER for life in self.lives
        )


async def _stop(life: Life) -> None:
    if life.log.leadership.is_leader:
        await life.log.transfer_leadership(deadline=0.6)
    life.die(Death.KILLED)
