"""The leader is lost at every step of a restore: another one goes on with it, or nothing of it is left."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from caserver.backup import Backups
from caserver.environment import InlineWorkers
from caserver.errors import CaserverError
from caserver.requests import Caller
from caserver.state.model import RESTORE_IDLE, CAState
from tests.contract.snapshot_test import ANOTHER_ROOT, change
from tests.contract.world import KEYRING, World, running
from tests.testkit.fakes import FakeLog, settle

PIECE = 4000  # characters of one command: two pieces
STEPS = range(1, 7)  # before and after each of three proposals
HOW: dict[str, Callable[[FakeLog, FakeLog], None]] = {
    "deposed": lambda _, other: other.become_leader(),
    "its command lost": lambda leader, _: leader.lose_next_command(),
    "its reply lost": lambda leader, _: leader.lose_next_reply(),
    "its command failed": lambda leader, _: leader.fail_next(),
}


@dataclass
class Rig:
    """A follower that restores, and the leader that it depends on."""

    world: World
    backups: Backups
    leader: FakeLog
    data: bytes
    then: CAState  # what the snapshot holds

    async def restore(self) -> int:
        """Restore through the follower; time passes while it waits."""
        restoring = asyncio.ensure_future(self.backups.restore(Caller(source="test"), io.BytesIO(self.data)))
        while not restoring.done():
            await settle()
            await self.world.clock.advance(0.1)
        return restoring.result()

    @property
    def state(self) -> CAState:
        return self.world.log.state


@asynccontextmanager
async def rig() -> AsyncIterator[Rig]:
    async with running(dev=False, node="n2") as world:
        (leader,) = [view for view in world.log.views if view.node == "n1"]
        backups = Backups(
            world.log,
            world.node.leader,
            keyring=KEYRING,
            clock=world.clock,
            entropy=world.node.entropy,
            workers=InlineWorkers(),
            servers={},
            scratch=None,
            piece=PIECE,
        )
        then = world.log.state
        data = b"".join(await backups.save(then))
        await change(world, ANOTHER_ROOT)
        yield Rig(world, backups, leader, data, then)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("step", STEPS)
async def test_the_loss_of_a_leader_at_any_step_is_a_pause(step: int, how: str) -> None:
    async with rig() as found:
        found.leader.tripwire.arm(step, lambda: HOW[how](found.leader, found.world.log))
        index = await found.restore()

        assert found.leader.tripwire.sprung
        assert found.state.restored_index == index
        assert [root.id for root in found.state.roots] == [root.id for root in found.then.roots]
        assert found.state.restoring is None


@pytest.mark.parametrize("step", STEPS)
async def test_without_a_leader_nothing_is_left_in_the_end(step: int) -> None:
    async with rig() as found:
        before = found.state
        found.leader.tripwire.arm(step, found.leader.step_down)
        try:
            await found.restore()
        except CaserverError:
            assert found.state.restored_index == 0
        else:
            before = found.state  # the step was its last, or behind it
        found.world.log.become_leader()
        await settle()
        await found.world.clock.advance(
            2 * RESTORE_IDLE + 120
        )  # a new leader watches its clock before it removes anything
        await settle()

        assert found.state.restoring is None
        assert [root.id for root in found.state.roots] == [root.id for root in before.roots]
        assert found.state.configuration == before.configuration
