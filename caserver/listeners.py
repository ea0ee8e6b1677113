"""The public listeners as the settings describe them: addresses, TLS, and the names by which this node may be called."""

from __future__ import annotations

from dataclasses import dataclass

from caserver.api.origin import Hosts, Restrictions
from caserver.api.server import Listener
from caserver.config.agent_config import AgentConfig
from caserver.pki import tls
from caserver.unix_socket import UnixSocket


@dataclass(frozen=True, slots=True)
class Front:
    """What clients meet: where, under which names, and what is closed to them."""

    listeners: tuple[Listener, ...]
    hosts: Hosts
    restrictions: Restrictions


def front(config: AgentConfig) -> Front:
    """Read certificates, keys and CAs of ``config``; InvalidConfig with a line for every file that is of no use."""
    http = config.http
    restrictions = Restrictions(http.block_endpoints, http.write_from, http.response_headers)
    return Front(_listeners(config), _hosts(config), restrictions)


def _listeners(config: AgentConfig) -> tuple[Listener, ...]:
    found = []
    for where in config.listen.http:
        if isinstance(where, UnixSocket):
            found.append(Listener(where))
        elif config.ports.http is not None:
            found.append(Listener(where, config.ports.http, exposed=config.http.exposes(where)))
    if config.tls is None:
        return tuple(found)
    context = tls.context_of_files(config.tls)
    for where in config.listen.https:
        if isinstance(where, UnixSocket):
            found.append(Listener(where, tls=context))
        elif config.ports.https is not None:
            found.append(Listener(where, config.ports.https, context))
    return tuple(found)


def _hosts(config: AgentConfig) -> Hosts:
    names = {config.node_name, *config.listen.hosts}
    names.update(config.peers, (peer.address for peer in config.peers.values()))
    if config.tls is not None:
        names.update(tls.dns_names(config.tls.cert_file.read_text()))
    return Hosts(names, trusted=config.http.allowed_hosts)
