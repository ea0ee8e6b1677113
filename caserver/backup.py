"""Snapshots of this cluster: made from the state that this node has, verified and brought in again through the log.

A snapshot holds what the log holds: CA keys and tokens only as sealed, so that it is of use to nobody without the cluster
secret. It bears a seal made with that secret, and only what bears one is restored.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from caserver import archive
from caserver.archive import Making, Server
from caserver.authority.ports import Log
from caserver.authority.preparation import NONCE_BYTES
from caserver.authority.resealing import purpose_of
from caserver.environment import Clock, Entropy, Workers
from caserver.errors import CaserverError, CommitFailed, CommitUnknown, Corrupt, InvalidArchive, Unavailable
from caserver.forwarding.leader import Leader
from caserver.internode.keyring import Keyring, sealed_key_id
from caserver.requests import (
    AbortRestore,
    AdmitRestore,
    Caller,
    CommitRestore,
    RestoreProgress,
    RestoreRequest,
    StageRestore,
)
from caserver.state.codec import decode_state, encode_state
from caserver.state.model import CAState
from caserver.state.restore_apply import NOTHING_YET, next_digest
from caserver.state.sealing import keys_in_state, sealed_values

SEAL_PURPOSE = "snapshot"  # associated data of the sealed hash
PIECE = 96 << 10  # characters of one command; escaped it is twice as long at most, and fits
_REQUEST_ID_BYTES = 16


@dataclass(frozen=True, slots=True)
class _Verified:
    """A snapshot that can be restored."""

    index: int
    key_ids: tuple[str, ...]
    text: str = field(repr=False)

    def pieces(self, size: int) -> Iterator[str]:
        """The encoded state in pieces of so many characters."""
        for start in range(0, len(self.text), size):
            yield self.text[start : start + size]


class Backups:
    """Makes and restores snapshots, one of each at a time."""

    def __init__(
        self,
        log: Log,
        leader: Leader,
        *,
        keyring: Keyring,
        clock: Clock,
        entropy: Entropy,
        workers: Workers,
        servers: Mapping[str, str],
        scratch: Path | None,
        piece: int = PIECE,
    ) -> None:
        """``servers`` maps names to Raft addresses (host:port); ``scratch`` is where an upload waits to be verified.

        ``piece`` is how many characters of a state go into one command.
        """
        self._log = log
        self._leader = leader
        self._keyring = keyring
        self._clock = clock
        self._entropy = entropy
        self._workers = workers
        self._servers = tuple(Server(name, address) for name, address in sorted(servers.items()))
        self._scratch = scratch
        self._piece = piece
        self._making = asyncio.Lock()

    async def save(self, state: CAState) -> list[bytes]:
        """A snapshot of ``state``, in pieces; other things go on meanwhile."""
        async with self._making:  # the memory of one at a time
            making = Making(encode_state(replace(state, restoring=None)), index=state.index)
            while making.advance():
                await self._clock.sleep(0)
            nonce = self._entropy.bytes(NONCE_BYTES)
            return making.finish(
                term=self._log.leadership.term,
                servers=self._servers,
                seal=self._keyring.seal(making.state_hash, purpose=SEAL_PURPOSE, nonce=nonce),
                now=self._clock.now(),
            )

    def upload(self) -> BinaryIO:
        """A file for a snapshot that arrives: without a name, so that nothing of it is left whatever happens; Unavailable."""
        try:
            return tempfile.TemporaryFile(dir=self._scratch, buffering=0)
        except OSError as exc:
            raise _no_room(exc) from exc

    async def append(self, file: BinaryIO, piece: bytes) -> None:
        """Add to an upload without holding up the loop; Unavailable if it cannot be written.

        Returns when the thread has let go of the file, even if cancelled.
        """
        writing = asyncio.ensure_future(self._workers.run(_write_all, file, piece))
        try:
            await asyncio.shield(writing)
        except OSError as exc:
            raise _no_room(exc) from exc
        except asyncio.CancelledError:
            # The file is closed next: its descriptor may be another file's before the thread uses it.
            with contextlib.suppress(OSError):
                await writing
            raise

    async def admit(self, caller: Caller) -> None:
        """Ask the leader whether ``caller`` may restore now; raises what stands against it."""
        await self._leader.execute(caller, AdmitRestore())

    async def restore(self, caller: Caller, file: BinaryIO) -> int:
        """Verify a snapshot and let it take the place of the state; its index. InvalidArchive: nothing was changed."""
        verified = await self._workers.run(_verify, file, self._keyring)
        caller = replace(caller, request_id=self._entropy.bytes(_REQUEST_ID_BYTES).hex())
        try:
            return await self._bring_in(caller, verified)
        except CaserverError as exc:
            done = await self._given_up(caller, exc)
            if done is None:
                raise
            return done

    async def _bring_in(self, caller: Caller, verified: _Verified) -> int:
        digest, count = NOTHING_YET, 0
        for piece in verified.pieces(self._piece):
            await self._step(caller, StageRestore(number=count, piece=piece, key_ids=verified.key_ids))
            digest, count = next_digest(digest, piece), count + 1
        return (await self._step(caller, CommitRestore(pieces=count, digest=digest))).index

    async def _given_up(self, caller: Caller, error: CaserverError) -> int | None:
        """Leave nothing behind; the index if the restore was done all the same, None once it is certain that it is not."""
        try:
            progress = await self._step(caller, AbortRestore())
        except CaserverError:
            # Whoever leads next gives it up, and what ``error`` says stands; unless this node knows better: the caller's token
            # may have been replaced along with the rest.
            record = self._log.state.requests.get(caller.request_id)
            return None if record is None else record.index
        if progress.done:
            return progress.index
        if isinstance(error, CommitUnknown):
            raise CommitFailed("the restore was given up, nothing was changed; start it anew") from error
        return None

    async def _step(self, caller: Caller, request: RestoreRequest) -> RestoreProgress:
        answer = await self._leader.execute(caller, request)
        if not isinstance(answer, RestoreProgress):
            raise TypeError(f"a step of a restore was answered by {type(answer).__name__}")
        return answer


def _no_room(exc: OSError) -> Unavailable:
    return Unavailable(
        f"the snapshot cannot be kept on this server while it is verified: {exc.strerror}; "
        "make room in its data_dir, or restore through another server"
    )


def _write_all(file: BinaryIO, piece: bytes) -> None:
    rest = memoryview(piece)
    while rest:
        rest = rest[file.write(rest) :]


def _verify(file: BinaryIO, keyring: Keyring) -> _Verified:
    """Everything that can be said against a snapshot before anything changes; runs in a worker."""
    file.seek(0)
    content = archive.read(file)
    _check_seal(content, keyring)
    try:
        state = decode_state(content.state)
    except Corrupt as exc:
        raise InvalidArchive(f"the state in the snapshot cannot be read: {exc}") from exc
    if state.active_root is None:
        raise InvalidArchive("the snapshot holds no CA: it was saved before there was one; take another one")
    key_ids = keys_in_state(state)
    unknown = sorted(key_ids - set(keyring.key_ids))
    if unknown:
        raise _unknown_key(", ".join(unknown), keyring)
    for name, value in sealed_values(state).items():
        try:
            keyring.open(value, purpose=purpose_of(name))
        except Corrupt as exc:
            raise InvalidArchive(f"the snapshot's secret {name} does not open: {exc}") from exc
    return _Verified(index=state.index, key_ids=tuple(sorted(key_ids)), text=content.state.decode("ascii"))


def _check_seal(content: archive.Content, keyring: Keyring) -> None:
    seal = content.meta.seal
    if seal is None:
        raise InvalidArchive("the snapshot bears no seal of a cluster: it was not saved by caserver, or altered since")
    if sealed_key_id(seal) not in keyring.key_ids:
        raise _unknown_key(sealed_key_id(seal), keyring)
    with contextlib.suppress(Corrupt):
        if keyring.open(seal, purpose=SEAL_PURPOSE) == hashlib.sha256(content.state).digest():
            return
    raise InvalidArchive("the seal does not fit the snapshot: it was altered after it was saved; take another one")


def _unknown_key(key: str, keyring: Keyring) -> InvalidArchive:
    return InvalidArchive(
        f"the snapshot is sealed with key {key}, which is not among the cluster_secret keys of this cluster "
        f"({', '.join(keyring.key_ids)}): list the secret of the cluster that saved it behind the current one on every "
        "server, restart them, and restore again"
    )
