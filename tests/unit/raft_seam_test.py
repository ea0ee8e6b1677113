from __future__ import annotations

import pickle

import pysyncobj.journal
import pysyncobj.pickle
import pysyncobj.syncobj
import pytest
from pysyncobj import SyncObj, SyncObjConf
from pysyncobj.node import Node
from pysyncobj.transport import Transport

from caserver.errors import Corrupt
from caserver.raft import seam
from tests.testkit.raftlab import Lab
from tests.testkit.stockraft import StockCluster


def test_the_installed_package_has_every_name_that_is_driven():
    seam.assert_names()


def test_a_package_without_a_needed_name_is_refused_by_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(SyncObj, "_SyncObj__onBecomeLeader")
    with pytest.raises(RuntimeError, match=r"0\.3\.17, unmodified, .* lacks onBecomeLeader; install exactly"):
        seam.install()


def test_another_version_is_refused():
    with pytest.raises(RuntimeError, match=r"version 0\.3\.18 is installed"):
        seam.assert_names("0.3.18")


@pytest.mark.parametrize("module", [pysyncobj.pickle, pysyncobj.journal])
def test_nothing_is_ever_unpickled(module: object):
    seam.install()
    with pytest.raises(seam.PickleForbidden):
        module.loads(pickle.dumps("harmless"))  # type: ignore[attr-defined]


def test_a_command_of_the_bare_engine_is_not_unpickled_either():
    class Silent(Transport):  # type: ignore[misc] # pysyncobj carries no types
        def send(self, node: Node, message: dict[str, object]) -> bool:
            return True

    seam.install()
    bare = SyncObj(Node("a"), [], SyncObjConf(autoTick=False), nodeClass=Node, transportClass=Silent)
    with pytest.raises(seam.PickleForbidden):
        bare._SyncObj__doApplyCommand(b"\x00" + pickle.dumps(1))


def test_hooks_can_be_installed_again_and_again():
    for _ in range(3):
        seam.install()
    assert StockCluster("A")["A"].log() == [(1, 0)]


def test_peers_of_a_name_are_equal_and_hash_alike_in_every_process():
    assert seam.Peer("a") == seam.Peer("a")
    assert hash(seam.Peer("a")) == 3904355907  # CRC-32: the order of sets must not change from run to run


def test_the_engine_never_reaches_the_snapshots_of_the_package():
    core = Lab("A")["A"].engine._core
    with pytest.raises(Corrupt):
        core._SyncObj__serializer.serialize(())
    with pytest.raises(Corrupt):
        core._SyncObj__loadDumpFile(clearJournal=True)
