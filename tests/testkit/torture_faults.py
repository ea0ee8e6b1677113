"""The faults that a tortured cluster has to bear. Each is a function that makes it, holds it for a while and mends it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.testkit.cluster import Cluster, Node, wait_for
from tests.testkit.netns import Networks, apart
from tests.testkit.torture_load import TortureLoad

BALLAST = "ballast"
STOPS_WITHIN = 60.0  # seconds in which a node must notice that its disk fails, under load
LEADER_WITHIN = 60.0


@dataclass(slots=True)
class Scene:
    """The cluster under torture, and what was measured."""

    cluster: Cluster
    load: TortureLoad
    chance: random.Random
    networks: Networks | None = None
    small: Sequence[Node] = ()  # nodes whose data directory lies on a small file system
    write_again: list[float] = field(
        default_factory=list
    )  # seconds from kill -9 of the leader to an acknowledged write
    refused_writes: int = 0  # of those that measure it

    def hold(self, least: float = 0.2, most: float = 2.5) -> None:
        time.sleep(self.chance.uniform(least, most))

    def leader(self) -> Node:
        return self.cluster.leader(within=LEADER_WITHIN)

    def follower(self) -> Node:
        return self.chance.choice(self.cluster.followers())

    def number(self, node: Node) -> int:
        return self.cluster.nodes.index(node) + 1

    def others(self, *nodes: Node) -> list[Node]:
        return [node for node in self.cluster if node not in nodes]

    def restart(self, *nodes: Node) -> None:
        self.cluster.start(*nodes)
        self.cluster.wait_ready(*nodes)

    def orders(self, node: Node) -> Path:
        """The file that tells the node's disk how to behave, see bad_disk."""
        return disk_orders(node)


def disk_orders(node: Node) -> Path:
    return node.directory / f"{node.name}.disk"


def kill_leader(scene: Scene) -> None:
    leader = scene.leader()
    survivor = scene.chance.choice(scene.others(leader))
    with scene.load.disturbed([leader]):
        scene.cluster.kill(leader)
        took = scene.load.write_through(survivor)
        if took is None:
            scene.refused_writes += 1
        else:
            scene.write_again.append(took)
        scene.restart(leader)


def kill_follower(scene: Scene) -> None:
    node = scene.follower()
    with scene.load.disturbed([node]):
        scene.cluster.kill(node)
        scene.hold()
        scene.restart(node)


def kill_two(scene: Scene) -> None:
    """Two at once: of three that is the majority, of five the rest goes on."""
    nodes = scene.chance.sample(scene.cluster.nodes, 2)
    with scene.load.disturbed(scene.cluster.nodes if len(scene.cluster.nodes) < 5 else nodes):
        for node in nodes:
            scene.cluster.kill(node)
        scene.hold(most=1.0)
        scene.restart(*nodes)
        scene.cluster.wait_ready()


def kill_all(scene: Scene) -> None:
    nodes = list(scene.cluster.nodes)
    scene.chance.shuffle(nodes)
    with scene.load.disturbed(nodes):
        for node in nodes:
            assert node.process is not None
            node.process.kill()  # all before the first is waited for
        for node in nodes:
            scene.cluster.kill(node)
        scene.restart(*nodes)


def pause_leader(scene: Scene) -> None:
    _pause(scene, scene.leader())


def pause_follower(scene: Scene) -> None:
    _pause(scene, scene.follower())


def _pause(scene: Scene, node: Node) -> None:
    with scene.load.disturbed([node]):
        scene.cluster.pause(node)
        scene.hold(most=7.0)
        scene.cluster.resume(node)
        scene.cluster.wait_ready(node)


def isolate_leader(scene: Scene) -> None:
    """Clients still reach it, its peers do not."""
    _isolate(scene, scene.leader())


def isolate_follower(scene: Scene) -> None:
    _isolate(scene, scene.follower())


def _isolate(scene: Scene, node: Node) -> None:
    rest = [scene.number(each) for each in scene.others(node)]
    _partition(scene, [node], apart([scene.number(node)], rest))


