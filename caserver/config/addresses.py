"""Addresses as they are written in a configuration: IP literals and DNS names, without a port."""

from __future__ import annotations

import ipaddress
import re

from caserver.config.interfaces import expand, interfaces_here
from caserver.fields import Fields
from caserver.unix_socket import SCHEME

_HOST = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_-]{1,63})*\.?")


def read_address(fields: Fields, key: str, default: str) -> str:
    """The address under ``key``, without the brackets of an IPv6 literal."""
    found = read_hosts(fields, key)
    if len(found) > 1 or (found and found[0].startswith(SCHEME)):
        fields.fault(key, f'"{" ".join(found)}" is not one address', "give one IP address or DNS name, without a port")
    return found[0] if found else default


def read_hosts(fields: Fields, key: str) -> tuple[str, ...]:
    """The addresses and ``unix://`` paths under ``key``, separated by blanks; IPv6 literals without their brackets."""
    text = fields.text(key)
    if not text:
        return ()
    if "{{" in text:
        try:
            text = expand(text, interfaces_here())
        except ValueError as exc:  # of a regular expression or a network in it, too
            fields.fault(key, str(exc), "write the address itself")
            return ()
    found: list[str] = []
    for each in text.split():
        host = each if each.startswith(SCHEME) else each.removeprefix("[").removesuffix("]")
        if not (each.startswith(SCHEME) or is_host(host)):
            fields.fault(key, f'"{each}" is no address', "give IP addresses or DNS names, without a port")
        found.append(host)
    return tuple(dict.fromkeys(found))


def is_host(text: str) -> bool:
    """Whether ``text`` is an IP literal or a DNS name."""
    try:
        ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        # Digits and dots alone are a mistyped IP address, not a name.
        return bool(_HOST.fullmatch(text)) and not re.fullmatch(r"[0-9.]+", text)
    return True


def is_wildcard(address: str) -> bool:
    """Whether ``address`` stands for every address of the machine."""
    try:
        return ipaddress.ip_address(address).is_unspecified
    except ValueError:
        return False


def is_loopback(address: str) -> bool:
    """Whether nobody outside the machine reaches ``address``."""
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address.lower() == "localhost"
