from __future__ import annotations

import pytest

from caserver.authority.operations import Operations, servers
from caserver.config.acl_settings import ACLSettings
from caserver.errors import InvalidRequest, NotLeader, RateLimited, Unavailable
from caserver.internode.keyring import Keyring
from caserver.raft.ports import Leadership
from caserver.raft.status import PeerStatus, RaftStatus
from caserver.requests import (
    CAAnswer,
    Caller,
    CARequest,
    Failure,
    IssuedLeaf,
    LeadershipMoved,
    LeavesSigned,
    ReadAt,
    ReadIndex,
    ReadServers,
    ServersRead,
    SignLeaves,
    TransferLeadership,
)
from tests.testkit.access import OFF, access
from tests.testkit.fakes import FakeLog, FakeRaft, ManualClock, SeededEntropy

LEAF = IssuedLeaf(1, "", "web", "spiffe://x/web", 0, 1, "r", "s", 5)
WELL = PeerStatus(connected=True, voter=True, last_contact=0.1, steady_for=5.0, last_index=1000, last_term=3)


def operations(
    log: FakeLog, answer: CAAnswer | Exception | None = None, *, acl: ACLSettings = OFF
) -> tuple[Operations, FakeRaft]:
    async def authority(caller: Caller, request: CARequest) -> CAAnswer:
        if isinstance(answer, Exception):
            raise answer
        return answer or ReadAt(1)

    raft = FakeRaft(log, ("n1", "n2", "n3"))
    own = access(log, keyring=Keyring([bytes(32)]), clock=ManualClock(), entropy=SeededEntropy(), settings=acl)
    return Operations(log, raft=raft, authority=authority, gate=own.gate, tokens=own.tokens, clock=ManualClock()), raft


async def test_what_is_signed_and_refused_is_counted() -> None:
    found, _ = operations(FakeLog(), LeavesSigned((LEAF, Failure("InvalidCSR", "no"), LEAF)))
    await found.execute(Caller(), SignLeaves(("a", "b", "c")))

    assert (found.signed, found.refused) == (2, {"InvalidCSR": 1})


async def test_a_request_refused_as_a_whole_counts_for_each_csr() -> None:
    found, _ = operations(FakeLog(), RateLimited("slow down"))
    with pytest.raises(RateLimited):
        await found.execute(Caller(), SignLeaves(("a", "b")))

    assert (found.signed, found.refused) == (0, {"RateLimited": 2})


async def test_what_is_the_authoritys_goes_there() -> None:
    found, _ = operations(FakeLog(), ReadAt(9))

    assert await found.execute(Caller(), ReadIndex()) == ReadAt(9)


async def test_only_the_leader_answers() -> None:
    log = FakeLog("n1")
    found, raft = operations(log.elsewhere("n2"))
    for request in (ReadServers(), TransferLeadership(None, "n1"), TransferLeadership("n2", "n1")):
        with pytest.raises(NotLeader):
            await found.execute(Caller(), request)
    assert raft.transfers == []


async def test_a_consistent_look_at_the_servers_proves_leadership_first() -> None:
    log = FakeLog()
    log.unproven = True
    found, _ = operations(log)

    assert isinstance(await found.execute(Caller(), ReadServers()), ServersRead)
    with pytest.raises(NotLeader):
        await found.execute(Caller(), ReadServers(consistent=True))


async def test_a_transfer_that_is_repeated_after_it_worked_moves_nothing() -> None:
    log = FakeLog("n1")
    second = log.elsewhere("n2")
    first, raft = operations(log)
    assert await first.execute(Caller(), TransferLeadership(None, "n1")) == LeadershipMoved("n2")
    successor, other = operations(second)
    for to in (None, "n2"):
        assert await successor.execute(Caller(), TransferLeadership(to, "n1")) == LeadershipMoved("n2")

    assert (raft.transfers, other.transfers) == ([None], [])


async def test_a_transfer_that_ended_with_another_server_is_not_told_as_done() -> None:
    log = FakeLog("n1")
    log.elsewhere("n2")
    log.elsewhere("n3")
    found, raft = operations(log)
    raft.usurper = "n3"

    with pytest.raises(Unavailable, match="n3 leads now, not n2: ask again"):
        await found.execute(Caller(), TransferLeadership("n2", "n1"))


async def test_a_transfer_that_cannot_be_is_refused() -> None:
    alone, _ = operations(FakeLog())
    log = FakeLog("n1")
    log.elsewhere("n2")
    stuck, raft = operations(log)
    raft.stuck = True

    with pytest.raises(InvalidRequest, match="no other server"):
        await alone.execute(Caller(), TransferLeadership(None, "n1"))
    with pytest.raises(InvalidRequest, match="they are n1, n2"):
        await stuck.execute(Caller(), TransferLeadership("n9", "n1"))
    with pytest.raises(Unavailable, match="n2 could not take it"):
        await stuck.execute(Caller(), TransferLeadership("n2", "n1"))


@pytest.mark.parametrize(
    ("peer", "healthy"),
    [
        ({}, True),
        ({"connected": False}, False),
        ({"last_contact": 0.31}, False),
        ({"last_contact": None}, False),
        ({"last_index": 750}, True),
        ({"last_index": 749}, False),
        ({"voter": False}, True),  # it is what a learner should be
    ],
)
def test_a_server_is_healthy_while_it_answers_and_keeps_up(peer: dict[str, object], healthy: bool) -> None:
    fields = {name: getattr(WELL, name) for name in PeerStatus.__slots__} | peer
    status = RaftStatus(
        leadership=Leadership(node="n1", leader="n1", term=3, is_leader=True),
        last_index=1000,
        last_term=3,
        commit_index=1000,
        applied_index=1000,
        running_for=60.0,
        contact_max=0.3,
        peers={"n2": PeerStatus(**fields)},
    )

    own, other = servers(status, now=1000.0).servers

    assert (own.name, own.healthy, own.stable_since, other.stable_since) == ("n1", True, 940, 995)
    assert other.healthy is healthy
