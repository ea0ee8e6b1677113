"""One Raft node as a process that can be killed: proposes whenever it leads and says what was acknowledged.

    python -m tests.testkit.raft_process DIRECTORY NODE LIFE NODE=PORT...

Prints ``ack COMMAND`` for each acknowledged command and, told ``dump`` on standard input, ``state COMMAND...`` once a
barrier (as leader) proved that it is complete.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from caserver.environment import SystemClock, SystemEntropy
from caserver.errors import NotLeader
from caserver.internode.keyring import Keyring
from caserver.raft.ports import Committed, Leadership
from caserver.raft.streams import Address
from caserver.raft.thread import RaftSettings, RaftThread
from tests.testkit.raftlab import Register

Thread = RaftThread[str, tuple[str, ...], int]
_WRITERS = 8


def _leads(_: object, leadership: Leadership) -> bool:
    return leadership.is_leader


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


async def _write(node: Thread, prefix: str) -> None:
    number = 0
    while True:
        await node.changed(_leads, seen=False)
        number += 1
        command = f"{prefix}-{number}"
        if isinstance(await node.propose(command), Committed):
            _say(f"ack {command}")


async def _told_to_dump(node: Thread) -> None:
    await asyncio.to_thread(sys.stdin.readline)
    while True:
        await node.changed(_leads, seen=False)
        try:
            await node.barrier()
        except NotLeader:
            continue
        _say("state " + " ".join(node.state))
        return


async def main(directory: str, name: str, life: str, *peers: str) -> None:
    addresses: dict[str, Address] = {}
    for each in peers:
        peer, port = each.split("=")
        addresses[peer] = ("127.0.0.1", int(port))
    settings = RaftSettings(
        node=name,
        peers=addresses,
        bind=addresses[name],
        multiplier=1,
        data_dir=Path(directory) / name,
        snapshot_every=60,
    )
    node: Thread = RaftThread(
        settings, Register(), keyring=Keyring([b"\x07" * 32]), clock=SystemClock(), entropy=SystemEntropy()
    )
    await node.start()
    tasks = [asyncio.ensure_future(_write(node, f"{name}{life}.{writer}")) for writer in range(_WRITERS)]
    tasks.append(asyncio.ensure_future(_told_to_dump(node)))
    tasks.append(asyncio.ensure_future(node.fatal))
    await asyncio.gather(*tasks)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
