"""The provider ``vault``; what it is made of is loaded when the first configuration asks for it."""

from __future__ import annotations

from functools import cache, partial

from caserver.authority.ports import Provider, ProviderFactory, ProviderKind
from caserver.environment import Clock, Workers
from caserver.fields import Secret
from caserver.providers.vault.naming import leavings
from caserver.state.configuration import CAConfiguration
from caserver.state.model import CARoot
from caserver.state.vault_configuration import VaultLocal

POOL_SIZE = 8  # threads, and connections to one server


def vault_kind(local: VaultLocal, *, clock: Clock, workers: Workers, pool_size: int = POOL_SIZE) -> ProviderKind:
    """What to register under ``vault``; ``workers`` has ``pool_size`` threads of its own."""

    @cache
    def factory() -> ProviderFactory:
        # A third of a second of a core, which a node without Vault need not spend at its start.
        from caserver.providers.vault.provider import vault_factory  # noqa: PLC0415

        return vault_factory(local, clock=clock, workers=workers, pool_size=pool_size)

    def build(
        configuration: CAConfiguration, *, trust_domain: str, root: CARoot | None, root_key: Secret | None
    ) -> Provider:
        return factory()(configuration, trust_domain=trust_domain, root=root, root_key=root_key)

    return ProviderKind(build=build, chooses_serials=True, leavings=partial(leavings, local))
