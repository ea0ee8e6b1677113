"""What the provider calls things at a Vault server: all of it derives from cluster and epoch, so that anybody finds it again."""

from __future__ import annotations

from caserver.authority.ports import Leavings
from caserver.state.configuration import CAConfiguration
from caserver.state.vault_configuration import VaultLocal


def cluster_id_of(trust_domain: str) -> str:
    """The cluster's part of every name."""
    return trust_domain.partition(".")[0]


def key_name(trust_domain: str, epoch: int) -> str:
    """The name of the key that is made for an epoch."""
    return f"caserver-{cluster_id_of(trust_domain)}-{epoch}"


def engine_description(trust_domain: str) -> str:
    """By which an engine is known that was mounted for this cluster, even after a change that left no other trace."""
    return f"intermediate CA of caserver cluster {cluster_id_of(trust_domain)}"


def leavings(local: VaultLocal, configuration: CAConfiguration, *, trust_domain: str, epoch: int) -> Leavings | None:
    """What may stand at a server for an epoch, to be removed by hand if need be."""
    vault = configuration.vault
    if vault is None:
        return None
    return Leavings(
        address=vault.address or local.address or "VAULT_ADDR of the server that led",
        namespace=vault.intermediate_namespace or ("" if vault.address else local.namespace),
        path=vault.intermediate_pki_path,
        things=(
            f"the key {key_name(trust_domain, epoch)} and every issuer with that key",
            f'the engine itself, if its description is "{engine_description(trust_domain)}" and nothing else is in it',
        ),
    )
