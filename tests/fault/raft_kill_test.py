"""Three processes, killed without warning while they write and compact: nothing that was acknowledged is lost."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import PIPE, Process
from pathlib import Path

from tests.testkit.cluster import free_ports, give_back

NAMES = "abc"
ROUNDS = 4
ACKS_PER_ROUND = 150  # several snapshots' worth
WITHIN = 100.0  # seconds for a round


class Processes:
    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.ports = free_ports(len(NAMES))
        self._peers = [f"{name}={port}" for name, port in zip(NAMES, self.ports, strict=True)]
        self.running: list[Process] = []
        self.acked: set[str] = set()
        self.state: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
        self._more = asyncio.Event()
        self._readers: list[asyncio.Task[None]] = []

    async def start(self, life: int) -> None:
        for name in NAMES:
            program = [sys.executable, "-m", "tests.testkit.raft_process"]
            process = await asyncio.create_subprocess_exec(
                *program, str(self._directory), name, str(life), *self._peers, stdin=PIPE, stdout=PIPE, limit=1 << 24
            )
            self.running.append(process)
            self._readers.append(asyncio.ensure_future(self._read(process)))

    async def _read(self, process: Process) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            kind, _, rest = line.decode().rstrip("\n").partition(" ")
            if kind == "ack":
                self.acked.add(rest)
                self._more.set()
            elif kind == "state" and not self.state.done():
                self.state.set_result(rest.split())

    async def until_acked(self, count: int) -> None:
        async with asyncio.timeout(WITHIN):
            while len(self.acked) < count:
                self._more.clear()
                await self._more.wait()

    async def kill_all(self) -> None:
        for process in self.running:
            if process.returncode is None:
                process.kill()
        for process in self.running:
            await process.wait()
        await asyncio.gather(*self._readers)
        self.running.clear()
        self._readers.clear()


async def test_what_was_acknowledged_survives_the_killing_of_all_nodes_at_once(tmp_path: Path):
    processes = Processes(tmp_path)
    try:
        for life in range(ROUNDS):
            await processes.start(life)
            await processes.until_acked(len(processes.acked) + ACKS_PER_ROUND)
            await processes.kill_all()
        await processes.start(ROUNDS)
        for process in processes.running:
            assert process.stdin is not None
            process.stdin.write(b"dump\n")
        async with asyncio.timeout(WITHIN):
            state = await processes.state
    finally:
        await processes.kill_all()
        give_back(processes.ports)
    before = {each for each in processes.acked if not each[1:].startswith(f"{ROUNDS}.")}
    assert before
    assert before <= set(state)
    assert len(state) == len(set(state))
