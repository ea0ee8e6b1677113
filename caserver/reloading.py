"""Settings that change while the agent runs: read again on request, judged whole, then taken over or refused at once.

What a running agent cannot take over is named and kept as it is. Nothing changes unless everything that was read is sound,
certificates, keys and CAs included: a file that is broken, or half written, leaves the old ones in force.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import fields, replace

import structlog

from caserver.config.agent_config import AgentConfig, ConnectSettings
from caserver.environment import Workers
from caserver.errors import InvalidConfig, ReloadFailed
from caserver.listeners import Front, front

# Fields of AgentConfig that are taken over. TLS is, as long as it is neither turned on nor off.
RELOADABLE = frozenset({"http", "limits", "log_json", "log_level", "tls"})
_NOT_SETTINGS = frozenset({"warnings"})
# Fields whose keys in a file have another name.
_KEYS = {
    "listen": "client_addr, addresses or unix_sockets",
    "own_address": "advertise_addr",
    "peers": "peer",
    "cluster_secrets": "cluster_secret",
    "raft_multiplier": "performance.raft_multiplier",
    "rpc_hold_timeout": "performance.rpc_hold_timeout",
    "tls": "cert_file and key_file (HTTPS on or off)",
}
_MAKES_ADDRESS = frozenset({"bind_addr", "peers"})  # what may change the node's own address, and is named itself
_SEED = "connect"  # what founded the CA; its configuration is changed through the API

TakeOver = Callable[[AgentConfig, Front], None]

_log = structlog.get_logger("caserver.agent")


class Reloading:
    """Keeps the settings in force."""

    def __init__(
        self,
        config: AgentConfig,
        *,
        read: Callable[[], AgentConfig],
        workers: Workers,
        founded: Callable[[], bool],
        judge_seed: Callable[[AgentConfig], object],
    ) -> None:
        """``read`` reads all sources again; InvalidConfig if they have faults.

        Until the CA is ``founded`` what founds it may change, too; ``judge_seed`` raises InvalidConfig if it is not sound.
        """
        self._read, self._workers = read, workers
        self._founded, self._judge_seed = founded, judge_seed
        self._one_at_a_time = asyncio.Lock()
        self._take_over: asyncio.Future[TakeOver] = asyncio.get_running_loop().create_future()
        self.config = config

    def begin(self, take_over: TakeOver) -> None:
        """The agent serves: ``take_over`` puts settings into force, and cannot fail. A reload waits until now."""
        self._take_over.set_result(take_over)

    async def reload(self) -> None:
        """Take over what changed; ReloadFailed with every fault if anything is wrong, and then nothing changed."""
        take_over = await asyncio.shield(self._take_over)
        async with self._one_at_a_time:
            try:
                config, kept, served = await self._workers.run(self._judged)
            except InvalidConfig as exc:
                _log.error("the settings stay as they are, what was read has faults", faults=exc.detail.splitlines())
                raise ReloadFailed(f"the settings stay as they are: {exc.detail}") from exc
            take_over(config, served)
            for warning in config.warnings:
                _log.warning(warning)
            for key in kept:
                _log.warning(f"{key}: changed, and kept as it was: {_remedy(key)}")
            _log.info("settings reloaded")
            self.config = config

    def _judged(self) -> tuple[AgentConfig, list[str], Front]:
        """What will be in force, the keys that changed in vain, and the listeners; on a thread, it reads files."""
        fresh, current = self._read(), self.config
        changed = [each.name for each in fields(fresh) if getattr(fresh, each.name) != getattr(current, each.name)]
        taken = RELOADABLE.intersection(changed)
        if (fresh.tls is None) != (current.tls is None):
            taken -= {"tls"}
        # Of the tokens this node's own may change; with which ACLs were founded does not.
        acl = replace(current.acl, agent=fresh.acl.agent)
        if acl == fresh.acl:
            taken |= {"acl"}
        connect = self._seeded(current, fresh)
        if connect == fresh.connect:
            taken |= {"connect"}
        silent = _NOT_SETTINGS | ({"own_address"} if _MAKES_ADDRESS.intersection(changed) else set())
        kept = [_KEYS.get(name, name) for name in changed if name not in taken | silent]
        values = {name: getattr(fresh, name) for name in taken} | {"acl": acl, "connect": connect}
        config = replace(current, warnings=fresh.warnings, **values)
        if connect != current.connect:
            self._judge_seed(config)
        return config, kept, front(config)

    def _seeded(self, current: AgentConfig, fresh: AgentConfig) -> ConnectSettings:
        """The settings of the CA: what founds it may change as long as nothing was founded."""
        if self._founded():
            return current.connect
        return replace(current.connect, ca_provider=fresh.connect.ca_provider, ca_config=fresh.connect.ca_config)


def _remedy(key: str) -> str:
    if key == _SEED:
        return "it founds a cluster only; change the CA with `caserver connect ca set-config`"
    return "restart the agent to use it"