def mute_leader(scene: Scene) -> None:
    """What it sends is lost, what is sent to it arrives."""
    node = scene.leader()
    _partition(scene, [node], {(scene.number(node), scene.number(each)) for each in scene.others(node)})


def deafen_leader(scene: Scene) -> None:
    """What it sends arrives, what is sent to it is lost."""
    node = scene.leader()
    _partition(scene, [node], {(scene.number(each), scene.number(node)) for each in scene.others(node)})


def deafen_follower(scene: Scene) -> None:
    node = scene.follower()
    _partition(scene, [node], {(scene.number(each), scene.number(node)) for each in scene.others(node)})


def bridge(scene: Scene) -> None:
    """Two sides that only one node in the middle talks to."""
    nodes = list(scene.cluster.nodes)
    scene.chance.shuffle(nodes)
    rest = nodes[1:]  # the first is in the middle
    half = len(rest) // 2
    left, right = rest[:half], rest[half:]
    cut = apart([scene.number(each) for each in left], [scene.number(each) for each in right])
    _partition(scene, [*left, *right], cut)


def split(scene: Scene) -> None:
    """A minority without the rest."""
    nodes = list(scene.cluster.nodes)
    scene.chance.shuffle(nodes)
    half = (len(nodes) - 1) // 2
    few, many = nodes[:half], nodes[half:]
    _partition(scene, few, apart([scene.number(each) for each in few], [scene.number(each) for each in many]))


def _partition(scene: Scene, disturbed: Sequence[Node], cut: set[tuple[int, int]]) -> None:
    assert scene.networks is not None
    with scene.load.disturbed(disturbed):
        scene.networks.lose(cut)
        scene.hold(1.0, 6.0)
        scene.networks.heal()
        scene.cluster.wait_ready()


def full_disk(scene: Scene) -> None:
    """The node has to end itself, and to come back whole when there is room again."""
    node = scene.chance.choice(list(scene.small))
    ballast = node.data_dir / BALLAST
    with scene.load.disturbed([node]):
        with suppress(OSError), ballast.open("wb", buffering=0) as file:
            while file.write(bytes(65536)):
                pass
        with suppress(OSError), ballast.open("ab", buffering=0) as file:
            while file.write(b"0"):
                pass
        wait_for(f"{node.name} to stop on a full disk", lambda: None if node.running else True, within=STOPS_WITHIN)
        ballast.unlink()
        scene.restart(node)


def failing_disk(scene: Scene) -> None:
    """Every sync fails: the node has to end itself."""
    node = scene.chance.choice(scene.cluster.nodes)
    with scene.load.disturbed([node]):
        scene.orders(node).write_text("fail")
        wait_for(f"{node.name} to stop on a failing disk", lambda: None if node.running else True, within=STOPS_WITHIN)
        scene.orders(node).unlink()
        scene.restart(node)


def slow_disk(scene: Scene) -> None:
    """Every sync takes up to half a second more; a slow leader may lose its office."""
    node = scene.chance.choice(scene.cluster.nodes)
    with scene.load.disturbed([node]):
        scene.orders(node).write_text(f"{scene.chance.uniform(0.02, 0.5):.3f}")
        scene.hold(1.0, 4.0)
        scene.orders(node).unlink()
        scene.cluster.wait_ready()


Fault = Callable[[Scene], None]

PLAIN: Mapping[str, Fault] = {
    "kill-leader": kill_leader,
    "kill-follower": kill_follower,
    "kill-two": kill_two,
    "kill-all": kill_all,
    "pause-leader": pause_leader,
    "pause-follower": pause_follower,
    "failing-disk": failing_disk,
    "slow-disk": slow_disk,
}
WITH_NAMESPACES: Mapping[str, Fault] = {
    "isolate-leader": isolate_leader,
    "isolate-follower": isolate_follower,
    "mute-leader": mute_leader,
    "deafen-leader": deafen_leader,
    "deafen-follower": deafen_follower,
    "bridge": bridge,
    "split": split,
    "full-disk": full_disk,
}
