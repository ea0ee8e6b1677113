"""A cluster's first configuration: from the files of whoever leads, or from an operator who writes one before any was good.

Whatever it comes from, a configuration that cannot work is refused before it is fixed in the log. Until then the files
count, and may be corrected; from then on they count for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import assert_never

import structlog

from caserver.authority.custody import HMAC_KEY_PURPOSE, Custody
from caserver.authority.ports import Log, verdict
from caserver.authority.preparation import NONCE_BYTES
from caserver.authority.rotation import check_index
from caserver.environment import Clock, Entropy, within
from caserver.errors import CommitFailed, CommitUnknown, Conflict, ProviderUnavailable
from caserver.pki.spiffe import cluster_id_from, cluster_id_of_root
from caserver.raft.ports import NotCommitted, OutcomeUnknown
from caserver.requests import ChangeConfiguration
from caserver.state.commands import Applied, Bootstrap, Reason, Refused
from caserver.state.configuration import CAConfiguration, parse_update, seal

HMAC_KEY_BYTES = 32
INSPECT_MAX = 30.0  # seconds that the first look at a provider may take
REMEDY = (
    "the CA was never founded: correct ca_config in the files of every server and run `caserver reload` there, or write a "
    "configuration with `caserver connect ca set-config`"
)

_log = structlog.get_logger(__name__)


class Founding:
    """Fixes cluster id and first configuration, once."""

    def __init__(self, log: Log, *, custody: Custody, clock: Clock, entropy: Entropy) -> None:
        self._log = log
        self._custody = custody
        self._clock = clock
        self._entropy = entropy

    @property
    def is_done(self) -> bool:
        """Whether the cluster has an id, as far as this node knows."""
        return self._log.state.cluster_id is not None

    async def by_file(self, seed: CAConfiguration) -> None:
        """Found the cluster with this node's ``seed``, unless it is founded; InvalidConfig if that cannot work."""
        if not self.is_done:
            await self._found(seed, seed.cluster_id)

    async def by_request(
        self, request: ChangeConfiguration, seed: CAConfiguration, *, still: Callable[[], None]
    ) -> ChangeConfiguration:
        """Found the cluster with what an operator writes, unless it is founded; what is left to be done then.

        What is absent or redacted in the request may mean what ``seed`` has, as with a configuration in force. ``still``
        raises if the caller may not.
        """
        if self.is_done:
            return request
        await self._log.barrier()
        state = self._log.state
        if state.cluster_id is not None:
            return request
        still()
        update = parse_update(request.body, stored=seed, cluster_id=seed.cluster_id, local=self._custody.vault_local)
        check_index(state, request.cas, update.modify_index)
        if await self._found(update.configuration, update.configuration.cluster_id or seed.cluster_id):
            return replace(request, cas=None)  # it has been looked at
        return request

    async def _found(self, configuration: CAConfiguration, cluster_id: str | None) -> bool:
        """Whether it is this that the cluster was founded with: another one may have come first."""
        if cluster_id is None and configuration.root_cert is not None:
            cluster_id = cluster_id_of_root(configuration.root_cert)
        if cluster_id is None:
            cluster_id = cluster_id_from(self._entropy.bytes(16))
        with self._custody.provider(configuration, None, trust_domain=f"{cluster_id}.consul") as provider:
            try:
                await within(self._clock, INSPECT_MAX, provider.inspect())
            except TimeoutError:
                raise ProviderUnavailable("the CA provider did not answer in time") from None
        hmac_key, nonce = self._entropy.bytes(HMAC_KEY_BYTES), self._entropy.bytes(NONCE_BYTES)
        keyring = self._custody.keyring
        command = Bootstrap(
            at=int(self._clock.now().timestamp()),
            cluster_id=cluster_id,
            configuration=seal(configuration, keyring, self._entropy.bytes(NONCE_BYTES)),
            sealed_hmac_key=keyring.seal(hmac_key, purpose=HMAC_KEY_PURPOSE, nonce=nonce),
        )
        outcome = verdict(await self._log.propose(command))
        match outcome:
            case Applied() | Refused(reason=Reason.ALREADY_BOOTSTRAPPED):
                _log.info("the cluster is bootstrapped", cluster_id=self._log.state.cluster_id)
                return isinstance(outcome, Applied)
            case Refused() as refused:
                raise Conflict(f"the cluster was not bootstrapped: {refused.reason} {refused.detail}".rstrip())
            case NotCommitted(reason=why):
                raise CommitFailed(f"the cluster was not bootstrapped: {why}")
            case OutcomeUnknown(reason=why):
                await self._log.barrier()
                if not self.is_done:
                    raise CommitUnknown(f"the cluster may not have been bootstrapped: {why}")
                return self._log.state.sealed_hmac_key == command.sealed_hmac_key
            case _:
                assert_never(outcome)
