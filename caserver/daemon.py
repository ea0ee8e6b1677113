"""The composition root: builds one node from its settings, starts it, watches it and stops it in order.

Start: keyring, log (its state is loaded and every sealed value proven to open), internal channel, authority and leaf
cache, public listeners. Stop is the reverse, with one turn: the public listeners close first, so that nothing new comes
in, and the log last, because it answers what is still under way. Leadership is handed over before anything closes.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import logging
import os
import signal
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial
from typing import NoReturn

import structlog

from caserver.acl_reset import ResetFile
from caserver.api.metrics import Telemetry
from caserver.api.query import BlockedQueries
from caserver.api.server import ApiServer, NodeView, Readiness
from caserver.authority.authority import Authority
from caserver.authority.gate import OPEN, Gate, TokenGate, TokenHasher, hazard
from caserver.authority.operations import Operations
from caserver.authority.ports import Providers
from caserver.authority.tokens import Tokens
from caserver.backup import Backups
from caserver.config.agent_config import AgentConfig
from caserver.descriptors import Shares, raise_limit
from caserver.environment import Clock, Entropy, SystemClock, SystemEntropy, ThreadWorkers
from caserver.errors import CaserverError, Corrupt, ReloadFailed
from caserver.forwarding.channel import Channel
from caserver.forwarding.leader import Leader, Patience
from caserver.internode.identity import NodeIdentity
from caserver.internode.keyring import SECRET_BYTES, Keyring, decode_secret
from caserver.leaf_cache import LeafCache
from caserver.listeners import Front, front
from caserver.node_gate import NodeGate
from caserver.own_secret import own_secret
from caserver.providers.builtin import builtin_kind
from caserver.providers.vault.kind import POOL_SIZE, vault_kind
from caserver.raft.journal import JournalFailed
from caserver.raft.ports import Seals
from caserver.raft.thread import RaftSettings, RaftThread
from caserver.reloading import Reloading
from caserver.state.commands import Command, Result
from caserver.state.configuration import CAConfiguration, parse_bootstrap
from caserver.state.lifecycle import leader_of
from caserver.state.machine import CAStateMachine
from caserver.state.model import CAState
from caserver.state.sealing import erases, keys_in_command, keys_in_state
from caserver.state.vault_configuration import VaultLocal
from caserver.supervision import Supervisor
from caserver.telemetry import logs

EXIT_OK = 0
EXIT_FAILED = 1
LEADERLESS_MAX = 10.0  # seconds without a leader before this node says that it is not ready
LOG_SILENT_MAX = 5.0  # seconds that the log may be busy with one thing before this node says that it is not ready
FAILED_GRACE = 0.5  # seconds for calls under way when the node cannot go on
LOG_STOP_MAX = 10.0  # seconds that it may take to stop: a disk that hangs holds it for ever
WORKERS = 4  # threads for key generation and slow signatures
# New objects before the young are collected; such collections before the next older ones are (see ``calm_collector``).
COLLECTOR_THRESHOLDS = (1_000, 5, 100)

_MEND = (
    "mend or replace the disk of data_dir; if the data is lost, restore a backup (a single node), or start with -rejoin "
    "while most other nodes are up"
)
_REMEDIES = {
    errno.ENOSPC: "make room on the disk of data_dir and start again: nothing that was acknowledged is lost",
    errno.EDQUOT: "raise the quota of the disk of data_dir and start again: nothing that was acknowledged is lost",
    errno.EIO: _MEND,
    errno.EROFS: _MEND,
    errno.EACCES: "let the user that the agent runs as own that file or directory (0700, files 0600), or use that port",
    errno.EADDRINUSE: "stop the process that has the port, or set another one in `ports`",
    errno.EADDRNOTAVAIL: "set bind_addr or client_addr to an address of this machine",
}

_log = structlog.get_logger("caserver.agent")


def run(config: AgentConfig, *, read: Callable[[], AgentConfig] | None = None) -> int:
    """Run one node until SIGTERM or SIGINT; the exit code is 0 after an orderly stop, 1 after a failure it explained.

    ``read`` reads the settings again when a reload is asked for (InvalidConfig if they have faults); without it the
    node reloads the files that ``config`` names, and nothing else.
    """
    clock = SystemClock()
    _configure_logs(config, clock)
    for warning in config.warnings:
        _log.warning(warning)
    try:
        return asyncio.run(_serve(config, clock, read or (lambda: config)))
    except (CaserverError, Corrupt, JournalFailed, OSError, ValueError) as exc:
        _log.error("the agent cannot run", reason=_explained(exc))
        return EXIT_FAILED


def _explained(exc: BaseException | None) -> str:
    """What went wrong, and what to do about it: our own errors say so themselves, those of the system do not."""
    remedy = _REMEDIES.get(exc.errno) if isinstance(exc, OSError) and exc.errno is not None else None
    return f"{exc}; {remedy}" if remedy else str(exc)


def _configure_logs(config: AgentConfig, clock: Clock) -> None:
    logs.configure(
        level=config.log_level,
        as_json=config.log_json,
        node=config.node_name,
        clock=clock,
        secrets=(*config.cluster_secrets, *config.acl.secrets),
    )


async def _serve(config: AgentConfig, clock: Clock, read: Callable[[], AgentConfig]) -> int:
    return await _Agent(config, clock=clock, entropy=SystemEntropy(), read=read).run()


class _Agent:
    """One node; made on the loop that it runs on."""

    def __init__(self, config: AgentConfig, *, clock: Clock, entropy: Entropy, read: Callable[[], AgentConfig]) -> None:
        self._config = config
        self._clock = clock
        self._entropy = entropy
        # Before anything starts: files that nobody can serve with must not let this node win an election first.
        self._front = front(config)
        own = {config.node_name: (config.own_address, config.ports.server)}
        self._servers = {name: (peer.address, peer.server_port) for name, peer in config.peers.items()} or own
        peers = set(config.peers) - {config.node_name}
        self._shares = Shares.of(raise_limit(), listeners=len(self._front.listeners), peers=len(peers))
        self._workers = ThreadWorkers(WORKERS)
        self._authority: Authority | None = None
        self._reloading = Reloading(
            config, read=read, workers=self._workers, founded=self._is_founded, judge_seed=_bootstrap
        )
        self._reloads: set[asyncio.Task[None]] = set()
        self._leaderless_since: float | None = float("-inf")
        self._key_ids: tuple[str, ...] = ()
        self._stopping = asyncio.Event()
        self._cannot_go_on = False
        self._supervisor = Supervisor()

    async def run(self) -> int:
        """Start everything, wait for a reason to stop, stop everything."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told_to_stop)
        loop.add_signal_handler(signal.SIGHUP, self._told_to_reload)
        async with AsyncExitStack() as stack:
            raft = await self._start(stack)
            calm_collector()
            stopping = asyncio.ensure_future(self._stopping.wait())
            stack.callback(stopping.cancel)
            failures = (raft.fatal, self._supervisor.failed)
            await asyncio.wait((stopping, *failures), return_when=asyncio.FIRST_COMPLETED)
            failed = next((each for each in failures if each.done()), None)
            if failed is not None:
                self._cannot_go_on = True
                _log.error("the agent stops, it cannot go on", reason=_explained(failed.exception()))
                return EXIT_FAILED
            _log.info("stopping")
            # First, while everything still runs: who asks here or through another node notices a pause at most.
            await raft.step_aside()
        _log.info("stopped")
        return EXIT_OK

    async def _close(self, served: ApiServer | Channel) -> None:
        """Let the calls under way end; after a failure none can, and who waits is better served by another node."""
        if self._cannot_go_on:
            await served.close(grace=FAILED_GRACE)
        else:
            await served.close()

    def _is_founded(self) -> bool:
        """Whether the cluster's first configuration is fixed; until then, and only then, the files count."""
        return self._authority is None or self._authority.is_founded

    def _told_to_stop(self) -> None:
        if self._stopping.is_set():
            _end_at_once("a second signal: the agent ends at once")
        self._stopping.set()

    def _told_to_reload(self) -> None:
        task = asyncio.get_running_loop().create_task(self._reload())
        self._reloads.add(task)
        task.add_done_callback(self._reloads.discard)

    async def _reload(self) -> None:
        with contextlib.suppress(ReloadFailed):  # it was logged; nobody waits for an answer to a signal
            await self._reloading.reload()

    async def _stop_log(self, raft: RaftThread[Command, CAState, Result]) -> None:
        try:
            async with asyncio.timeout(LOG_STOP_MAX):
                await raft.stop()
        except TimeoutError:
            _end_at_once(
                f"the log did not stop within {LOG_STOP_MAX:g} s: the disk of data_dir hangs; the agent ends at once"
            )

    async def _start(self, stack: AsyncExitStack) -> RaftThread[Command, CAState, Result]:
        config = self._config
        keyring = _keyring(config, self._entropy)
        self._key_ids = keyring.key_ids
        workers = self._workers
        stack.callback(workers.close)
        identity = NodeIdentity(keyring, config.node_name, config.peers)
        raft = await self._start_log(stack, keyring)
        hasher = TokenHasher(keyring)
        gate = self._gate(raft, hasher)
        tokens = Tokens(
            raft,
            settings=config.acl,
            hasher=hasher,
            reset=ResetFile(config.data_dir),
            clock=self._clock,
            entropy=self._entropy,
            workers=workers,
        )
        authority = Authority(
            raft,
            providers=self._providers(stack, workers),
            keyring=keyring,
            clock=self._clock,
            entropy=self._entropy,
            workers=workers,
            datacenter=config.datacenter,
            bootstrap=_bootstrap(config),
            gate=gate,
            tokens=tokens,
        )
        self._authority = authority
        operations = Operations(
            raft, raft=raft, authority=authority.execute, gate=gate, tokens=tokens, clock=self._clock
        )
        channel = self._channel(identity, operations)
        if config.peers:
            await channel.start()
        stack.push_async_callback(self._close, channel)
        leader = Leader(
            raft,
            execute=operations.execute,
            hop=channel,
            clock=self._clock,
            entropy=self._entropy,
            patience=Patience(config.rpc_hold_timeout),
            own_token=config.acl.agent,
        )
        node_gate = NodeGate(gate, raft, leader, clock=self._clock, down_deny=config.acl.down_deny)
        leaf_cache = LeafCache(
            raft,
            leader,
            gate=node_gate,
            clock=self._clock,
            entropy=self._entropy,
            datacenter=config.datacenter,
            max_entries=config.limits.leaf_cache_max,
            clock_fault=authority.clock_fault,
        )
        for name, work in (
            ("authority", authority.run),
            ("leaf cache", leaf_cache.run),
            ("leader watch", lambda: self._watch_leader(raft)),
            ("clock watch", lambda: authority.watch_clock(raft.transfer_leadership)),
        ):
            await stack.enter_async_context(self._supervisor.running(name, work))
        backups = Backups(
            raft,
            leader,
            keyring=keyring,
            clock=self._clock,
            entropy=self._entropy,
            workers=workers,
            servers={
                name: f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
                for name, (host, port) in self._servers.items()
            },
            scratch=config.data_dir,
        )
        await self._start_api(
            stack,
            raft,
            leader=leader,
            leaf_cache=leaf_cache,
            gate=node_gate,
            authority=authority,
            operations=operations,
            backups=backups,
        )
        return raft

    def _gate(self, raft: RaftThread[Command, CAState, Result], hasher: TokenHasher) -> Gate:
        config = self._config
        if not config.acl.enabled:
            return OPEN
        return TokenGate(raft, settings=config.acl, hasher=hasher, clock=self._clock, datacenter=config.datacenter)

    async def _start_log(self, stack: AsyncExitStack, keyring: Keyring) -> RaftThread[Command, CAState, Result]:
        config = self._config
        settings = RaftSettings(
            node=config.node_name,
            peers={name: (peer.address, peer.server_port) for name, peer in config.peers.items()},
            bind=(config.bind_addr, config.ports.server),
            multiplier=config.raft_multiplier,
            data_dir=config.data_dir,
            rejoin=config.rejoin,
        )
        raft: RaftThread[Command, CAState, Result] = RaftThread(
            settings,
            CAStateMachine(),
            keyring=keyring,
            clock=self._clock,
            entropy=self._entropy,
            cluster_id=lambda state: state.founding_id,
            seals=Seals(keys_in_command, keys_in_state, erases),
        )
        await raft.start()
        stack.push_async_callback(self._stop_log, raft)
        return raft

    def _providers(self, stack: AsyncExitStack, workers: ThreadWorkers) -> Providers:
        """Every kind of CA provider; calls to Vault wait in threads of their own and hold up nothing else."""
        vault_workers = ThreadWorkers(POOL_SIZE)
        stack.callback(vault_workers.close)
        local = _vault_local(self._config)
        vault = vault_kind(local, clock=self._clock, workers=vault_workers)
        return Providers({"consul": builtin_kind(self._clock, self._entropy, workers), "vault": vault}, local)

    def _channel(self, identity: NodeIdentity, operations: Operations) -> Channel:
        config = self._config
        return Channel(
            identity,
            config.node_name,
            peers={name: (peer.address, peer.forward_port) for name, peer in config.peers.items()},
            bind=(config.bind_addr, config.ports.forward),
            serve=operations.execute,
            connections_per_peer=self._shares.per_peer,
        )

    async def _start_api(
        self,
        stack: AsyncExitStack,
        raft: RaftThread[Command, CAState, Result],
        *,
        leader: Leader,
        leaf_cache: LeafCache,
        gate: NodeGate,
        authority: Authority,
        operations: Operations,
        backups: Backups,
    ) -> None:
        config = self._config
        requests: Counter[tuple[str, str, int]] = Counter()
        blocked = BlockedQueries(config.limits.http_max_blocked_queries)
        telemetry = Telemetry(
            raft,
            raft,
            clock=self._clock,
            operations=operations,
            requests=requests,
            cached=lambda: leaf_cache.size,
            blocked=lambda: blocked.count,
            token_expires_at=lambda: authority.token_expires_at,
            degraded=lambda: authority.degraded,
            tls_end=lambda: None if self._front.validity is None else self._front.validity[1],
        )
        await stack.enter_async_context(self._supervisor.running("telemetry", telemetry.run))
        view = NodeView(
            log=raft,
            leader=leader,
            leaf_cache=leaf_cache,
            gate=gate,
            clock=self._clock,
            entropy=self._entropy,
            datacenter=config.datacenter,
            node_name=config.node_name,
            peers=self._servers,
            connect_enabled=config.connect.enabled,
            settings=lambda: self._reloading.config,
            reload=self._reloading.reload,
            ready=lambda: self._readiness(raft, authority),
            raft=raft,
            backups=backups,
            telemetry=telemetry,
            dev=config.dev,
            blocked=blocked,
            requests=requests,
        )
        await self._listen(stack, view)

    async def _listen(self, stack: AsyncExitStack, view: NodeView) -> None:
        config = self._config
        server = ApiServer(
            view,
            self._front.listeners,
            connections_per_client=config.limits.http_max_conns_per_client,
            strangers_per_second=config.limits.http_strangers_per_second,
            connections=self._shares.per_listener,
            hosts=self._front.hosts,
            restrictions=self._front.restrictions,
        )
        await server.start()
        stack.push_async_callback(self._close, server)
        self._reloading.begin(partial(self._take_over, server, view))
        _log.info(
            "agent started",
            http=", ".join(server.shown),
            datacenter=config.datacenter,
            peers=len(config.peers) or 1,
        )

    def _take_over(self, server: ApiServer, view: NodeView, config: AgentConfig, changed: Front) -> None:
        """Put changed settings into force; the log, the leaf cache and the listeners go by them from now on."""
        _configure_logs(config, self._clock)
        if config.connect != self._reloading.config.connect and self._authority is not None:
            seed = _bootstrap(config)
            if seed is not None:
                self._authority.reseed(seed)
        self._front = changed
        server.renew(
            changed.listeners,
            connections_per_client=config.limits.http_max_conns_per_client,
            hosts=changed.hosts,
            restrictions=changed.restrictions,
            strangers_per_second=config.limits.http_strangers_per_second,
        )
        view.leader.own_token = config.acl.agent
        view.blocked.limit = config.limits.http_max_blocked_queries
        view.leaf_cache.max_entries = config.limits.leaf_cache_max

    def _readiness(self, raft: RaftThread[Command, CAState, Result], authority: Authority) -> Readiness:
        since = self._leaderless_since
        degraded = list(authority.degraded)
        if (ageing := self._front.ageing(self._clock.now())) is not None:
            degraded.append(("CertificateExpires", ageing))
        obstacle = raft.leadership.obstacle
        if obstacle is not None:
            degraded.insert(0, ("NotFounded", obstacle))
        elif not raft.leadership.is_voter:
            reason = "this node has no vote until it has caught up with a leader; do not stop another server before"
            degraded.insert(0, ("NotAVoter", reason))
        if (open_door := hazard(self._config.acl, raft.state)) is not None:
            degraded.append(("ACLsDisabled", open_door))
        if since is not None:
            degraded.insert(0, ("NoLeader", "no leader is known"))
        closed = keys_in_state(raft.state) - set(self._key_ids)
        if closed:
            reason = f"secrets are sealed with key {', '.join(sorted(closed))}, which cluster_secret does not list here"
            degraded.insert(0, ("KeyNotHeld", reason))
        silent = raft.silent_for
        if silent > LOG_SILENT_MAX:
            reason = f"the log has done nothing for {silent:.0f} s: the disk of data_dir hangs"
            degraded.insert(0, ("LogStalled", reason))
        ready = (
            silent <= LOG_SILENT_MAX
            and not closed
            and (since is None or self._clock.monotonic() - since < LEADERLESS_MAX)
        )
        return Readiness(ready=ready, degraded=tuple(degraded))

    async def _watch_leader(self, raft: RaftThread[Command, CAState, Result]) -> None:
        leader = leader_of(raft.state, raft.leadership)
        while True:
            if leader is not None:
                self._leaderless_since = None
            elif self._leaderless_since is None:
                self._leaderless_since = self._clock.monotonic()
            leader = await raft.changed(leader_of, leader)


