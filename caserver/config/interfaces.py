"""Addresses that a configuration leaves to the machine: the templates of Consul (go-sockaddr) that servers are set up with.

``{{ GetInterfaceIP "eth0" }}``, ``{{ GetPrivateIP }}``, ``{{ GetPublicIP }}`` and their plurals, and chains such as
``{{ GetPrivateInterfaces | include "network" "10.0.0.0/8" | attr "address" }}``.
"""

from __future__ import annotations

import fcntl
import ipaddress
import re
import shlex
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
_SIOCGIFADDR = 0x8915
_NAME_BYTES = 15
_TEMPLATE = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Interface:
    """One address of the machine."""

    name: str
    address: IPAddress
    default: bool = False  # whether the default route goes out there

    @property
    def private(self) -> bool:
        """Whether the address is of a network that is nobody's on the Internet, and more than this machine's own."""
        return self.address.is_private and not (self.address.is_loopback or self.address.is_link_local)

    @property
    def public(self) -> bool:
        """Whether it can be reached from the Internet."""
        return self.address.is_global


def expand(text: str, interfaces: Sequence[Interface]) -> str:
    """``text`` with every template replaced; ValueError says which of them gives nothing, or cannot be understood."""

    def replace(found: re.Match[str]) -> str:
        result = _evaluated(found[1].strip(), interfaces)
        if not result:
            raise ValueError(f"{found[0]} gives no address on this machine")
        return result

    return _TEMPLATE.sub(replace, text)


_SOURCES: dict[str, Callable[[Interface], bool]] = {
    "GetAllInterfaces": lambda _: True,
    "GetDefaultInterfaces": lambda each: each.default,
    "GetPrivateInterfaces": lambda each: each.private and each.default,
    "GetPublicInterfaces": lambda each: each.public and each.default,
}
# Functions that give addresses at once -> whether an interface counts.
_ADDRESSES: dict[str, Callable[[Interface], bool]] = {
    "GetPrivateIP": _SOURCES["GetPrivateInterfaces"],
    "GetPublicIP": _SOURCES["GetPublicInterfaces"],
    "GetPrivateIPs": lambda each: each.private,
    "GetPublicIPs": lambda each: each.public,
}


def _evaluated(template: str, interfaces: Sequence[Interface]) -> str:
    first, *steps = [shlex.split(part) for part in template.split("|")]
    if not first:
        raise ValueError("an empty template gives no address")
    name, arguments = first[0], first[1:]
    if name in {"GetInterfaceIP", "GetInterfaceIPs"} and len(arguments) == 1 and not steps:
        return _joined([each for each in interfaces if each.name == arguments[0]], one=name.endswith("P"))
    if name in _ADDRESSES and not arguments and not steps:
        return _joined([each for each in interfaces if _ADDRESSES[name](each)], one=name.endswith("P"))
    if name not in _SOURCES or arguments:
        raise ValueError(f"{{{{ {template} }}}} is no template that is understood here")
    return _chained([each for each in interfaces if _SOURCES[name](each)], steps, template)


def _chained(left: list[Interface], steps: list[list[str]], template: str) -> str:
    for step in steps:
        match step:
            case ["include" | "exclude" as verb, kind, pattern] if kind in _SELECTORS:
                chosen = _SELECTORS[kind](pattern)
                left = [each for each in left if chosen(each) == (verb == "include")]
            case ["limit", count] if count.isdigit():
                left = left[: int(count)]
            case ["sort", _]:
                left = sorted(left, key=lambda each: (each.address.version, int(each.address)))
            case ["attr", "address"]:
                return _joined(left, one=True)
            case ["join", "address", separator]:
                return separator.join(str(each.address) for each in left)
            case _:
                raise ValueError(f"{{{{ {template} }}}} is no template that is understood here ({' '.join(step)})")
    raise ValueError(f'{{{{ {template} }}}} gives interfaces, not addresses; end it with | attr "address"')


def _by_network(pattern: str) -> Callable[[Interface], bool]:
    network = ipaddress.ip_network(pattern, strict=False)
    return lambda each: each.address in network


def _by_name(pattern: str) -> Callable[[Interface], bool]:
    compiled = re.compile(pattern)
    return lambda each: compiled.search(each.name) is not None


_SELECTORS: dict[str, Callable[[str], Callable[[Interface], bool]]] = {
    "network": _by_network,
    "name": _by_name,
    "address": lambda pattern: lambda each: re.search(pattern, str(each.address)) is not None,
    "type": lambda kind: lambda each: kind.lower() in {"ip", f"ipv{each.address.version}"},
}


def _joined(found: Sequence[Interface], *, one: bool) -> str:
    # An IPv4 address before IPv6, as go-sockaddr orders them.
    ordered = sorted(found, key=lambda each: each.address.version)
    return " ".join(str(each.address) for each in (ordered[:1] if one else ordered))


def interfaces_here() -> list[Interface]:
    """The addresses of this machine: the first IPv4 address of every interface, and all of IPv6."""
    defaults = _default_interfaces()
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                raw = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:_NAME_BYTES]))
            except OSError:  # it has none
                continue
            found.append(Interface(name, ipaddress.IPv4Address(raw[20:24]), name in defaults))
    for line in _lines("/proc/net/if_inet6"):
        digits, *_, name = line.split()
        found.append(Interface(name, ipaddress.IPv6Address(bytes.fromhex(digits)), name in defaults))
    return found


def _default_interfaces() -> set[str]:
    routes = [line.split() for line in _lines("/proc/net/route")[1:]]
    return {name for name, destination, *_ in routes if destination == "00000000"}


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:  # a machine without that protocol
        return []
