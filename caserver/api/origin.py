"""What is refused because of the way it came: a secret over a wire that anyone may read, a browser sent by somebody else.

A page of another site can make the browser of an operator talk to this node: across origins, or, with a name that is
resolved to this node's address (DNS rebinding), as if it were of the same origin. Programs other than browsers send none
of the headers that these rules look for.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from caserver.errors import Misdirected, PermissionDenied

_SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}
_OWN_SITES = {"same-origin", "none"}  # values of Sec-Fetch-Site; none: typed by the user
# Accept-Language is what a browser sends even where it leaves out the others: a read over plain HTTP of its own origin.
_OF_BROWSERS = ("Origin", "Sec-Fetch-Site", "Sec-Fetch-Mode", "Sec-Fetch-Dest", "Accept-Language")


class Hosts:
    """The names by which this node may be called; IP literals and localhost are always known."""

    def __init__(self, names: Collection[str] = (), *, trusted: Collection[str] = ()) -> None:
        """``trusted`` are the names that the operator listed, of which pages may also come; ``*.`` stands for one label."""
        self._trusted = frozenset(map(_canonical, trusted))
        self._known = self._trusted | {"localhost", *map(_canonical, names)}

    def check(self, method: str, headers: Mapping[str, str]) -> None:
        """Misdirected for a browser that calls this node by an unknown name, PermissionDenied for a write of a foreign page."""
        if not any(name in headers for name in _OF_BROWSERS):
            return
        host = headers.get("Host", "")
        name = _name_of(host)
        if not (_is_address(name) or _among(name, self._known)):
            raise Misdirected(
                f'"{host[:253]}" is no name of this node; call it by its address, '
                "or add the name to http_config { allowed_hosts = [...] }"
            )
        if method not in _SAFE_METHODS and self._is_foreign(host, headers):
            raise PermissionDenied(
                "a page of another origin may not change anything here; if it is yours, "
                "add its host to http_config { allowed_hosts = [...] }"
            )

    def _is_foreign(self, host: str, headers: Mapping[str, str]) -> bool:
        origin, site = headers.get("Origin"), headers.get("Sec-Fetch-Site", "none")
        if origin is None:
            return site.lower() not in _OWN_SITES
        authority = origin.partition("://")[2].lower()
        if _among(_name_of(authority), self._trusted):
            return False
        return authority != host.lower() or site.lower() not in _OWN_SITES


@dataclass(frozen=True, slots=True)
class Restrictions:
    """What the operator closed, and what is put on every answer: Consul's ``http_config``."""

    blocked: tuple[str, ...] = ()  # beginnings of paths
    write_from: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] = ()  # none: from everywhere
    headers: tuple[tuple[str, str], ...] = ()

    def check_path(self, path: str) -> None:
        """PermissionDenied in Consul's words for a path that is closed."""
        if any(path.startswith(each) for each in self.blocked):
            raise PermissionDenied("Endpoint is blocked by agent configuration")

    def check_write(self, method: str, client: str) -> None:
        """PermissionDenied in Consul's words; ``client`` is an IP address, or empty for who has none."""
        if self.write_from and method not in _SAFE_METHODS and not self._may_write(client):
            raise PermissionDenied("Access is restricted")

    def _may_write(self, client: str) -> bool:
        try:
            address = ipaddress.ip_address(client.partition("%")[0])
        except ValueError:
            return False
        mapped = getattr(address, "ipv4_mapped", None)
        return any((mapped or address) in network for network in self.write_from)


def refuse_exposed(path: str) -> PermissionDenied:
    """What is said to who asks for a secret, or for a change, over plain HTTP that leaves the machine."""
    return PermissionDenied(
        f"{path} is not served over plain HTTP on an address that is not loopback, because it carries secrets or changes "
        "things; "
        "use HTTPS (cert_file, key_file), or set http_config { allow_insecure_http = true }"
    )


def _among(name: str, names: frozenset[str]) -> bool:
    return name in names or "*." + name.partition(".")[2] in names


def _canonical(name: str) -> str:
    return name.lower().rstrip(".")


def _name_of(host: str) -> str:
    """The name in ``name``, ``name:port`` or ``[address]:port``."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return _canonical(host.partition(":")[0])


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