def _end_at_once(reason: str) -> NoReturn:
    """End the process as a crash would, which loses nothing that was acknowledged; threads that hang cannot be ended."""
    _log.error(reason)
    logging.shutdown()
    os._exit(EXIT_FAILED)


def calm_collector() -> None:
    """Keep full garbage collections rare, and the state that was just loaded out of them.

    With a ledger of 100,000 leaves each would stop both loops for about as long as a heartbeat. The young are looked at in
    small portions still; what grows old goes by its reference count, as values that never change cannot form cycles.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECTOR_THRESHOLDS)


def _bootstrap(config: AgentConfig) -> CAConfiguration | None:
    if not config.connect.enabled:
        _log.warning("Connect is disabled: connect { enabled = true } makes this cluster a certificate authority")
        return None
    return parse_bootstrap(config.connect.ca_provider, config.connect.ca_config, local=_vault_local(config))


def _vault_local(config: AgentConfig) -> VaultLocal:
    """What this server knows of Vault by itself."""
    return VaultLocal.from_environ(os.environ, file_dir=config.connect.file_dir)


def _keyring(config: AgentConfig, entropy: Entropy) -> Keyring:
    if config.cluster_secrets:
        return Keyring([decode_secret(secret.reveal()) for secret in config.cluster_secrets])
    if config.data_dir is None:
        return Keyring([entropy.bytes(SECRET_BYTES)])
    return Keyring([own_secret(config.data_dir, entropy)])
