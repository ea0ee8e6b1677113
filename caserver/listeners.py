"""The public listeners as the settings describe them: addresses, TLS, and the names by which this node may be called."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

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
    validity: tuple[datetime, datetime] | None = None  # of the certificate of HTTPS; None: there is no HTTPS

    def ageing(self, now: datetime) -> str | None:
        """Why the certificate has to be renewed: it is out of its time, or in the last tenth of it; None if all is well."""
        if self.validity is None:
            return None
        begin, end = self.validity
        if now < begin:
            return f"the certificate of HTTPS is not valid before {begin:%Y-%m-%d %H:%M:%S}Z"
        if now >= end - (end - begin) / 10:
            verb = "expired" if now >= end else "expires"
            return f"the certificate of HTTPS {verb} at {end:%Y-%m-%d %H:%M:%S}Z: replace cert_file, then `caserver reload`"
        return None


def front(config: AgentConfig) -> Front:
    """Read certificates, keys and CAs of ``config``; InvalidConfig with a line for every file that is of no use."""
    http = config.http
    restrictions = Restrictions(http.block_endpoints, http.write_from, http.response_headers)
    listeners = _listeners(config)
    validity = None if config.tls is None else tls.validity(config.tls.cert_file.read_text())
    return Front(listeners, _hosts(config), restrictions, validity)


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
    names = {config.node_name, config.own_address, *config.listen.hosts}
    names.update(config.peers, (peer.address for peer in config.peers.values()))
    if config.tls is not None:
        names.update(tls.dns_names(config.tls.cert_file.read_text()))
    return Hosts(names, trusted=config.http.allowed_hosts)
