"""What a sequential commit cannot do without, and nothing else: three processes, three flushes, blocking mutual TLS.

One process sends an entry to two others over TLS, writes and flushes it itself and waits for the first of them to say that it
did the same. There is no event loop, no thread, no Raft and no state: what a commit takes above this is the price of those.
"""

from __future__ import annotations

import multiprocessing
import os
import select
import socket
import ssl
import statistics
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from caserver.internode.identity import NodeIdentity
from caserver.internode.keyring import Keyring

NAMES = ("a", "b", "c")
KEYRING = Keyring([b"\x07" * 32])
COMMAND = b"x" * 200  # about one leaf's entry
ROUNDS = 500
ANSWER = b"a" * 22  # about what a follower answers
_LOOPBACK = "127.0.0.1"


def floor(directory: Path, names: Sequence[str], *, flushed: bool) -> float:
    """Median seconds of ``ROUNDS`` of them; with ``flushed`` off and two names it is the round trip alone."""
    context = multiprocessing.get_context("spawn")
    leader, *others = names
    followers, links = [], []
    try:
        for name in others:
            ours, theirs = context.Pipe()
            process = context.Process(
                target=follow, args=(directory / name, name), kwargs={"told": theirs, "flushed": flushed}, daemon=True
            )
            process.start()
            followers.append(process)
            connection = socket.create_connection((_LOOPBACK, ours.recv()))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            links.append(NodeIdentity(KEYRING, leader, NAMES).client_context().wrap_socket(connection))
        return statistics.median(lead(directory / leader, links, flushed=flushed))
    finally:
        for process in followers:
            process.kill()
            process.join()
        for link in links:
            link.close()


def lead(file: Path, links: Sequence[ssl.SSLSocket], *, flushed: bool) -> list[float]:
    """Seconds of each round."""
    owed = dict.fromkeys(links, 0)  # bytes of answers to come, also to rounds before
    times = []
    with file.open("ab", buffering=0) as journal:
        for _ in range(ROUNDS):
            began = time.perf_counter()
            for link in links:
                link.sendall(COMMAND)
                owed[link] += len(ANSWER)
            if flushed:
                journal.write(COMMAND)
                os.fdatasync(journal.fileno())
            while all(owed.values()):
                for link in select.select(links, (), ())[0]:
                    owed[link] -= len(link.recv(4096))
            times.append(time.perf_counter() - began)
    return times


def follow(file: Path, name: str, *, told: Connection, flushed: bool) -> None:
    """Write, flush and answer, entry by entry."""
    with socket.create_server((_LOOPBACK, 0)) as listening, file.open("ab", buffering=0) as journal:
        told.send(listening.getsockname()[1])
        connection, _ = listening.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with NodeIdentity(KEYRING, name, NAMES).server_context().wrap_socket(connection, server_side=True) as link:
            waiting = 0
            while data := link.recv(4096):
                if flushed:
                    journal.write(data)
                waiting += len(data)
                if waiting < len(COMMAND):
                    continue
                if flushed:
                    os.fdatasync(journal.fileno())
                link.sendall(ANSWER * (waiting // len(COMMAND)))
                waiting %= len(COMMAND)
