"""Addresses as they are written in a configuration: IP literals and DNS names, without a port."""

from __future__ import annotations

import ipaddress
import re

from caserver.fields import Fields

_HOST = re.compile(r"(?=.{1,253}$)[A-Za-z0-9_]([A-Za-z0-9_-]{0,62})(\.[A-Za-z0-9_-]{1,63})*\.?")


def read_address(fields: Fields, key: str, default: str) -> str:
    """The address under ``key``, without the brackets of an IPv6 literal."""
    text = fields.text(key)
    if not text:
        return default
    host = text.removeprefix("[").removesuffix("]")
    if "{{" in text:
        fields.fault(key, "holds a template, and templates are not evaluated", "write the address itself")
    elif not is_host(host):
        fields.fault(key, f'"{text}" is no address', "give one IP address or DNS name, without a port")
    return host


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
